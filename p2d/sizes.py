"""How many bytes the files of a job take, from the config and the model's shape alone. No torch here.

safetensors writes 8 bytes of length, a header of JSON padded to 8, then the tensors' bytes, so a size is exact where the shapes
are known. Which heads will be chosen is not known: heads of one KV group share its k and v slices, so an adapter has a least
and a most. They are equal, but for the header, where only q and o are sliced, and equal altogether where every head is chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2d.arch.spec import every_head, heads_per_group, units_of
from p2d.config import (
    FEWEST_LEFT,
    LEXICAL,
    LOOK_APART,
    UNIFORM,
    JobConfig,
    alignment_layers,
    heads_ratio,
    look_count,
    pool_count,
    rates_guide,
    samples_first,
    top_count,
)
from p2d.flops import LORA_RANK, lora_parameters
from p2d.model_info import ModelInfo
from p2d.pipeline import shard_range

NUMBERS = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}
"""Bytes of a number by safetensors' name of its type; files hold the last type here first, then go by name."""

Tensor = tuple[str, str, Sequence[int]]
"""Name, type and shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of a file, or of several."""

    least: int
    most: int


def safetensors_bytes(tensors: Iterable[Tensor], metadata: dict[str, str]) -> int:
    """Size of a safetensors file."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    types = list(NUMBERS)
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-types.index(tensor[1]), tensor[0])):
        start, end = end, end + NUMBERS[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def adapter_size(info: ModelInfo, config: JobConfig, *, wide: bool) -> Size:
    """heads.safetensors: the slices of the chosen heads in the type that they are trained in (`wide` = fp32), rank or not.

    At the least the heads fill whole KV groups of few layers, at the most each has a layer, then a group, of its own.
    """
    heads = every_head(info)
    count, share = top_count(heads_ratio(config.heads), len(heads)), heads_per_group(info)
    spread = sorted(heads, key=lambda at: (at[1] // share + at[1] % share * info.n_kv_groups, -at[0]))
    # Headers name shapes and offsets: a digit more or less for each.
    tensors = min(count, info.n_layers) * len(config.training.slices)
    dust = 0 if count == len(heads) else 8 + 4 * tensors
    return Size(
        least=adapter_bytes(info, heads[:count], config, wide=wide) - dust,
        most=adapter_bytes(info, spread[:count], config, wide=wide) + dust,
    )


def adapter_bytes(info: ModelInfo, heads: Sequence[tuple[int, int]], config: JobConfig, *, wide: bool) -> int:
    """heads.safetensors for these heads, to the byte."""
    slices, dtype = config.training.slices, "F32" if wide else "BF16"
    assert slices != "auto", "resolve the config first"
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    tensors = [
        (f"layers.{layer}.{name}", dtype, (len(units_of(info, name, own)), info.head_dim, info.hidden_size))
        for layer, own in by_layer.items()
        for name in slices
    ]
    return safetensors_bytes(tensors, {"format": "p2d-heads"})


def response_size(info: ModelInfo, config: JobConfig, *, rows: int, guide: int, shards: int) -> Size:
    """All responses-*.safetensors over `rows` training rows; in fast mode a shard has more or fewer of the pool's rows.

    Where the guide decides how many are kept, a shard has a sample of its rows at the least.
    """
    scorer, fast = config.data.scorer, config.data.mode == "fast"
    layers = range(info.n_layers)
    if scorer.startswith("alignment"):
        layers = alignment_layers(info.n_layers)
    if scorer in ("information", LEXICAL, UNIFORM):
        layers = range(0)
    alone = {"information": "quality", LEXICAL: "pass", UNIFORM: "quality"}
    combine = (alone | {"icl": "response" if fast else "product"}).get(scorer, "response")
    if scorer in ("alignment_information", "alignment_likelihood"):
        combine = "worse_rank"
    if rated := rates_guide(scorer, guide):
        combine = "guide"
    pool = pool_count(config.data, rows)

    def of_shard(span: range, scored: int, *, rest_like_guide: bool, unlike: int = 0) -> int:
        tensors: list[Tensor] = [("response", "F16", (scored, len(layers) * info.n_heads)), ("rows", "I64", (scored,))]
        if combine != "response":
            tensors.append(("quality", "F32", (scored,)))
        if rated:
            tensors += [
                ("guide_response", "F16", (guide, len(layers) * info.n_heads)),
                ("guide_quality", "F32", (guide,)),
            ]
        if unlike:
            tensors.append(("unlike", "I64", (unlike,)))
        facts = {
            "span": [span.start, span.stop],
            "layers": [layers.start, layers.stop],
            "scorer": scorer,
            "combine": combine,
            "n_heads": info.n_heads,
            "rest_like_guide": rest_like_guide,
        }
        return safetensors_bytes(tensors, {"facts": json.dumps(facts)})

    least = most = 0
    for shard in range(shards):
        span = shard_range(rows, shard, shards)
        scored = len(span) if pool == rows else pool * (shard + 1) // shards - pool * shard // shards
        every = of_shard(span, scored, rest_like_guide=False)
        looked_at = look_count(scored) if samples_first(config) else scored
        if looked_at == scored:
            least, most = least + every, most + every
            continue
        # Where few rows read like the guide the sample is smaller, and where many do not it is larger.
        least += of_shard(span, min(looked_at, FEWEST_LEFT + LOOK_APART), rest_like_guide=True)
        most += max(every, of_shard(span, looked_at + LOOK_APART, rest_like_guide=True, unlike=scored))
    # Headers name offsets: a digit more or less.
    dust = 64 * shards if pool < rows else 0
    return Size(least=least - dust, most=most + dust)


def full_model_bytes(info: ModelInfo) -> int:
    """The weights of a model that was trained as a whole, in the type of its files, header left out."""
    return info.parameters * (4 if info.dtype == "fp32" else 2)


def lora_bytes(info: ModelInfo, *, wide: bool) -> int:
    """LoRA's factors on all linear layers in the type that they are trained in, header left out. See `p2d.flops.LORA_RANK`."""
    return info.n_layers * lora_parameters(info, rank=LORA_RANK) * (4 if wide else 2)
