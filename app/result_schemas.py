"""The wire of results: head maps and selections that are asked for alone, and how they are shown. Shapes and types only, as
app.schemas.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, create_model

from app.schemas import (
    MAX_METADATA,
    Body,
    DataBody,
    HeadsBody,
    JobBody,
    Priority,
    Sha256,
    Text,
    TrainingBody,
    Ttl,
    Webhooks,
)
from app.views import TurnView, View
from p2d.config import Projection

Format = Literal["merged", "peft"]
"""Forms that a head adapter can be brought into."""

# --- asked for --------------------------------------------------------------------------------------------------------


def _without(of: type[Body], name: str, text: str, *left_out: str, **changed: type[Body]) -> type[Body]:
    """The same body without some fields, so that each field is described once; `changed` are parts that lack some too."""
    fields: dict[str, Any] = {
        field: (info.annotation, info) for field, info in of.model_fields.items() if field not in (*left_out, *changed)
    }
    fields |= {field: (part, part()) for field, part in changed.items()}
    return create_model(name, __base__=Body, __doc__=text, __module__=__name__, **fields)


_ScoringBody = _without(
    TrainingBody, "ScoringBody", "How the model is run, and the proxy trained.", "rank", "epochs", "learning_rate"
)

HeadMapBody = _without(
    JobBody,
    "HeadMapBody",
    "What `POST /head-maps` takes: a job's body without what only later stages need.",
    *("kind", "data", "controls"),
    heads=_without(HeadsBody, "HeadMapHeadsBody", "How heads are scored.", "ratio", "head_map"),
    training=_ScoringBody,
)

SelectionBody = _without(
    JobBody,
    "SelectionBody",
    "What `POST /selections` takes: a job's body without what only training needs.",
    *("kind", "controls"),
    data=_without(DataBody, "SelectionDataBody", "How rows are scored, and how many are kept.", "selection"),
    training=_ScoringBody,
)


class ArtifactPatch(Body):
    """What `PATCH /artifacts/{id}` takes."""

    artifact_ttl: Ttl | None = Field(
        default=None, description="Seconds from now on; null keeps the file as long as its job; absent changes nothing."
    )


class MergeBody(Body):
    """What `POST /artifacts/{id}/merge` takes."""

    formats: list[Format] = Field(
        default=["merged"],
        min_length=1,
        max_length=2,
        description="`merged` = a full model: the base with the adapter in its weights. `peft` = a LoRA of the base.",
    )
    name: Annotated[Text, Field(max_length=200)] = Field(default="", description="A name of your own.")
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] = Field(
        default={}, max_length=MAX_METADATA, description="Pairs of text of your own."
    )
    priority: Priority = Field(default=0, description="As a job's.")
    artifact_ttl: Ttl | None = Field(default=None, description="As a job's.")
    webhooks: Webhooks = Field(default=[], description="As a job's.")


Score = Annotated[float, Field(allow_inf_nan=False)]
Layers = Annotated[list[list[Score]], Field(description="[layer][head]")]


class _Reproducibility(Body):
    rank_correlation: Score
    top_k_overlap: int = Field(ge=0)
    k: int = Field(ge=1)
    chance: Score


class _ProxyFacts(Body):
    rows_per_half: int = Field(ge=0)
    steps_per_half: int = Field(ge=0)
    learning_rate: Score
    guide_rows: int = Field(ge=0)
    guide_loss_before: Score
    guide_loss_after: list[Score] = Field(max_length=2)
    tokens: int = Field(ge=0)
    explained_decrease: list[Score] = Field(max_length=2)


class HeadMapFile(Body):
    """The file head_map.json, as `p2d.head_maps` writes it."""

    format: Literal[1]
    scores: Layers
    scorer: str = Field(pattern="^[a-z0-9_]{1,64}$")
    projections: list[Projection] = Field(max_length=4)
    model_name: Annotated[Text, Field(max_length=128)]
    model_digest: Sha256
    dataset_hash: Sha256
    seed: int
    precision: str = Field(pattern="^[a-z0-9]{1,16}$")
    reproducibility: _Reproducibility
    halves: list[Layers] = Field(default=[], max_length=2)
    proxy: _ProxyFacts | None


# --- shown ------------------------------------------------------------------------------------------------------------


class HeadMapSummary(View):
    """A head map in a list."""

    id: str
    job_id: str | None = Field(description="The job that made it; null where it was imported.")
    artifact_id: str | None = Field(description="The job's file; null where it was imported.")
    base_model: str
    model_digest: str
    dataset_id: str | None = Field(description="Null where it was imported: its file knows the rows by their hash.")
    scorer: str
    created_at: datetime


class HeadMapView(HeadMapSummary):
    """A head map: a score for every head, the recipe that made it and how reproducible it is."""

    map: dict[str, JsonValue] = Field(description="The file `head_map.json`.")


class LayerDiffView(View):
    """One layer of two head maps."""

    layer: int
    rank_correlation: float = Field(description="Spearman's; 0 where one map gives all heads the same score.")
    kept_one: int = Field(description="Heads of the layer that the first map keeps.")
    kept_other: int
    kept_both: int


class HeadMapDiffView(View):
    """Two head maps side by side: by rank, and by the heads that a ratio keeps. Scores have units of their own."""

    head_map: str
    with_head_map: str
    same_model: bool = Field(description="Whether both are of the very same weights.")
    rank_correlation: float = Field(description="Spearman's, over all heads.")
    ratio: float
    k: int = Field(description="Heads that the ratio keeps of each.")
    overlap: int = Field(description="Heads that both keep.")
    chance: float = Field(description="Overlap expected of two random draws of k heads.")
    p_value: float = Field(description="Probability that two random draws share as many, or more.")
    jaccard: float
    layers: list[LayerDiffView]
    only_one: list[tuple[int, int]] = Field(description="[layer, head] that the first map alone keeps, its best first.")
    only_other: list[tuple[int, int]]


class SelectionView(View):
    """A selection: a score for every row of a dataset."""

    id: str
    job_id: str
    artifact_id: str
    base_model: str
    model_digest: str
    dataset_id: str
    validation_dataset_id: str | None
    scorer: str
    rows: int
    kept: int = Field(description="Rows that are kept, by the selection itself or at the ratio that was asked for.")
    ratio: float | None = Field(default=None, description="The ratio that was asked for.")
    created_at: datetime


class PlacedRowView(View):
    """A row of a selection by its place in the ranking."""

    row: int = Field(description="0-based, of the rows that were left for training.")
    line: int = Field(description="Line of the user's file.")
    score: float | None = Field(description="Null where the row was neither scored nor vouched for by a sample.")
    quality: float | None = Field(description="Null where the row was not scored, or the scorer has none.")
    rank: int = Field(description="0 = best; last come rows that repeat a better one, then those that were not scored.")
    repeats: int | None = Field(
        description="The better-scored row that it nearly repeats, and so ranks behind all that repeat none."
    )
    kept: bool


class HeadResponseView(View):
    """One chosen head's response to a row."""

    layer: int
    head: int
    response: float


class GuideScaleView(View):
    """What the held-out rows that guide the choice have, with the chosen heads."""

    response_median: float
    response_spread: float
    quality_median: float
    quality_spread: float
    bar: float = Field(description="Score from which on a row is as good as most of them, and chance decides.")


class RowReasonView(PlacedRowView):
    """Why a row was kept or dropped: what its score is made of, and its neighbours in the ranking."""

    prompt: str | None = Field(description="Null where the job's rows are gone.")
    answer: str | None
    before: list[TurnView] = Field(default=[], description="Of a conversation the turns before the prompt.")
    formula: str | None = Field(
        description="How the score is made of the figures below, or why the row has none of them."
    )
    drawn: bool = Field(
        description="Whether the row is good enough, or all rows of its part are, so that chance decided."
    )
    response: float | None = Field(description="Sum of `heads`, and of `stand_in` for each of `stand_ins`.")
    heads: list[HeadResponseView] = Field(description="The chosen heads that were scored, best head first.")
    stand_ins: int = Field(description="Chosen heads in layers that were not scored.")
    stand_in: float = Field(description="What stands in for each of them: the mean of all scored heads.")
    scored: int = Field(description="Rows of the selection that have a score.")
    guide: GuideScaleView | None = Field(
        description="What response and quality are measured by, where the scorer does so."
    )
    response_rank: int | None = Field(description="0 = best; where the score is made of ranks.")
    quality_rank: int | None
    border: float | None = Field(description="Score of the last row that is kept.")
    nearest_kept: PlacedRowView | None = Field(description="In rank, the row itself left out.")
    nearest_dropped: PlacedRowView | None
    not_known: list[str] = Field(
        description="Files that were deleted or have expired, without which the score has no parts."
    )


BODIES: tuple[type[BaseModel], ...] = (HeadMapBody, SelectionBody, ArtifactPatch, MergeBody)
"""What /openapi.json must know beyond the routes' types."""
