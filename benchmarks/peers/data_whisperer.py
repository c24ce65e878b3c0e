"""Data Whisperer's scoring as its repository has it (gszfwsb/Data-Whisperer, datawhisperer_gsm_pruner.py at 4e59bf6), port in
our words.

Kept: eager attention everywhere; one prompt of instructions, all demonstrations and all questions; greedy generation of all
answers; then a second forward pass of the same prompt through the first layers, again eager, whose whole attention matrix
is summed over heads in fp16 and read at demonstration columns; texts tokenised again for their lengths; groups of one
(`PARALLEL=1`); its default layer, 11; a group with too few parsed answers scores nothing.
Different: its prompt for Llama's chat tokens is reworded for ChatML at about its length. `_update_causal_mask` is gone from
transformers, so the mask of the second pass is made by its successor, and attention is taken by a hook on that one layer.
It generates up to 8,192 tokens less the prompt; here the caller says how many, see `benchmarks.respond`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import create_causal_mask

from p2d.flops import Work, forward
from p2d.model_info import ModelInfo
from p2d.rows import Row

LAYER = 11
"""Its own default for models that it does not know by name."""

SYSTEM = (
    "<|im_start|>system\nYou solve mathematical word problems. For each problem write the calculation step by step and then "
    "the result, in the form asked for below and without any other remark.\n"
    "### How to answer:\n"
    "1. Write nothing but calculation steps and the result.\n"
    "2. The last line of every answer **must** read: #### <number>.\n"
    "Put the result in place of `<number>`, as a whole or a decimal number. No other form is accepted.\n"
    "3. No comments, no questions, no greetings and no closing words.\n"
    "4. Keep the steps short, clear and correct, and write only those that lead to the result.\n"
    "Answer every question in turn by these rules.\n"
    "<|im_end|>\n<|im_start|>user\nThese examples show how answers look:\n"
)
QUESTIONS = (
    "\n**Keep strictly to this form:**\nQuestion 1 Answer: <your steps>\n#### <result>\n"
    "Question 2 Answer: <your steps>\n#### <result>\n(and so on)\n### Now solve these problems in the same way:\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Scored:
    """What one group gave and cost."""

    weight_S: list[float]
    """Attention share of each demonstration."""
    predictions: list[float]
    """Numbers parsed from the generated text."""
    prompt_tokens: int
    decode_steps: int


def group_flops(info: ModelInfo, *, prompt: int, steps: int, layer: int) -> float:
    """Operations of a group: eager attention multiplies the whole square, masked or not."""
    steps -= 1  # the first token comes from the prompt's pass
    whole = Work(tokens=prompt, pairs=prompt**2, logits=1)
    decoded = Work(tokens=steps, pairs=steps * prompt + steps * (steps + 1) / 2, logits=steps)
    again = Work(tokens=prompt, pairs=prompt**2, logits=0)
    return forward(info, whole) + forward(info, decoded) + forward(info, again, to_layer=layer + 1)


class DataWhisperer:
    """The model and its scorer."""

    def __init__(self, directory: Path, *, device: torch.device, dtype: torch.dtype, layer: int = LAYER) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            os.fspath(directory), local_files_only=True, padding_side="left"
        )
        self._tokenizer.pad_token = self._tokenizer.eos_token
        load: Any = AutoModelForCausalLM
        self.model = load.from_pretrained(
            os.fspath(directory), dtype=dtype, attn_implementation="eager", local_files_only=True
        ).to(device)
        self.model.eval()
        self._device = device
        self.layer = min(layer, self.model.config.num_hidden_layers - 1)

    @torch.no_grad()
    def score_group(self, demos: Sequence[Row], queries: Sequence[Row], *, max_new_tokens: int) -> Scored:
        """Generate the answers of all queries, then read how the questions attend to each demonstration."""
        demo_texts = [f"Question: {row.prompt}\nAnswer:\n{row.answer}\n" for row in demos]
        questions = "\n".join(f'Question {number}: "{row.prompt}"' for number, row in enumerate(queries, start=1))
        response = QUESTIONS + questions + ANSWER
        prompt = SYSTEM + "".join(demo_texts) + response
        encoding = self._tokenizer([prompt], return_tensors="pt", padding="longest", pad_to_multiple_of=8).to(
            self._device
        )
        output = self.model.generate(
            **encoding,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        text = self._tokenizer.batch_decode(output, skip_special_tokens=True)[0]
        predictions = _numbers(text.split("assistant")[-1].strip())
        attention_TT = self._attention(encoding.input_ids, encoding.attention_mask)[0]
        weights = self._demo_weights(attention_TT, encoding.attention_mask[0], demo_texts, response)
        if len(predictions) < len(queries):
            weights = [0.0] * len(demos)
        total = sum(weights) or 1.0
        return Scored(
            weight_S=[weight / total for weight in weights],
            predictions=predictions[: len(queries)],
            prompt_tokens=int(encoding.input_ids.shape[1]),
            decode_steps=int(output.shape[1] - encoding.input_ids.shape[1]),
        )

    def _attention(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Attention of one layer summed over its heads, fp16, by a forward pass that stops there."""
        backbone = self.model.model
        h_BTD = backbone.embed_tokens(input_ids_BT)
        position_BT = torch.arange(h_BTD.shape[1], device=h_BTD.device)[None]
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=h_BTD,
            attention_mask=mask_BT,
            past_key_values=None,
            position_ids=position_BT,
        )
        rotary = backbone.rotary_emb(h_BTD, position_ids=position_BT)
        taken: list[Tensor] = []
        hook = backbone.layers[self.layer].self_attn.register_forward_hook(
            lambda module, args, output: taken.append(output[1].sum(dim=1).to(torch.float16))
        )
        for layer in backbone.layers[: self.layer + 1]:
            h_BTD = layer(h_BTD, attention_mask=mask, position_ids=position_BT, position_embeddings=rotary)
        hook.remove()
        return taken[0]

    def _demo_weights(self, attention_TT: Tensor, mask_T: Tensor, demos: list[str], response: str) -> list[float]:
        """Mean attention of the question block to each demonstration, by lengths of texts tokenised one by one."""
        padding = int((mask_T == 0).sum())
        attention_TT = attention_TT[padding:, padding:]
        before = self._length(SYSTEM)
        shown, asked = self._length("".join(demos)), self._length(response)
        to_demos = attention_TT[before + shown : before + shown + asked, before : before + shown]
        weights, start = [], 0
        for demo in demos:
            length = self._length(demo)
            weights.append(float(to_demos[:, start : start + length].sum() / (length * asked)))
            start += length
        return weights

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text)) - 1


def _numbers(text: str) -> list[float]:
    found = []
    for match in re.findall(r"####\s*([\d,]+(?:\.\d+)?)", text):
        try:
            found.append(float(match.replace(",", "")))
        except ValueError:
            continue
    return found
