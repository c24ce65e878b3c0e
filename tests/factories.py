"""Makes tiny things for tests in a second: a random model of any family as a safetensors directory, and rows.

No network, no files from outside. The tokenizer knows all bytes and one merge, so every text is tokenisable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from p2d.rows import Row

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with a default system turn, as SmolLM2 has it."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


WINDOW = 16
"""Keys in the sliding window of the tiny models that have one: a third of a row of `some_rows`."""

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"hidden_size": 72, "sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"hidden_size": 72, "attention_bias": True},
    "gemma3_text": {
        "hidden_size": 72,
        "query_pre_attn_scalar": 12,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": WINDOW, "original_max_position_embeddings": 512},
    "gpt2": {"n_inner": None, "num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
}
"""Family -> what its tiny model has that a tiny Llama has not: head widths and windows of its own, biases, no groups."""


def tiny_model_dir(
    directory: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    n_layers: int = 3,
    n_heads: int = 6,
    n_kv_groups: int = 2,
    head_dim: int = 16,
    context_length: int = 512,
    chat: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random model of some 250,000 weights, with its tokenizer, and return its directory."""
    tokenizer = tiny_tokenizer(chat=chat)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": n_heads * head_dim,
        "intermediate_size": 2 * n_heads * head_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_groups,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
    }
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=0.2,  # a random model whose attention is not flat
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{key: value for key, value in (sizes | TINY[family]).items() if value is not None},
    )
    loader: Any = AutoModelForCausalLM
    model = loader.from_config(config)
    if family != "llama":  # whose weights many tests know
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:  # biases are born 0 and norms 1 (Gemma's 0), as if they were not there
                    weight.add_(torch.randn(weight.shape), alpha=0.3)
    _quiet()
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one merge, with or without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet, "at"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|im_end|>" if chat else "<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def some_rows(count: int, *, first: int = 0) -> list[Row]:
    """Little sums with short answers of different lengths, learnable and all different."""
    return [
        Row(prompt=f"What is {n} plus {n % 7}?", answer=f"It is {n + n % 7}" + "!" * (n % 5), line=n + 1)
        for n in range(first, first + count)
    ]


def _quiet() -> None:
    logging: Any = transformers_logging
    logging.disable_progress_bar()
