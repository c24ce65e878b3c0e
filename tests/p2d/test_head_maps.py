"""A head map ranks, keeps its facts through a file, and says how reproducible it is."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from p2d.errors import ConfigError, ModelError
from p2d.head_maps import HeadMap, ProxyFacts, check_head_map, overlap, reproducibility, spearman
from p2d.model_info import read_model_info
from tests.factories import tiny_model_dir

SCORES = ((0.5, 0.1, 0.5), (0.9, -0.2, 0.1))


def a_map(scores: tuple[tuple[float, ...], ...] = SCORES) -> HeadMap:
    return HeadMap(
        scores=scores,
        scorer="attribution",
        projections=("v", "o"),
        model_name="tiny",
        model_digest="d",
        dataset_hash="h",
        seed=0,
        precision="fp32",
        reproducibility=reproducibility(scores, scores, ratio=0.5),
        proxy=ProxyFacts(
            rows_per_half=2,
            steps_per_half=1,
            learning_rate=1e-3,
            guide_rows=4,
            guide_loss_before=2.0,
            guide_loss_after=(1.5, 1.25),
            tokens=100,
            explained_decrease=(0.1 + 0.2, 0.7),
        ),
    )


def test_a_ratio_takes_the_best_heads_rounded_up_and_ties_go_by_layer_then_head() -> None:
    assert a_map().ranked() == [(1, 0), (0, 0), (0, 2), (0, 1), (1, 2), (1, 1)]
    assert a_map().top(0.34) == [(1, 0), (0, 0), (0, 2)]
    assert a_map().top(0.01) == [(1, 0)]
    assert len(a_map().top(1.0)) == 6


def test_a_map_comes_back_from_its_file_equal(tmp_path: Path) -> None:
    a_map().save(tmp_path / "head_map.json")

    assert HeadMap.load(tmp_path / "head_map.json") == a_map()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "scores": 3}'])
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "head_map.json").write_text(content)

    with pytest.raises(ModelError):
        HeadMap.load(tmp_path / "head_map.json")


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((*SCORES, SCORES[0]), "2 layers of 3 heads"),
        ((SCORES[0], SCORES[1][:2]), "2 layers of 3 heads"),
        ((SCORES[0], (0.9, float("nan"), 0.1)), "no finite number"),
        ((SCORES[0], (0.9, float("inf"), 0.1)), "no finite number"),
    ],
)
def test_a_given_map_has_a_number_for_every_head_of_the_model(
    tmp_path: Path, scores: tuple[tuple[float, ...], ...], said: str
) -> None:
    info = replace(read_model_info(tiny_model_dir(tmp_path / "tiny")), n_layers=2, n_heads=3, digest="d")
    path = tmp_path / "head_map.json"
    a_map().save(path)
    assert check_head_map(path, info) == a_map()

    for changed in (replace(a_map(), scores=scores), replace(a_map(), halves=(SCORES, scores))):
        path.write_text(json.dumps({**json.loads(path.read_text()), **asdict(changed)}))
        with pytest.raises(ConfigError, match=said):
            check_head_map(path, info)


def test_reproducibility_compares_ranks_and_top_heads_with_chance() -> None:
    other = ((0.5, 0.1, 0.4), (-0.9, 0.2, 0.1))

    found = reproducibility(SCORES, other, ratio=1 / 3)

    assert (found.top_k_overlap, found.k) == (1, 2)
    assert found.chance == pytest.approx(4 / 6)
    assert reproducibility(SCORES, SCORES, ratio=0.5).rank_correlation == pytest.approx(1.0)
    assert overlap([(0, 1), (2, 3)], [(2, 3)]) == 1


def test_a_map_says_how_far_its_halves_agree_at_any_ratio_and_without_them_at_its_own(tmp_path: Path) -> None:
    other = ((0.5, 0.1, 0.4), (-0.9, 0.2, 0.1))
    replace(a_map(), halves=(SCORES, other)).save(tmp_path / "head_map.json")
    before = json.loads((tmp_path / "head_map.json").read_text())
    del before["halves"]
    (tmp_path / "before.json").write_text(json.dumps(before))

    assert HeadMap.load(tmp_path / "head_map.json").agreement(1 / 3) == reproducibility(SCORES, other, ratio=1 / 3)
    assert HeadMap.load(tmp_path / "before.json").agreement(1 / 3) == a_map().reproducibility


def test_rank_correlation_shares_ties_and_is_zero_for_a_constant() -> None:
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0.0


def test_the_table_lists_every_head_best_first() -> None:
    lines = list(csv.DictReader(io.StringIO(a_map().to_csv())))

    assert lines[0] == {"rank": "1", "layer": "1", "head": "0", "score": "0.9"}
    assert len(lines) == 6


def test_the_picture_is_well_formed_and_marks_the_chosen_heads() -> None:
    picture = ElementTree.fromstring(a_map().to_svg(0.34))

    cells = [cell for cell in picture.iter("{http://www.w3.org/2000/svg}rect") if len(cell)]
    assert len(cells) == 6
    assert sum(cell.get("stroke") == "#000" for cell in cells) == 3


def test_a_map_of_equal_scores_is_drawn_as_what_it_is() -> None:
    picture = ElementTree.fromstring(replace(a_map(((1.0, 1.0, 1.0),) * 2), scorer="uniform").to_svg(0.34))

    cells = [cell for cell in picture.iter("{http://www.w3.org/2000/svg}rect") if len(cell)]
    assert {(cell.get("fill"), cell.get("stroke")) for cell in cells} == {("#bebebe", "#fff")}
    assert [cell[0].text for cell in cells[:1]] == ["layer 0, head 0: not ranked, score 1"]
    assert "nothing is ranked" in [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert (a_map().ranks, a_map(((1.0,),)).ranks) == (True, False)
