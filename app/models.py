"""Put a base model into the models directory: checked first, whole or not at all. Reads headers, never weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from app.errors import ModelNameTaken
from p2d.errors import ConfigError, ErrorDetail
from p2d.model_info import MODEL_NAME, ModelInfo, read_model_info

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "LICENSE*", "README.md")
"""What is copied: configuration, tokenizer, weights and their papers. Never pickled weights, never code."""


def model_place(models_dir: Path, name: str) -> Path:
    """Where the model of that name belongs. Raises ConfigError (`config.invalid`) for a name that is none."""
    if not MODEL_NAME.fullmatch(name):
        text = "A model's name is made of letters, digits, dots, dashes and underscores."
        raise ConfigError(text, errors=[ErrorDetail(code="config.model_name", message=text, pointer="/name")])
    return models_dir / name


def install_directory(models_dir: Path, name: str, source: Path) -> ModelInfo:
    """Copy a model directory in under `name`.

    Raises: ModelNotFound, ModelUnsupported, ModelError (see read_model_info); ModelNameTaken for other weights.
    """
    place, info = model_place(models_dir, name), read_model_info(source)
    if place.exists():
        installed = read_model_info(place)
        if installed.digest != info.digest:
            raise ModelNameTaken(name=name)
        return installed
    models_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=models_dir))
    try:
        for pattern in FILES:
            for file in source.glob(pattern):
                shutil.copy2(file, unfinished / file.name)
        unfinished.chmod(0o755)
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return read_model_info(place)
