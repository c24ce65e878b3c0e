"""The wire of results: head maps and selections that are asked for alone, and how they are shown. Shapes and types only, as
app.schemas.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, create_model

from app.schemas import Body, HeadsBody, JobBody, Sha256, Text, TrainingBody
from app.views import View
from p2d.config import Projection

# --- asked for --------------------------------------------------------------------------------------------------------


def _without(of: type[Body], name: str, text: str, *left_out: str, **changed: type[Body]) -> type[Body]:
    """The same body without some fields, so that each field is described once; `changed` are parts that lack some too."""
    fields: dict[str, Any] = {
        field: (info.annotation, info) for field, info in of.model_fields.items() if field not in (*left_out, *changed)
    }
    fields |= {field: (part, part()) for field, part in changed.items()}
    return create_model(name, __base__=Body, __doc__=text, __module__=__name__, **fields)


HeadMapBody = _without(
    JobBody,
    "HeadMapBody",
    "What `POST /head-maps` takes: a job's body without what only later stages need.",
    *("kind", "data", "controls"),
    heads=_without(HeadsBody, "HeadMapHeadsBody", "How heads are scored.", "ratio", "head_map"),
    training=_without(
        TrainingBody, "HeadMapTrainingBody", "How the proxy is trained.", "rank", "epochs", "learning_rate"
    ),
)

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


BODIES: tuple[type[BaseModel], ...] = (HeadMapBody,)
"""What /openapi.json must know beyond the routes' types."""
