"""Head adapters: trained slices on disk as `heads.safetensors` + `manifest.json`; apply, revert, merge.

The file holds the slices' values, not differences: applying is a copy, so base + adapter is the trained model bit for bit
where the base is loaded in the adapter's type. Training is `p2d.training`.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2d import __version__
from p2d.arch import ARCHS
from p2d.arch.spec import ArchSpec, unit_view, units_of
from p2d.config import JobConfig, Projection, rank_of
from p2d.errors import AdapterMismatch, ModelError
from p2d.files import read_json, sha256_of, write_json
from p2d.model_info import DIGEST_CACHE, ModelInfo, more_templates, read_model_info, weight_files
from p2d.models import BaseModel
from p2d.pipeline import EXPORTS
from p2d.registry import load
from p2d.slices import Head, slice_key

WEIGHTS, MANIFEST = "heads.safetensors", "manifest.json"
FORMAT = 2
"""Of the manifest; a reader refuses other numbers. 1 held weights as two-dimensional rows or columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceEntry:
    """One tensor of heads.safetensors."""

    layer: int
    projection: Projection
    units: tuple[int, ...]
    """Query heads (q, o) or KV groups (k, v), in the tensor's order."""
    shape: tuple[int, ...]
    """[unit, head width, model width], whatever the family's own layout (`p2d.arch.spec.unit_view`)."""

    @property
    def key(self) -> str:
        """Name of the tensor."""
        return slice_key(self.layer, self.projection)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an adapter is and which base it belongs to."""

    base_model: str
    base_digest: str
    model_type: str
    heads: tuple[Head, ...]
    projections: tuple[Projection, ...]
    slices: tuple[SliceEntry, ...]
    parameters: int
    """Trained numbers: the weights, or with a rank their factors."""
    dtype: str
    """Of the tensors: fp32 or bf16."""
    sha256: str
    """Of heads.safetensors."""
    learning_rate: float
    config: Mapping[str, Any]
    """The resolved job config, as JSON."""
    p2d_version: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded head adapter."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]

    def apply(self, base: BaseModel) -> Mapping[str, Tensor]:
        """Copy the trained slices into the base's weights and return what stood there, for `revert`.

        Raises: AdapterMismatch (`adapter.base_mismatch`) if the base is another model, before anything is changed.
        """
        if base.info.digest != self.manifest.base_digest:
            raise AdapterMismatch(
                f"The adapter was trained on {self.manifest.base_model!r} (digest {self.manifest.base_digest[:12]}), "
                f"not on {base.info.name!r} (digest {base.info.digest[:12]}).",
                expected=self.manifest.base_digest,
                found=base.info.digest,
            )
        previous = {
            entry.key: base.units(entry.layer, entry.projection)[list(entry.units)] for entry in self.manifest.slices
        }
        _write(base, self.manifest.slices, self.tensors)
        return previous

    def revert(self, base: BaseModel, previous: Mapping[str, Tensor]) -> None:
        """Put back what `apply` returned: the base is then bit for bit as before."""
        _write(base, self.manifest.slices, previous)


def save_adapter(
    directory: Path,
    *,
    base: BaseModel,
    heads: Sequence[Head],
    projections: Sequence[Projection],
    state: Mapping[str, Tensor],
    config: JobConfig,
    learning_rate: float,
) -> Manifest:
    """Write heads.safetensors and manifest.json for the slices in `state` (`HeadSlices.state`)."""
    entries = _entries(base.info, heads, projections)
    tensors = {entry.key: state[entry.key].cpu().contiguous() for entry in entries}
    assert tensors.keys() == state.keys(), "slices of other heads or projections"
    entries = tuple(replace(entry, shape=tuple(tensors[entry.key].shape)) for entry in entries)
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"{WEIGHTS}.part"
    # One metadata entry alone: safetensors writes several in random order, and equal adapters must be equal files.
    save_file(tensors, part, metadata={"format": "p2d-heads"})
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.replace(directory / WEIGHTS)
    manifest = Manifest(
        base_model=base.info.name,
        base_digest=base.info.digest,
        model_type=base.info.model_type,
        heads=tuple(sorted(set(heads))),
        projections=tuple(projections),
        slices=entries,
        parameters=_parameters(base.info, entries, rank_of(config.training)),
        dtype="bf16" if base.dtype == torch.bfloat16 else "fp32",
        sha256=sha256_of(directory / WEIGHTS),
        learning_rate=learning_rate,
        config=asdict(config),
        p2d_version=__version__,
    )
    write_json(directory / MANIFEST, {"format": FORMAT, **asdict(manifest)})
    return manifest


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter. Raises ModelError (`model.invalid`) if a file is missing, broken or does not match its manifest."""
    try:
        manifest = _manifest(read_json(directory / MANIFEST))
        if sha256_of(directory / WEIGHTS) != manifest.sha256:
            raise ValueError(f"{WEIGHTS} is not the file that the manifest names")
        tensors = load_file(directory / WEIGHTS)
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != {e.key: e.shape for e in manifest.slices}:
            raise ValueError("tensors and manifest differ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{directory.name!r} is not a head adapter: {error}") from error
    return Adapter(manifest, tensors)


def open_pair(base_dir: Path, adapter_dir: Path, out: Path) -> tuple[Adapter, ModelInfo, ArchSpec]:
    """An adapter with its base model's description and family, for writing both together to `out`. No weight of the base is read.

    Raises: AdapterMismatch, ModelError; ModelError too if `out` exists.
    """
    adapter, info = load_adapter(adapter_dir), read_model_info(base_dir)
    if info.digest != adapter.manifest.base_digest:
        raise AdapterMismatch(f"The adapter was not trained on {info.name!r}.", expected=adapter.manifest.base_digest)
    if out.exists():
        raise ModelError(f"{out.name!r} exists already.")
    spec: ArchSpec = load(ARCHS, info.model_type, what="model family", pointer="/base_model")
    return adapter, info, spec


def merge(base_dir: Path, adapter_dir: Path, out: Path) -> Path:
    """Write a full model directory with the adapter's values in its weights; every other tensor keeps its bytes.

    Of the base's other files it has those that an export has (`p2d.pipeline.EXPORTS`).

    Values are rounded to the type of the base's files if the adapter was trained in a wider one.
    Raises: AdapterMismatch, ModelError; ModelError too if `out` exists.
    """
    adapter, info, spec = open_pair(base_dir, adapter_dir, out)
    targets: dict[tuple[str, str], list[SliceEntry]] = defaultdict(list)  # several where q, k and v share a weight
    for entry in adapter.manifest.slices:
        targets[spec.stored_names(entry.layer, entry.projection)].append(entry)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _copy_beside_weights(base_dir, part)
    written: set[tuple[str, str]] = set()
    for file in weight_files(base_dir):
        tensors = load_file(file)
        for names, entries in targets.items():
            if (name := next((name for name in names if name in tensors), None)) is None:
                continue
            for entry in entries:
                _put(unit_view(spec, info, entry.projection, tensors[name]), entry, adapter.tensors[entry.key])
            written.add(names)
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
        save_file(tensors, part / file.name, metadata=metadata)
        (part / file.name).chmod(0o644)
    if written != targets.keys():
        raise ModelError(f"The files of {info.name!r} lack the weight {min(targets.keys() - written)[0]!r}.")
    return part.rename(out)


def _copy_beside_weights(base_dir: Path, out: Path) -> None:
    """Config, tokenizer, templates, license and card: what an export of the service has. The base's other forms (PyTorch, ONNX,
    GGUF) hold weights from before the merge."""
    out.mkdir(parents=True)
    names = EXPORTS["merge"].writes + EXPORTS["merge"].optional_writes
    for path in (*base_dir.iterdir(), *more_templates(base_dir)):
        own = path.name == DIGEST_CACHE or path.name.startswith(".") or path.suffix == ".safetensors"
        if path.is_file() and not own and any(fnmatch(path.name, pattern) for pattern in names):
            target = out / path.relative_to(base_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target)


def _entries(info: ModelInfo, heads: Sequence[Head], projections: Sequence[Projection]) -> tuple[SliceEntry, ...]:
    layers = sorted({layer for layer, _ in heads})
    return tuple(
        SliceEntry(layer=layer, projection=projection, units=tuple(units), shape=())
        for layer in layers
        for projection in projections
        for units in [units_of(info, projection, [head for at, head in heads if at == layer])]
    )


def _parameters(info: ModelInfo, entries: Sequence[SliceEntry], rank: int | None) -> int:
    units = sum(len(entry.units) for entry in entries)
    per_unit = info.head_dim * info.hidden_size if rank is None else rank * (info.head_dim + info.hidden_size)
    return units * per_unit


def _write(base: BaseModel, entries: Sequence[SliceEntry], values: Mapping[str, Tensor]) -> None:
    for entry in entries:
        _put(base.units(entry.layer, entry.projection), entry, values[entry.key])


def _put(weight_UED: Tensor, entry: SliceEntry, values_UED: Tensor) -> None:
    """Write an entry's values into the view of its weight, rounded to the weight's type."""
    weight_UED[list(entry.units)] = values_UED.to(weight_UED.device, weight_UED.dtype)


def _manifest(value: dict[str, Any]) -> Manifest:
    if value.pop("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} of {MANIFEST}")
    heads = tuple((int(layer), int(head)) for layer, head in value.pop("heads"))
    slices = tuple(
        SliceEntry(
            layer=entry["layer"],
            projection=entry["projection"],
            units=tuple(entry["units"]),
            shape=tuple(entry["shape"]),
        )
        for entry in value.pop("slices")
    )
    return Manifest(heads=heads, slices=slices, projections=tuple(value.pop("projections")), **value)
