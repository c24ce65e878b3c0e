"""Greedy answers of the model as it stands, many rows side by side, and what they are worth by a task metric.

Legend: B row of a batch, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from p2d.metrics import METRICS
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from p2d.rows import Row

GENERATE_ROWS = 64
"""Most rows generated side by side."""

CACHE_STEP = 64
"""Tokens by which the key-value cache grows."""


def answer_limit(rendered: Sequence[RenderedRow]) -> int:
    """Most tokens of a generated answer: the longest reference, which stops answers that never end."""
    return max(len(row.answer_ids) for row in rendered)


def task_metric(
    base: BaseModel, rows: Sequence[Row], *, metric: str = "exact_match", on_token: Callable[[], None]
) -> float:
    """Mean of a task metric over rows, each answered by greedy generation from its prompt alone."""
    rendered = [base.renderer.render(row) for row in rows]
    limit = answer_limit(rendered)
    score = METRICS[metric]
    total = 0.0
    order = sorted(range(len(rows)), key=lambda index: len(rendered[index].prompt_ids))
    for start in range(0, len(order), GENERATE_ROWS):
        indices = order[start : start + GENERATE_ROWS]
        answers = generate(
            base, [base.renderer.asked(rendered[index]) for index in indices], limit=limit, on_token=on_token
        )
        for index, ids in zip(indices, answers, strict=True):
            total += score(base.renderer.decode(ids), rows[index].answer)
    return total / len(rows)


def _nothing() -> None:
    """For callers that do not watch."""


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[list[int]],
    *,
    limit: int,
    on_token: Callable[[], None] = _nothing,
    after: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy answers to prompts, each up to its stop token, `limit` or the end of the model's context, whatever stands beside it.

    One batch with a key-value cache; rows that have stopped leave it. Prompts are padded on the left, so that all rows
    write their next token at the same place.

    Args: prompts: whole sequences up to the answer (`Renderer.asked`), or what stands behind `after`.
          after: tokens that all prompts stand behind, prefix included: computed once for all.
    """
    stop = base.renderer.stop_ids
    width = max(len(ids) for ids in prompts)
    narrow = base.info.window is not None and len(after) + width + limit > base.info.window
    if after and narrow and len({len(ids) for ids in prompts}) > 1:
        # Padding between what all stand behind and a prompt would fill the sliding window.
        return _by_length(base, prompts, limit=limit, on_token=on_token, after=after)
    room = [min(limit, base.info.context_length - len(ids) - len(after)) for ids in prompts]
    if min(room) <= 0:
        return _where_room(base, prompts, room, limit=limit, on_token=on_token, after=after)
    input_ids_BT = torch.full((len(prompts), width), base.renderer.pad_id, device=base.device)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, ids in enumerate(prompts):
        input_ids_BT[b, width - len(ids) :] = torch.tensor(ids, device=base.device)
        mask_BT[b, width - len(ids) :] = 1
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0) + len(after)
    if after:
        base.hidden(torch.tensor([list(after)], device=base.device), past_key_values=cache)
        cache.batch_repeat_interleave(len(prompts))
        mask_BT = torch.cat([mask_BT.new_ones(len(prompts), len(after)), mask_BT], dim=1)
    for _ in range(max(room)):
        h_BTD = base.hidden(input_ids_BT, mask_BT, position_ids=position_BT, past_key_values=cache)
        next_B: Tensor = base.logits(h_BTD[:, -1]).argmax(-1)
        tokens = next_B.tolist()
        going = [place for place, token in enumerate(tokens) if token not in stop]
        for place in going:
            answers[alive[place]].append(tokens[place])
        going = [place for place in going if len(answers[alive[place]]) < room[alive[place]]]
        on_token()
        if not going:
            break
        if len(going) < len(alive):
            keep = torch.tensor(going, device=base.device)
            alive = [alive[place] for place in going]
            cache.batch_select_indices(keep)
            mask_BT, position_BT, next_B = mask_BT[keep], position_BT[keep], next_B[keep]
        input_ids_BT = next_B[:, None]
        position_BT = position_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, torch.ones_like(input_ids_BT)], dim=1)
    return answers


def _where_room(
    base: BaseModel,
    prompts: Sequence[list[int]],
    room: Sequence[int],
    *,
    limit: int,
    on_token: Callable[[], None],
    after: Sequence[int],
) -> list[list[int]]:
    """`generate`, with no answer to prompts that leave no room for one."""
    some = [ids for ids, tokens in zip(prompts, room, strict=True) if tokens > 0]
    answers = iter(generate(base, some, limit=limit, on_token=on_token, after=after) if some else [])
    return [next(answers) if tokens > 0 else [] for tokens in room]


def _by_length(
    base: BaseModel, prompts: Sequence[list[int]], *, limit: int, on_token: Callable[[], None], after: Sequence[int]
) -> list[list[int]]:
    """`generate`, with prompts of one length at a time side by side."""
    answers: dict[int, list[int]] = {}
    for length in sorted({len(ids) for ids in prompts}):
        places = [place for place, ids in enumerate(prompts) if len(ids) == length]
        same = [prompts[place] for place in places]
        answers |= dict(zip(places, generate(base, same, limit=limit, on_token=on_token, after=after), strict=True))
    return [answers[place] for place in range(len(prompts))]


class RoomyLayer(DynamicLayer):
    """A cache layer with room for tokens to come: transformers' own copies all keys and values for every new token,
    which took a sixth of the time of generation on a CPU."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values, [B, G, T, E]; returns all so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room = self._value_room = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        known = self.get_seq_length()
        total = known + key_states.shape[2]
        if total > self._key_room.shape[2]:
            self._key_room, self._value_room = (_roomier(t, total) for t in (self._key_room, self._value_room))
        self._key_room[:, :, known:total] = key_states
        self._value_room[:, :, known:total] = value_states
        return self._show(total)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        total = self.get_seq_length()
        self._key_room, self._value_room = (
            room.repeat_interleave(repeats, dim=0) for room in (self._key_room, self._value_room)
        )
        self._show(total)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        total = self.get_seq_length()
        self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
        self._show(total)

    def _show(self, total: int) -> tuple[Tensor, Tensor]:
        keys, values = self._key_room[:, :, :total], self._value_room[:, :, :total]
        self.keys, self.values = keys, values
        return keys, values


def _roomier(room_BGTE: Tensor, tokens: int) -> Tensor:
    """A copy with space for at least `tokens`."""
    b, groups, known, e = room_BGTE.shape
    larger = room_BGTE.new_empty((b, groups, tokens + CACHE_STEP, e))
    larger[:, :, :known] = room_BGTE
    return larger
