"""Rows -> token ids: chat template where the tokenizer has one, else `prompt newline answer eos`.

A row as a sequence is `prefix + prompt + answer`. The prefix (BOS, or the template's system turn) is the same for all
rows and never empty: attention needs a first token that belongs to no row (docs/LOG.md, attention sink). In-context
sequences repeat `prompt + answer + separator` after one prefix. Batching and padding are `p2d.batches`.

All turns before a conversation's answer are its prompt. A system turn of its own takes the place of the template's: such a row
stands alone behind what the template writes before any turn (BOS, or nothing), in context behind the shared prefix
(docs/decisions/0026).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from p2d.errors import ErrorDetail, ModelError, TemplateRefuses
from p2d.model_files import opening
from p2d.rows import Row
from p2d.sequences import MadeSequence

TODAY = datetime(2024, 7, 26)
"""The day for templates that print today's: rows are the same on every day. It is the one that Llama 3's fall back to."""

KEPT_RENDERED = 16_384
"""Rows whose ids are kept: all of a usual subset, and some 100 MB of a large one. A row is rendered in 0.1 to 0.3 ms."""


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """Token ids of one row without the shared prefix; the answer ends with the end-of-turn (or eos) token."""

    prompt_ids: list[int]
    answer_ids: list[int]
    own_system: bool = False
    """Whether the prompt begins with a system turn that the shared prefix would contradict."""


class RenderedRows(MadeSequence[RenderedRow]):
    """Rows as ids, rendered when they are looked at; the ids of the last KEPT_RENDERED ones are at hand."""

    def __init__(self, renderer: Renderer, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._render = lru_cache(KEPT_RENDERED)(lambda place: renderer.render(rows[place]))

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: int) -> RenderedRow:
        return self._render(place)


class Renderer:
    """Turns rows into token ids for one tokenizer."""

    prefix_ids: list[int]
    """Ids before the first row of a sequence; never empty."""
    separator_ids: list[int]
    """Ids between one row's answer and the next row's prompt (often a newline; may be empty)."""
    pad_id: int
    """Fills batches on the right; never trained on, never attended to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if eos is None:
            raise ModelError("The tokenizer names no eos token, so answers could not be ended.")
        self._eos_id: int = eos
        self._special_ids = frozenset(tokenizer.all_special_ids) | {eos}
        self.pad_id = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._chat = bool(tokenizer.chat_template)
        self._prefix = self._opening = self._bos = ""
        self._bos_ids: list[int] = []
        if self._chat:
            self._dated = _dated(tokenizer.get_chat_template())
            (self._prefix, later_turn), self._opening = _shared_prefix(self), _opening(self)
            self.prefix_ids = self.encode(self._prefix) or [eos if bos is None else bos]
            if bos is not None and self._prefix.startswith(tokenizer.bos_token):
                # Not where it begins every turn: then it belongs to the system turn.
                self._bos = "" if later_turn.startswith(tokenizer.bos_token) else tokenizer.bos_token
                self._bos_ids = self.encode(self._bos)
            self.separator_ids = self._separator()
        else:
            self.prefix_ids = [eos if bos is None else bos]
            self.separator_ids = self.encode("\n\n")

    @property
    def has_chat_template(self) -> bool:
        """Whether rows are rendered by the tokenizer's own template."""
        return self._chat

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generated answer."""
        return frozenset({self._eos_id, self.render(Row(prompt="1", answer="1", line=0)).answer_ids[-1]})

    def render(self, row: Row) -> RenderedRow:
        """Ids of a row's prompt (with everything up to the first answer token) and of its answer.

        Raises: TemplateRefuses if the chat template does not take the row's turns.
        """
        if not self._chat:
            return RenderedRow(self.encode(_transcript(row)), [*self.encode(row.answer), self._eos_id])
        prompt_ids, tail_ids, own_system = self._turn(row)
        end = 1 + max((i for i, token in enumerate(tail_ids) if token in self._special_ids), default=-1)
        # A template without an end-of-turn token leaves the model no way to stop: end with eos instead.
        return RenderedRow(prompt_ids, tail_ids[:end] if end else [*tail_ids, self._eos_id], own_system)

    def asked(self, rendered: RenderedRow) -> list[int]:
        """A rendered row as a sequence of its own, up to its answer."""
        return [*self._lead_ids(rendered), *rendered.prompt_ids]

    def length(self, rendered: RenderedRow) -> int:
        """Tokens of a rendered row as a sequence of its own, prefix included."""
        return len(self._lead_ids(rendered)) + len(rendered.prompt_ids) + len(rendered.answer_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands, in no turn and with nothing before or after it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def chat_text(self, messages: list[dict[str, str]], *, open_answer: bool = False) -> str:
        """The chat template's text; with `open_answer` it ends where an answer would begin."""
        text: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._dated, tokenize=False, add_generation_prompt=open_answer
        )
        return text

    def _lead_ids(self, rendered: RenderedRow) -> list[int]:
        return self._bos_ids if rendered.own_system else self.prefix_ids

    def _turn(self, row: Row) -> tuple[list[int], list[int], bool]:
        """Ids of the prompt and of everything after it, by the chat template, without what stands before the row; and whether
        that is not the shared prefix."""
        asked = [*(turn._asdict() for turn in row.before), {"role": "user", "content": row.prompt}]
        try:
            prompt = self.chat_text(asked, open_answer=True)
            full = self.chat_text([*asked, {"role": "assistant", "content": row.answer}])
        except TemplateError as error:
            text = "The chat template of the base model does not take these turns."
            fault = ErrorDetail(code=TemplateRefuses.code, message=text, line=row.line)
            raise TemplateRefuses(text, errors=[fault]) from error
        own_system = not prompt.startswith(self._prefix)
        lead, lead_ids = (self._bos, self._bos_ids) if own_system else (self._prefix, self.prefix_ids)
        if not (full.startswith(prompt) and prompt.startswith(lead)) or (own_system and not row.before):
            raise ModelError("The chat template does not render a prompt as the beginning of its answered form.")
        if full.startswith(prompt + self._opening):
            prompt += self._opening
        prompt_ids, full_ids = self.encode(prompt), self.encode(full)
        if prompt_ids[: len(lead_ids)] != lead_ids or not self._prefix:
            prompt_ids = self.encode(prompt[len(lead) :])
            return prompt_ids, self.encode(full[len(prompt) :]), own_system
        if (
            full_ids[: len(prompt_ids)] != prompt_ids
        ):  # a token that spans the border: cut at the border, as a user's prompt is
            full_ids = prompt_ids + self.encode(full[len(prompt) :])
        return prompt_ids[len(lead_ids) :], full_ids[len(prompt_ids) :], own_system

    def _separator(self) -> list[int]:
        """What the template writes between an end of turn and the next turn."""
        row = Row(prompt="1", answer="1", line=0)
        _, tail_ids, _ = self._turn(row)
        return tail_ids[len(self.render(row).answer_ids) :]


def _dated(template: str) -> str | None:
    """A template that asks for today's date with an answer of its own put before it; None for the others.

    As a macro, since transformers lets no function through to a template. The line break after it is not rendered.
    """
    if "strftime_now" not in template:
        return None
    known = "".join(
        f"|replace('%{each}', '{TODAY.strftime(f'%{each}')}')" for each in (*"aAbBcdfHIjmMpSxXyY%", "-d", "-m")
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{known} }}}}{{% endmacro %}}\n{template}"


def _transcript(row: Row) -> str:
    """A prompt where there is no template: exchanges as rows in context stand one after the other, a system turn before them."""
    turns = [turn.content + ("\n" if turn.role == "user" else "\n\n") for turn in row.before]
    return f"{''.join(turns)}{row.prompt}\n"


def _shared_prefix(renderer: Renderer) -> tuple[str, str]:
    """What the template writes before the first turn but not before later ones (BOS, system turn); and such a later turn.

    Found by comparing: a conversation of two equal turns is `prefix + turn + turn`, one of one turn is `prefix + turn`.
    """
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    one, two = renderer.chat_text(turn), renderer.chat_text([*turn, *turn])
    later_turn = two[len(one) :]
    if not two.startswith(one) or not later_turn or not one.endswith(later_turn):
        return "", later_turn
    return one[: len(one) - len(later_turn)], later_turn


def _opening(renderer: Renderer) -> str:
    """What the template writes between the prompt and an answer, such as Qwen3's empty train of thought.

    It belongs to the prompt: the model would else be trained to write it, and its answers be judged with it.
    """
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    tail = renderer.chat_text(messages).removeprefix(renderer.chat_text(messages[:1], open_answer=True))
    before = tail[: tail.find("1")]
    return before if before.strip() else ""  # a space belongs to the first token of the answer


def load_renderer(directory: Path) -> Renderer:
    """The renderer of a model directory; reads tokenizer files only, never weights, runs no remote code."""
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"The model directory {directory.name!r} has no tokenizer.json.")
    failed = f"Tokenizer or config.json of {directory.name!r} cannot be read"
    with opening(f"reading the tokenizer of {directory.name!r}", failed=failed, model=directory.name):
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(directory), local_files_only=True, trust_remote_code=False)
        return Renderer(tokenizer)  # which has jinja read the chat template for the first time
