"""The response matrix: how strongly heads respond to rows, kept in shards by row range. numpy, no torch.

Data scorers make shards and `p2d.selection` does arithmetic on them; they meet here and in files, nowhere else. A matrix
grows by another shard; none is ever rewritten. Files are mapped into memory, one shard at a time.

Legend: R scored row, G guide row, N head counted through the scored layers (`(layer - layers.start) * n_heads + head`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

Combine = Literal["response", "product", "guide", "worse_rank", "rank", "quality", "pass"]
"""How a row's score is made: `response` = of the heads alone, `product` = response x quality (quality >= 0),
`guide` = by the lesser of the two, each measured by what the guide's rows have, and by chance among rows as good as those,
`worse_rank` = by the worse of the two ranks, `rank` = mean of the two ranks, which older selections have, `quality` = of the row
alone, whatever the heads, `pass` = likewise, PASSED or 0, and by chance among equals."""

ALONE: frozenset[Combine] = frozenset({"quality", "pass"})
"""Those that look at no head."""

PASSED = 1.0
"""Quality of a row that passes."""

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation -> standard deviation, for a normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseShard:
    """Responses of heads to the rows of a contiguous range. A pure function of the range, the dataset and the config."""

    span: range
    """The rows that the shard answers for."""
    row_R: npt.NDArray[np.int64]
    """Those of them that were scored, ascending: all, or in fast mode the ones in the pool."""
    layers: range
    """Layers whose heads were scored; empty for `quality` and `pass`."""
    n_heads: int
    """Heads per layer."""
    response_RN: npt.NDArray[np.float16]
    quality_R: npt.NDArray[np.float32] | None = None
    guide_response_GN: npt.NDArray[np.float16] | None = None
    """What the guide's rows would be given, each by the others; the same in every shard."""
    guide_quality_G: npt.NDArray[np.float32] | None = None
    scorer: str
    combine: Combine
    rest_like_guide: bool = False
    """Whether the rows of the span that were not scored are taken to be like the guide's, as a random sample of them was."""
    unlike_R: npt.NDArray[np.int64] | None = None
    """Then the rows for which that does not hold, ascending: they do not read like the guide's (`p2d.guide_words`). None where
    nobody looked."""

    def __post_init__(self) -> None:
        assert self.response_RN.dtype == np.float16
        assert self.response_RN.shape == (len(self.row_R), len(self.layers) * self.n_heads)
        assert (self.quality_R is None) == (self.combine == "response")
        assert (self.guide_response_GN is None) == (self.guide_quality_G is None) == (self.combine != "guide")
        assert (len(self.layers) == 0) == (self.combine in ALONE)
        assert self.unlike_R is None or self.rest_like_guide

    @property
    def trusted_R(self) -> npt.NDArray[np.int64]:
        """The rows that were not scored and that a sample vouches for, ascending."""
        if not self.rest_like_guide:
            return self.row_R[:0]
        others = self.row_R if self.unlike_R is None else np.union1d(self.row_R, self.unlike_R)
        return np.setdiff1d(np.arange(self.span.start, self.span.stop), others)

    @property
    def sample_R(self) -> npt.NDArray[np.bool_]:
        """Whether each scored row is of that sample."""
        if self.unlike_R is None:
            return np.full(len(self.row_R), self.rest_like_guide)
        return ~np.isin(self.row_R, self.unlike_R)


def median_and_spread(value_G: npt.NDArray[np.float64]) -> tuple[float, float]:
    """What values of guide rows say: their median, and their median absolute deviation as a standard deviation.

    Both hold although almost half of the values be anything.
    """
    median = float(np.median(value_G))
    return median, MAD_TO_SIGMA * float(np.median(np.abs(value_G - median)))


def save_shard(path: Path, shard: ResponseShard) -> None:
    """Write one shard as safetensors."""
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "response": np.ascontiguousarray(shard.response_RN),
        "rows": np.ascontiguousarray(shard.row_R, dtype=np.int64),
    }
    if shard.quality_R is not None:
        tensors["quality"] = np.ascontiguousarray(shard.quality_R, dtype=np.float32)
    if shard.guide_response_GN is not None and shard.guide_quality_G is not None:
        tensors["guide_response"] = np.ascontiguousarray(shard.guide_response_GN)
        tensors["guide_quality"] = np.ascontiguousarray(shard.guide_quality_G, dtype=np.float32)
    if shard.unlike_R is not None:
        tensors["unlike"] = np.ascontiguousarray(shard.unlike_R, dtype=np.int64)
    facts = {
        "span": [shard.span.start, shard.span.stop],
        "layers": [shard.layers.start, shard.layers.stop],
        "scorer": shard.scorer,
        "combine": shard.combine,
        "n_heads": shard.n_heads,
        "rest_like_guide": shard.rest_like_guide,
    }
    # One entry alone: safetensors writes several in random order, and equal shards must be equal files.
    save_file(tensors, str(path), metadata={"facts": json.dumps(facts)})


def load_shard(path: Path) -> ResponseShard:
    """Open what `save_shard` wrote; responses stay in the file, mapped, and are read where they are looked at."""
    with safe_open(str(path), framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        names = set(file.keys())
        return ResponseShard(
            span=range(*facts["span"]),
            row_R=file.get_tensor("rows"),
            layers=range(*facts["layers"]),
            n_heads=facts["n_heads"],
            response_RN=_map_responses(path),
            quality_R=file.get_tensor("quality") if "quality" in names else None,
            guide_response_GN=file.get_tensor("guide_response") if "guide_response" in names else None,
            guide_quality_G=file.get_tensor("guide_quality") if "guide_quality" in names else None,
            scorer=facts["scorer"],
            combine=facts["combine"],
            rest_like_guide=facts.get("rest_like_guide", False),  # not in older shards
            unlike_R=file.get_tensor("unlike") if "unlike" in names else None,
        )


def _map_responses(path: Path) -> npt.NDArray[np.float16]:
    # The safetensors library maps the file, yet copies every tensor that it hands out.
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))["response"]
    start, stop = entry["data_offsets"]
    if start == stop:  # no head was scored, and nothing cannot be mapped
        return np.zeros(entry["shape"], dtype=np.float16)
    return np.memmap(path, dtype=np.float16, mode="r", offset=8 + header_bytes + start, shape=tuple(entry["shape"]))


def read_shards(paths: Sequence[Path]) -> Iterator[ResponseShard]:
    """The shards of one matrix in row order, one in memory at a time. A gap or overlap is our own mistake."""
    expected = 0
    for path in sorted(paths, key=_start):
        shard = load_shard(path)
        assert shard.span.start == expected, f"shard starts at row {shard.span.start}, expected {expected}"
        expected = shard.span.stop
        yield shard


def _start(path: Path) -> int:
    with safe_open(str(path), framework="numpy") as file:
        return int(json.loads(file.metadata()["facts"])["span"][0])
