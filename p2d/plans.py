"""plan.json: what `validate` decided and every later step obeys; and how held-out rows are set apart. No torch here.

Three disjoint sets of rows: train; guide (scoring heads, aligning rows, searching the learning rate); evaluation (only
the final numbers). Nothing is ever chosen by the rows that the result is judged on.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2d.config import JobConfig, config_from_json
from p2d.errors import DatasetTooSmall, ErrorDetail
from p2d.files import read_json, write_json
from p2d.model_info import ModelInfo
from p2d.resolution import settled
from p2d.row_files import RowView
from p2d.row_keys import RowKeys
from p2d.rows import Row
from p2d.wording import counted

GUIDE_ROWS = 32
"""Most guide rows: 32 gave the alignment scorer AUROC 0.91 (docs/LOG.md)."""

HELD_OUT_ROWS = 80
"""Most rows held out of a dataset that came without a validation dataset; at most a fifth of it. A guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Size of one set of rows, in rows and tokens (each row with its prefix)."""

    rows: int
    tokens: int
    answer_tokens: int
    longest: int
    """Tokens of the longest row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A job after validation."""

    config: JobConfig
    """Without the `"auto"`s that rows and model decide."""
    reasons: dict[str, str]
    warnings: list[str]
    model: ModelInfo
    train: RowCounts
    guide: RowCounts
    evaluation: RowCounts
    content_hash: str
    """Of the training rows."""
    device: str
    dtype: str
    estimate_s: dict[str, float]
    """Seconds of each step, before it ran."""
    guide_apart: bool = False
    """Whether guide and evaluation are of a validation dataset, not held out of the training rows' own; not in older plans."""

    def settled(self, *, kept: int | None = None, learning_rate: float | None = None) -> Plan:
        """The plan with what the run has found since (`p2d.resolution.settled`)."""
        config, reasons = settled(
            self.config, self.reasons, kept=kept, rows=self.train.rows, learning_rate=learning_rate
        )
        return replace(self, config=config, reasons=reasons)


def save_plan(path: Path, plan: Plan) -> None:
    """Write plan.json."""
    write_json(path, plan)


def load_plan(path: Path) -> Plan:
    """Read what `save_plan` wrote."""
    data: dict[str, Any] = read_json(path)
    return Plan(
        **{
            **data,
            "config": config_from_json(data["config"]),
            "model": ModelInfo(**data["model"]),
            "train": RowCounts(**data["train"]),
            "guide": RowCounts(**data["guide"]),
            "evaluation": RowCounts(**data["evaluation"]),
        }
    )


@dataclass(frozen=True, slots=True)
class Split:
    """The three disjoint sets, each in the order of the user's file: views, in which no row is held."""

    train: Sequence[Row]
    guide: Sequence[Row]
    evaluation: Sequence[Row]


def held_out_count(rows: int, validation: int | None, *, proxy_rows: int) -> int:
    """How many rows are held out; known before any row is read, so a job that cannot work is refused when it is sent.

    Args:   rows, validation: of the two datasets. proxy_rows: the fewest that will do (`p2d.config.least_proxy_rows`).
    Raises: DatasetTooSmall, see `split_rows`.
    """
    held = min(HELD_OUT_ROWS, rows // 5) if validation is None else validation
    train = rows if validation is not None else rows - held
    if train < proxy_rows:
        left = counted(train, "row", "rows")
        text = f"The dataset leaves {left} for training; the proxy needs at least {proxy_rows}."
        detail = ErrorDetail(code=DatasetTooSmall.code, message=text, pointer="/heads/proxy_rows")
        raise DatasetTooSmall(text, errors=[detail], rows=train, needed=proxy_rows)
    if held < 3:
        text = f"Only {counted(held, 'row is', 'rows are')} held out; at least 3 are needed."
        pointer = "/dataset" if validation is None else "/validation_dataset"
        detail = ErrorDetail(code=DatasetTooSmall.code, message=text, pointer=pointer)
        raise DatasetTooSmall(text, errors=[detail], rows=held, needed=3)
    return held


def guide_count(held_out: int) -> int:
    """How many of the held-out rows guide; the others judge."""
    return min(GUIDE_ROWS, 2 * held_out // 5)


def split_rows(rows: Sequence[Row], validation: Sequence[Row] | None, *, seed: int, proxy_rows: int) -> Split:
    """Set held-out rows apart: of the validation dataset where there is one, else of the dataset itself.

    Raises: DatasetTooSmall (`dataset.too_small`) if fewer than `proxy_rows` training rows are left, or fewer than three
            rows are held out (one to guide, two to judge).
    """
    rng = random.Random(seed)  # noqa: S311 - not a secret
    count = held_out_count(len(rows), None if validation is None else len(validation), proxy_rows=proxy_rows)
    train, held = rows, validation
    if held is None:
        chosen = set(rng.sample(range(len(rows)), count))
        train = RowView(rows, array("q", (index for index in range(len(rows)) if index not in chosen)))
        held = RowView(rows, sorted(chosen))
    guides = set(rng.sample(range(len(held)), guide_count(len(held))))
    judging = array("q", (index for index in range(len(held)) if index not in guides))
    return Split(train, RowView(held, sorted(guides)), RowView(held, judging))


def leaked(split: Split) -> int:
    """How many held-out rows stand in the training rows too, word for word."""
    seen = RowKeys()
    for row in split.train:
        seen.add(row)
    return sum(row in seen for rows in (split.guide, split.evaluation) for row in rows)
