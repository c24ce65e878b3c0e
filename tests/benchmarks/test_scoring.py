"""The study of scorers: every form with every guide is judged, and a score that knows the truth is seen to know it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import scoring
from benchmarks.quality.pools import PoolSpec, Task, build
from benchmarks.scoring import GUIDES, POOL, Products, Study, auc, forms, guide_parts, page
from p2d.config import DataConfig, JobConfig
from p2d.models import load_base_model
from p2d.responses import ResponseInput
from p2d.responses.alignment import align
from tests.factories import some_rows, tiny_model_dir


def test_an_auroc_is_one_for_groups_apart_a_half_for_equal_ones_and_counts_ties_half() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5
    assert auc(np.array([0.0]), np.array([0.0, 0.0])) == 0.5
    assert auc(np.array([0.0]), np.array([1.0])) == 0.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = load_base_model(tiny_model_dir(tmp_path_factory.mktemp("model"), n_layers=6), precision="fp32", device="cpu")
    task = Task("gsm8k", tuple(some_rows(24)), tuple(some_rows(192, first=100)), ())
    other = Task("dialogsum", tuple(some_rows(8, first=70)), (), ())
    pool = build(PoolSpec("gsm8k", 16, ("another's answer", "off task"), 0.5), task, other)
    return Study(base, pool, task, lambda line: None)


def test_every_form_is_judged_with_every_guide(study: Study) -> None:
    found = study.findings()
    n_forms = len(forms(study.base.info.n_layers))
    assert len(found) == 1 + (len(GUIDES) + 1) * (2 * n_forms + 2)
    assert all(set(one.auroc) == {"another's answer", "off task", "all"} for one in found)
    assert all(0 <= value <= 1 for one in found for value in [*one.auroc.values(), one.bad_kept])
    assert all(one.share > 0 for one in found)
    text = page(found, {"Model": "tiny"})
    assert f"## gsm8k, guided by {POOL}" in text
    assert json.dumps([one.auroc for one in found])


def test_a_score_is_the_mean_of_the_cosines_that_the_product_takes(study: Study) -> None:
    base, rows, guide = study.base, study.pool.rows, study.task.validation[:4]
    form = forms(base.info.n_layers)[2]
    given = ResponseInput(
        base=base,
        rows=rows,
        guide=guide,
        span=range(len(rows)),
        slices=form.projections,
        config=JobConfig(data=DataConfig(mode="faithful")),
    )
    found = align(given, form.layers, form.projections)

    said = study.guide([base.renderer.render(row) for row in guide])
    products = Products(base, {"guide": said.mean}, len(rows))
    likelihood_R = study.passed(study.rendered, products.of_rows, "products")

    np.testing.assert_allclose(products.cosine("guide", form), found.cosine_RN.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(likelihood_R, found.likelihood_R, rtol=1e-5)
    np.testing.assert_allclose(said.likelihood_G, found.guide_likelihood_G, rtol=1e-5)


def test_a_guide_of_parts_is_the_guide_of_their_rows(study: Study) -> None:
    parts = study.parts()
    rows = [row for part in GUIDES["32 rows, half bad"] for row in parts[part]]
    assert len(rows) == 32
    whole = study.guide(rows)
    summed = scoring.added([study.guide(parts[part]) for part in GUIDES["32 rows, half bad"]])
    np.testing.assert_allclose(summed.likelihood_G, whole.likelihood_G, rtol=1e-5)
    for place, gradient in whole.mean.items():
        torch.testing.assert_close(summed.mean[place], gradient, rtol=1e-3, atol=1e-4)
    clean = {row.prompt: row.answer for row in study.task.validation}
    bad = guide_parts(study.task)["bad 64"]
    assert len(bad) == 48
    assert all(clean[row.prompt] != row.answer for row in bad)
