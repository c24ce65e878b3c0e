"""A head adapter as a PEFT LoRA of the same base model, for tools that know no head adapters.

A change of some rows is a LoRA whose A holds those rows' change and whose B places them (zeros and ones); of some columns the
other way round. No rank is cut, but the change is a difference, and peft adds it again: each is one rounding in fp32. With the
base b loaded in the type of its files, and peft's plain merge (`safe_merge` rounds the change to the base's type first):

| adapter a of | base of | base + LoRA |
| --- | --- | --- |
| bf16 | bf16 | a, bit for bit (but where a is not 0 and smaller than b / 32,768) |
| fp32 | fp32 | a within (abs(a - b) + abs(a)) / 2^24, as is any other pair loaded in fp32 |
| fp32 | bf16 | that, rounded to bf16: at a near tie one bf16 step beside what `p2d.adapters.merge` writes |

The price is a LoRA as wide as the rows are many; `p2d.adapters.merge` rounds once, if at all, and costs nothing.

Legend: S chosen places of a module, I, O its inputs and outputs, E head width, D model width, U chosen unit.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2d.adapters import Adapter, SliceEntry, open_pair
from p2d.arch.spec import ArchSpec, unit_rows, unit_view
from p2d.errors import ModelError
from p2d.files import read_json
from p2d.model_info import ModelInfo, weight_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_peft(base_dir: Path, adapter_dir: Path, out: Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` reads.

    Raises: AdapterMismatch, ModelError; ModelError too if `out` exists.
    """
    from peft import LoraConfig  # a second to import, and only here

    adapter, info, spec = open_pair(base_dir, adapter_dir, out)
    by_path: dict[str, list[SliceEntry]] = defaultdict(list)
    for entry in adapter.manifest.slices:
        by_path[spec.path(entry.layer, entry.projection)].append(entry)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, entries in by_path.items():
        A_SI, B_OS = _lora(spec, info, adapter, entries, _weight(base_dir, spec, entries[0]))
        tensors[f"base_model.model.{path}.lora_A.weight"] = A_SI
        tensors[f"base_model.model.{path}.lora_B.weight"] = B_OS
        ranks[path] = len(A_SI)
    out.mkdir(parents=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)  # safetensors writes for the owner alone
    config = LoraConfig(
        base_model_name_or_path=info.name,
        task_type="CAUSAL_LM",
        target_modules=list(by_path),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha = rank: B A is added as it is
        fan_in_fan_out=spec.transposed,
        inference_mode=True,
    )
    config.save_pretrained(os.fspath(out))
    settings = read_json(out / CONFIG)
    settings["target_modules"].sort()  # peft holds them as a set, in another order in each process
    (out / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
    return out


def _lora(
    spec: ArchSpec, info: ModelInfo, adapter: Adapter, entries: list[SliceEntry], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """A [S, I] and B [O, S] of one module, fp32: the changes of all its sliced projections side by side."""
    changes_SD, places = [], []
    for entry in entries:
        base_UED = unit_view(spec, info, entry.projection, weight)[list(entry.units)].float()
        changes_SD.append((adapter.tensors[entry.key].float() - base_UED).flatten(0, 1))
        places += [place for unit in entry.units for place in unit_rows(spec, info, entry.projection, unit)]
    change_SD = torch.cat(changes_SD)
    outputs, inputs = weight.t().shape if spec.transposed else weight.shape
    is_input = entries[0].projection == "o"
    place_SN = torch.zeros(len(places), inputs if is_input else outputs)
    place_SN[torch.arange(len(places)), places] = 1.0
    if is_input:
        return place_SN, change_SD.t().contiguous()
    return change_SD.contiguous(), place_SN.t().contiguous()


def _weight(base_dir: Path, spec: ArchSpec, entry: SliceEntry) -> Tensor:
    names = spec.stored_names(entry.layer, entry.projection)
    for file in weight_files(base_dir):
        with safe_open(file, framework="pt") as source:
            if stored := next((name for name in names if name in source.keys()), None):  # noqa: SIM118 - not a mapping
                weight: Tensor = source.get_tensor(stored)
                return weight
    raise ModelError(f"The files of {base_dir.name!r} lack the weight {names[0]!r}.")
