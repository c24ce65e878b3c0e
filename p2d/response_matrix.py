"""The response matrix: how strongly each head responds to each row, kept in shards by row range. numpy, no torch.

Data scorers make shards and `p2d.selection` does arithmetic on them; they meet here and in files, nowhere else.

Legend: R row, N head counted through the layers (`layer * n_heads + head`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

Combine = Literal["response", "product", "rank"]
"""How a row's score is made: `response` = of the heads alone, `product` = response x quality (quality > 0),
`rank` = mean of the two ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseShard:
    """Responses of all heads to a contiguous range of rows. A pure function of the range, the dataset and the config."""

    start: int
    response_RN: npt.NDArray[np.float16]
    quality_R: npt.NDArray[np.float32] | None = None
    scorer: str
    combine: Combine
    n_heads: int
    """Heads per layer."""

    def __post_init__(self) -> None:
        assert self.response_RN.dtype == np.float16
        assert (self.quality_R is None) == (self.combine == "response")

    @property
    def rows(self) -> range:
        return range(self.start, self.start + len(self.response_RN))


def save_shard(path: Path, shard: ResponseShard) -> None:
    """Write one shard as safetensors."""
    tensors: dict[str, npt.NDArray[np.generic]] = {"response": np.ascontiguousarray(shard.response_RN)}
    if shard.quality_R is not None:
        tensors["quality"] = np.ascontiguousarray(shard.quality_R, dtype=np.float32)
    facts = {"start": shard.start, "scorer": shard.scorer, "combine": shard.combine, "n_heads": shard.n_heads}
    # One entry alone: safetensors writes several in random order, and equal shards must be equal files.
    save_file(tensors, str(path), metadata={"facts": json.dumps(facts)})


def load_shard(path: Path) -> ResponseShard:
    """Read what `save_shard` wrote."""
    with safe_open(str(path), framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        names = set(file.keys())
        return ResponseShard(
            start=facts["start"],
            response_RN=file.get_tensor("response"),
            quality_R=file.get_tensor("quality") if "quality" in names else None,
            scorer=facts["scorer"],
            combine=facts["combine"],
            n_heads=facts["n_heads"],
        )


def load_shards(paths: Sequence[Path]) -> list[ResponseShard]:
    """Read all shards of one matrix, in row order. A gap or overlap between them is our own mistake."""
    shards = sorted((load_shard(path) for path in paths), key=lambda shard: shard.start)
    expected = 0
    for shard in shards:
        assert shard.start == expected, f"shard starts at row {shard.start}, expected {expected}"
        assert (shard.scorer, shard.combine) == (shards[0].scorer, shards[0].combine)
        expected += len(shard.rows)
    return shards
