"""Models for tests that each need one of their own: loaded once, then copied, which takes a tenth of the time."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from p2d.config import Precision
from p2d.models import BaseModel, load_base_model


def loaded(directory: Path, precision: Precision = "fp32") -> BaseModel:
    """The model of a directory that does not change, as `load_base_model` gives it on a CPU; its weights are the caller's own."""
    base = _base(directory, precision)
    return replace(base, module=copy.deepcopy(base.module))


def as_transformers_has_it(directory: Path) -> PreTrainedModel:
    """The same by transformers alone, with eager attention and trainable weights."""
    return copy.deepcopy(_reference(directory))


# Few at a time: tests of one directory stand together.
@lru_cache(maxsize=4)
def _base(directory: Path, precision: Precision) -> BaseModel:
    return load_base_model(directory, precision=precision, device="cpu")


@lru_cache(maxsize=2)
def _reference(directory: Path) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM
    module: PreTrainedModel = loader.from_pretrained(directory, attn_implementation="eager")
    module.train(False)
    return module
