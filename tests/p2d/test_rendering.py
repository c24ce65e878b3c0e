"""Rows become ids as the model's own template writes them, with a prefix that belongs to no row."""

from __future__ import annotations

from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from p2d.errors import ModelError, TemplateRefuses
from p2d.models import BaseModel
from p2d.rendering import RenderedRows, Renderer, load_renderer
from p2d.rows import Row, Turn
from tests.factories import CHAT_TEMPLATE, some_rows, tiny_model_dir, tiny_tokenizer

ROW = Row(prompt="What is 1+1?", answer="It is 2", line=1)


def text(tokenizer: Any, ids: list[int]) -> str:
    """Special tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_with_a_template_a_row_reads_as_the_template_writes_it() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    renderer = Renderer(tokenizer)
    row = renderer.render(ROW)

    assert text(tokenizer, renderer.prefix_ids) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text(tokenizer, row.prompt_ids) == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert text(tokenizer, row.answer_ids) == "It is 2<|im_end|>"
    assert text(tokenizer, renderer.separator_ids) == "\n"
    messages = [{"role": "user", "content": ROW.prompt}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert renderer.prefix_ids + row.prompt_ids == asked


def test_a_train_of_thought_that_the_template_leaves_empty_belongs_to_the_prompt() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (  # as Qwen3 does it: in the last answer alone, and not in the generation prompt
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    row = renderer.render(ROW)

    assert text(tokenizer, row.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text(tokenizer, row.answer_ids) == "It is 2<|im_end|>"
    assert renderer.decode(row.answer_ids) == ROW.answer


def test_without_a_template_a_row_is_prompt_newline_answer_eos_after_a_first_token() -> None:
    tokenizer: Any = tiny_tokenizer(chat=False)
    renderer = Renderer(tokenizer)
    row = renderer.render(ROW)

    assert text(tokenizer, renderer.prefix_ids) == "<|endoftext|>"
    assert text(tokenizer, row.prompt_ids) == "What is 1+1?\n"
    assert text(tokenizer, row.answer_ids) == "It is 2<|endoftext|>"
    assert not renderer.has_chat_template


SYSTEM, ASKED, SAID = Turn("system", "Rhyme."), Turn("user", "Hi"), Turn("assistant", "Ho")


def as_messages(row: Row) -> list[dict[str, str]]:
    return [*(turn._asdict() for turn in row.before), {"role": "user", "content": row.prompt}]


@pytest.mark.parametrize("before", [(SYSTEM,), (ASKED, SAID), (SYSTEM, ASKED, SAID, ASKED, SAID)], ids=len)
@pytest.mark.parametrize("bos", ["", "<|endoftext|>", "<|im_start|>"])
def test_a_conversation_alone_is_what_the_template_writes_its_own_system_turn_instead_of_the_templates(
    before: tuple[Turn, ...], bos: str
) -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    if bos == "<|endoftext|>":
        tokenizer.chat_template = bos + tokenizer.chat_template
    tokenizer.bos_token = bos or None
    renderer, row = Renderer(tokenizer), Row("And 1+1?", "It is 2", 1, before)

    rendered = renderer.render(row)

    asked = tokenizer.apply_chat_template(as_messages(row), add_generation_prompt=True, tokenize=True)["input_ids"]
    assert renderer.asked(rendered) == asked
    assert renderer.length(rendered) == len(asked) + len(rendered.answer_ids)
    assert text(tokenizer, rendered.answer_ids) == "It is 2<|im_end|>"
    # In context it stands whole behind the shared prefix, as any row.
    shown = text(tokenizer, rendered.prompt_ids)
    assert shown.startswith("<|im_start|>" + before[0].role)
    assert shown.count("<|im_start|>") == len(before) + 2
    assert rendered.own_system == (before[0] is SYSTEM)
    assert not renderer.render(ROW).own_system


def test_turns_that_the_template_does_not_take_are_the_rows_fault() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    renderer = Renderer(tokenizer)

    with pytest.raises(TemplateRefuses) as refused:
        renderer.render(Row("q", "a", 7, (SYSTEM,)))

    assert [fault.line for fault in refused.value.errors] == [7]
    assert renderer.render(Row("q", "a", 8, (ASKED, SAID))).prompt_ids


def test_without_a_template_a_conversation_is_a_transcript() -> None:
    tokenizer: Any = tiny_tokenizer(chat=False)

    row = Renderer(tokenizer).render(Row("And 1+1?", "It is 2", 1, (SYSTEM, ASKED, SAID)))

    assert text(tokenizer, row.prompt_ids) == "Rhyme.\n\nHi\nHo\n\nAnd 1+1?\n"


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_ends_with_a_token_that_stops_generation(chat: bool) -> None:
    renderer = Renderer(tiny_tokenizer(chat=chat))

    for row in some_rows(6):
        rendered = renderer.render(row)
        assert rendered.answer_ids[-1] in renderer.stop_ids
        assert renderer.decode(rendered.answer_ids) == row.answer
        assert renderer.length(renderer.render(row)) == len(
            renderer.prefix_ids + rendered.prompt_ids + rendered.answer_ids
        )


@pytest.mark.parametrize("content", [" spaced ", "\nline\n", "\u00e4\u4e2d\U0001f600", "a\tb", "<|im_end|>"])
def test_odd_text_survives_and_the_prompt_stays_the_beginning(content: str) -> None:
    renderer = Renderer(tiny_tokenizer(chat=True))

    rendered = renderer.render(Row(prompt=content, answer=content, line=1))

    assert rendered.prompt_ids == renderer.render(Row(prompt=content, answer="other", line=1)).prompt_ids
    assert rendered.answer_ids[-1] in renderer.stop_ids
    if "<" not in content:
        assert renderer.decode(rendered.answer_ids) == content


def test_a_template_that_starts_every_turn_alike_still_gets_a_first_token() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    row = renderer.render(ROW)

    assert text(tokenizer, renderer.prefix_ids) == "<|endoftext|>"
    assert text(tokenizer, row.prompt_ids + row.answer_ids) == "[What is 1+1?]It is 2<|im_end|>"
    assert renderer.separator_ids == []


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    row = Renderer(tokenizer).render(ROW)

    assert row.answer_ids[-1] == tokenizer.eos_token_id


def test_a_template_whose_prompt_is_no_beginning_is_refused() -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"

    with pytest.raises(ModelError):
        Renderer(tokenizer)


def test_a_template_that_prints_todays_date_reads_the_same_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = tiny_tokenizer(chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("Be brief.", "Today is {{ strftime_now('%d %b %Y') }}.")
    days = iter(range(1, 29))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Clock:
            return cls(2031, 5, next(days), tzinfo=tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    renderer = Renderer(tokenizer)

    assert text(tokenizer, renderer.prefix_ids).startswith("<|im_start|>system\nToday is 26 Jul 2024.<|im_end|>")
    assert renderer.render(ROW) == Renderer(tokenizer).render(ROW)


def test_a_directory_without_a_tokenizer_is_refused_and_weights_are_not_needed(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    (directory / "model.safetensors").unlink()
    assert load_renderer(directory).has_chat_template

    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError):
        load_renderer(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_renderer(directory)


def test_rows_rendered_when_looked_at_are_the_rows_rendered_at_once(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.rendering.KEPT_RENDERED", 2)
    rows = some_rows(5)
    at_once = [tiny.renderer.render(row) for row in rows]

    looked_at = RenderedRows(tiny.renderer, rows)

    assert list(looked_at) == at_once == [looked_at[place] for place in (0, 1, 2, 3, -1)]
    assert (len(looked_at), looked_at[1:3]) == (5, at_once[1:3])
