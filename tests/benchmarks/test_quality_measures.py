"""What a trained model is worth, as the quality matrix measures it: losses row by row, and what was forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.measures import TEXT_PASSAGES, TEXT_TOKENS, Measures, passages
from p2d.evaluation import row_losses
from p2d.models import BaseModel
from tests.factories import some_rows

HELD_OUT, OTHER = some_rows(4, first=60), some_rows(3, first=80)


def test_the_losses_of_a_cell_are_those_of_the_product_row_by_row(tiny: BaseModel) -> None:
    rows = some_rows(9, first=30)

    measured = Measures(rows).all(tiny)

    expected = row_losses(tiny, [tiny.renderer.render(row) for row in rows])
    assert measured.nll == pytest.approx(expected.nll_R.tolist(), abs=1e-3)
    assert measured.tokens == expected.tokens_R.tolist()


def test_an_untouched_model_has_forgotten_nothing(tiny: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"The {word}th word." for word in range(2000)), encoding="utf-8")
    text = passages(tiny, path)
    measures = Measures(HELD_OUT, OTHER, text)
    measures.prepare(tiny)

    measured = measures.all(tiny)

    assert len({tuple(passage.answer_ids) for passage in text}) == TEXT_PASSAGES
    assert {len(passage.prompt_ids + passage.answer_ids) for passage in text} == {TEXT_TOKENS}
    assert measured.other_loss == pytest.approx(measures.other_before)
    assert measured.text_loss == pytest.approx(measures.text_before)
    assert [measured.other_kl, measured.text_kl] == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Too short.", r"text.txt has \d+ tokens; 1536 are wanted"),
        (b"\xff\xfe", "no text in UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_text_that_cannot_tell_anything_is_refused(
    content: bytes | None, said: str, tiny: BaseModel, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ValueError, match=said):
        passages(tiny, path)
