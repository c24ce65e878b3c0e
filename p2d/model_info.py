"""Describe a base model from its config.json and safetensors headers: shape, family, digest. Never reads weights as tensors.

A model is a directory under P2D_MODELS_DIR and is named by that directory's name; no path from a client is ever opened.
Loading the weights is `models.py`'s business. No torch here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from p2d.arch import ARCHS
from p2d.errors import ErrorDetail, ModelError, ModelNotFound, ModelUnsupported
from p2d.files import sha256_of
from p2d.registry import load

if TYPE_CHECKING:
    from p2d.arch.spec import ArchSpec, ConfigKeys

MODEL_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""What a model may be called: no slash, no leading dot, so a name is never a path."""

DIGEST_CACHE = "p2d-model.json"
"""File in the model's directory that keeps its digest, with the sizes and times it holds for."""

_WHOLE = frozenset(
    {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    | {"special_tokens_map.json", "added_tokens.json"}  # of older models: they change which ids end an answer
)
_MORE_TEMPLATES = "additional_chat_templates"
"""Files beside the weights, and a folder, that decide what a model computes or how rows are rendered for it."""

_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
"""Causal masks and rotary tables that older GPT-2 and Pythia files hold: 13 M numbers in GPT-2's, and no weights."""

_HEADER_LIMIT = 100 << 20  # the cap of the safetensors library
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What config.json alone says of a model."""

    model_type: str
    n_layers: int
    n_heads: int
    """Query heads per layer."""
    n_kv_groups: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    """Tokens. Of a model with `longrope`, those up to which its rotary factors are the ones for short texts."""
    mlp_matrices: int = 3
    """Matrices of intermediate times hidden size in one MLP: 3 with a gate, 2 without."""
    window: int | None = None
    """Keys that a token sees in the layers with a sliding window, itself included."""
    n_windowed_layers: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo(ModelShape):
    """What the service and the engine must know of a base model before they load it."""

    name: str
    digest: str
    """Sha256 over the names and contents of config, tokenizer and weight files."""
    parameters: int
    dtype: str
    """Of most weights: fp32, bf16 or fp16."""


def read_model_info(directory: Path) -> ModelInfo:
    """Read what `directory` holds, without its weights.

    Only loading finds norms or biases that are wrong, NaN, and values in config.json that are none of the model's sizes.

    Raises: ModelNotFound (no such directory), ModelUnsupported (family without a spec, quantised, weights that are no F32, F16 or
            BF16), ModelError (broken: a file is missing or cut off, or a matrix is missing or misshapen).
    """
    if not directory.is_dir():
        raise ModelNotFound(
            f"There is no model {directory.name!r}.", errors=[_fault("model.not_found", "No such model.")]
        )
    return _read(directory, _stamps(directory))


def read_outline(directory: Path, digest: str) -> ModelInfo:
    """`read_model_info` of a model of which only an outline lies in the directory, and whose digest is known.

    Of its weight files only the headers are read here, but each must be as long as the whole one. Raises as `read_model_info`.
    """
    return _describe(directory, digest)


@lru_cache(256)
def _read(directory: Path, stamps: Stamps) -> ModelInfo:
    """Once for the files as they are. An error is not kept."""
    return _describe(directory, None)


def _describe(directory: Path, digest: str | None) -> ModelInfo:
    config = _config(directory)
    shape = shape_of(config, name=directory.name)
    if not (directory / "tokenizer.json").is_file():
        raise _broken(directory, "tokenizer.json is missing")
    tensors = {name: entry for path in weight_files(directory) for name, entry in _header(directory, path).items()}
    parameters, dtype = _weights(directory, tensors)
    _check_matrices(directory, config, shape, tensors)
    found = model_digest(directory) if digest is None else digest
    return ModelInfo(name=directory.name, digest=found, parameters=parameters, dtype=dtype, **asdict(shape))


def shape_of(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """What the contents of a config.json say; `name` is how errors call the model.

    Raises: ModelUnsupported (family without a spec, quantised), ModelError (sizes that are missing or do not fit).
    """
    directory = Path(name)
    spec = _spec(directory, config)
    if config.get("quantization_config"):
        raise ModelUnsupported(
            f"The model {name!r} is quantised; head slices need plain weights: take the model from which it was made."
        )
    keys = spec.config
    heads = _size(directory, config, keys.n_heads)
    hidden = _size(directory, config, keys.hidden_size)
    groups = _size(directory, config, "num_key_value_heads", default=heads)
    if heads % groups:
        raise _broken(directory, f"{heads} heads do not divide into {groups} key-value groups")
    layers = _size(directory, config, keys.n_layers)
    _check_values(directory, config, layers)
    window = _window(directory, config, keys)
    return ModelShape(
        model_type=config["model_type"],
        n_layers=layers,
        n_heads=heads,
        n_kv_groups=groups,
        head_dim=_size(directory, config, "head_dim", default=keys.head_dim or hidden // heads),
        hidden_size=hidden,
        intermediate_size=_size(directory, config, keys.intermediate_size, default=hidden * (keys.mlp_ratio or 0)),
        vocab_size=_size(directory, config, "vocab_size"),
        context_length=_context(directory, config, keys),
        mlp_matrices=spec.mlp_matrices,
        window=window,
        n_windowed_layers=0 if window is None else _windowed_layers(directory, config, keys, layers),
    )


def find_model(models_dir: Path, name: str) -> Path:
    """Return the directory of an installed model. Raises ModelNotFound, with the nearest installed names."""
    if MODEL_NAME.fullmatch(name) and (models_dir / name).is_dir():
        return models_dir / name
    installed = [path.name for path in _directories(models_dir)]
    shown = name if MODEL_NAME.fullmatch(name) else "of that name"
    text = f"There is no model {shown!r}." if shown == name else "There is no model of that name."
    if near := difflib.get_close_matches(name, installed, n=1):
        text += f" Did you mean {near[0]!r}?"
    raise ModelNotFound(text, errors=[_fault("model.not_found", text)])


def list_models(models_dir: Path) -> list[tuple[str, ModelInfo | ModelError]]:
    """Describe every installed model by name; the unusable ones with the error that says why."""
    found: list[tuple[str, ModelInfo | ModelError]] = []
    for directory in _directories(models_dir):
        try:
            found.append((directory.name, read_model_info(directory)))
        except ModelError as error:
            found.append((directory.name, error))
    return found


Stamps = tuple[tuple[str, int, int], ...]
"""Name, size and time of change (ns) of each file."""


def _stamps(directory: Path) -> Stamps:
    # What _keep writes is left out; a link to nothing is no file.
    own = (Path(entry) for entry in os.scandir(directory) if "p2d-model" not in entry.name)
    files = [path for path in (*own, *more_templates(directory)) if path.is_file()]
    stats = ((str(path.relative_to(directory)), path.stat()) for path in files)
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def model_digest(directory: Path) -> str:
    """Sha256 over sorted (file name, sha256 of content); computed once and kept while the files stay as they are.

    It is kept beside them, for every process and user; and in this process, for where that note can be neither read nor written.
    """
    files = {path.relative_to(directory).as_posix(): path for path in _digested_files(directory)}
    stamps = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}
    cache = directory / DIGEST_CACHE
    try:
        kept = json.loads(cache.read_bytes())
        if kept["files"] == stamps:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or broken: compute it
    digest = _computed(directory, tuple((name, size, time_ns) for name, (size, time_ns) in stamps.items()))
    _keep(cache, {"digest": digest, "files": stamps})
    return digest


@lru_cache(256)
def _computed(directory: Path, stamps: Stamps) -> str:
    return digest_of({name: sha256_of(directory / name) for name, _, _ in stamps})


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a model whose files are known by name and sha256: that of a directory which holds them."""
    digest = hashlib.sha256()
    for name in sorted(filter(_is_digested, files)):
        digest.update(f"{name} {files[name]}\n".encode())
    return digest.hexdigest()


def is_weight(name: str) -> bool:
    """Whether a tensor of that name in a weight file is a weight, not a mask or table that older files hold."""
    return not _BUFFER.search(name)


# --- reading ---------------------------------------------------------------------------------------------------------


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError:
        raise _broken(directory, "config.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(directory, "config.json is not JSON") from error
    if not isinstance(config, dict):
        raise _broken(directory, "config.json is not an object")
    return cast("dict[str, Any]", config)


def _spec(directory: Path, config: Mapping[str, Any]) -> ArchSpec:
    """The spec of the model's family. Raises ModelUnsupported, with the families there are."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHS:
        text = f"The model {directory.name!r} is of the family {family!r}; supported: {', '.join(sorted(ARCHS))}."
        if isinstance(inner := config.get("text_config"), dict):
            text += f" It wraps a text model (family {inner.get('model_type')!r}): install that model alone."
        detail = _fault("model.unsupported", f"The family {family!r} is not supported.")
        raise ModelUnsupported(text, errors=[detail], supported=sorted(ARCHS))
    spec: ArchSpec = load(ARCHS, family, what="model family", pointer="/base_model")
    if setting := next((key for key in spec.config.refused if config.get(key)), None):
        raise ModelUnsupported(f"The model {directory.name!r} sets {setting!r}, which is not supported.")
    return spec


def _size(directory: Path, config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _broken(directory, f"config.json has no usable {key!r}")
    return value


def _context(directory: Path, config: Mapping[str, Any], keys: ConfigKeys) -> int:
    """Tokens that a row may have without a change of another row's numbers.

    transformers picks the rotary factors of `longrope` by the longest row of a batch, so all rows stay within the short ones.
    Those of `dynamic` change beyond `max_position_embeddings` alone, which no row exceeds anyway.
    """
    context = _size(directory, config, keys.context_length)
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict):
        return context
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # one for all layers, or by kind
        if each.get("rope_type", each.get("type")) in keys.longrope:
            within = each.get("original_max_position_embeddings") if keys.short_context is None else keys.short_context
            short = _size(directory, config, "original_max_position_embeddings", default=within or context)
            context = min(context, short)
    return context


def _window(directory: Path, config: Mapping[str, Any], keys: ConfigKeys) -> int | None:
    """Keys in the sliding window; null says that there is none, absence that it is the family's."""
    switched_off = keys.windows in ("late_layers", "layers_without_rope") and not config.get("use_sliding_window")
    if keys.windows == "none" or switched_off or config.get("sliding_window", keys.window) is None:
        return None
    return _size(directory, config, "sliding_window", default=keys.window)


def _windowed_layers(directory: Path, config: Mapping[str, Any], keys: ConfigKeys, n_layers: int) -> int:
    """How many layers attend to the window, as transformers decides it."""
    if keys.windows == "every_layer":
        return n_layers
    if isinstance(types := config.get("layer_types"), list):
        return types.count("sliding_attention")
    if keys.windows == "late_layers":
        return max(0, n_layers - _size(directory, config, "max_window_layers", default=28))
    if keys.windows == "pattern":
        return n_layers - n_layers // _size(directory, config, "sliding_window_pattern", default=6)
    if isinstance(rotary := config.get("no_rope_layers"), list):
        return rotary[:n_layers].count(0)
    return n_layers // _size(directory, config, "no_rope_layer_interval", default=4)


def _check_values(directory: Path, config: Mapping[str, Any], n_layers: int) -> None:
    """Raise ModelError if what is read here beside sizes has another type. Which kinds of layers there are, transformers knows."""
    if not isinstance(config.get("tie_word_embeddings", True), bool):
        raise _broken(directory, "config.json has no usable 'tie_word_embeddings': expected true or false")
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != n_layers or not all(isinstance(each, str) for each in types):
        raise _broken(directory, f"config.json has no usable 'layer_types': expected {n_layers} texts")


def _weights(directory: Path, tensors: Mapping[str, Mapping[str, Any]]) -> tuple[int, str]:
    """Count parameters and name their commonest type, from the headers alone.

    Raises: ModelUnsupported if one is of another type: transformers would take its codes for its values.
    """
    by_dtype: Counter[str] = Counter()
    for name, entry in tensors.items():
        if not is_weight(name):
            continue
        if (dtype := entry["dtype"]) not in _DTYPES:
            raise ModelUnsupported(
                f"The weight {name} of {directory.name!r} is of type {dtype}; expected F32, BF16 or F16."
            )
        by_dtype[dtype] += math.prod(entry["shape"])
    if not by_dtype:
        raise _broken(directory, "its files hold no weights")
    return by_dtype.total(), _DTYPES[by_dtype.most_common(1)[0][0]]


def _check_matrices(
    directory: Path, config: Mapping[str, Any], shape: ModelShape, tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise ModelError, by name, if a matrix that the spec knows is missing or not of the shape that config.json makes it."""
    spec = _spec(directory, config)
    tied = config.get("tie_word_embeddings", spec.config.tied)
    heads, found = spec.head_names(), {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    for name, expected in spec.matrices(shape):
        names = [*spec.names_in_files(name)]
        if tied and name == f"{spec.embedding}.weight":
            names += heads  # a file may hold the one matrix under its other name
        _check_matrix(directory, names, found, expected)
    if not tied or not found.keys().isdisjoint(heads):  # one that is tied and there all the same is loaded too
        _check_matrix(directory, heads, found, (shape.vocab_size, shape.hidden_size))


def _check_matrix(
    directory: Path, names: list[str], found: Mapping[str, tuple[int, ...]], expected: tuple[int, int]
) -> None:
    """Raise ModelError if none of the names that files have for a matrix is there, or the first that is has another shape."""
    stored = next((name for name in names if name in found), None)
    if stored is None:
        raise _broken(directory, f"{names[0]} is missing, expected with the shape {expected}")
    if found[stored] != expected:
        raise _broken(directory, f"{stored} has the shape {found[stored]}, expected {expected}")


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, as transformers picks them: model.safetensors, else those of the index.

    Raises: ModelError if there is neither, or a file of the index is missing.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    names: list[str] = []
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise _broken(directory, f"{index.name} is not readable") from error
        # A name in the index is text from a stranger: it must be a plain file of this directory.
        if not all(isinstance(name, str) and MODEL_NAME.fullmatch(name) for name in names):
            raise _broken(directory, f"{index.name} names a file outside of the model")
    elif other := next(iter(sorted(directory.glob("*.safetensors"))), None):
        raise _broken(
            directory, f"there is neither {whole.name} nor {index.name}, without which {other.name} is not read"
        )
    if not names:
        raise _broken(directory, "there are no safetensors weights (other weight formats are not read)")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise _broken(directory, f"{missing[0]} is missing")
    return [directory / name for name in names]


def _header(directory: Path, path: Path) -> dict[str, dict[str, Any]]:
    """Name of each tensor -> its type, shape and place."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise _broken(directory, f"{path.name} is not a safetensors file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        whole = 8 + length + end == size
        if not all(isinstance(entry["dtype"], str) for entry in entries.values()):
            raise ValueError("dtype")
        if not all(isinstance(n, int) and n >= 0 for entry in entries.values() for n in entry["shape"]):
            raise ValueError("shape")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _broken(directory, f"the header of {path.name} is not readable") from error
    if not whole:
        raise _broken(directory, f"{path.name} is cut off or has bytes after its end")
    return entries


def _digested_files(directory: Path) -> list[Path]:
    own = (path for path in directory.iterdir() if _is_digested(path.name))
    return sorted(path for path in (*own, *more_templates(directory)) if path.is_file())


def _is_digested(name: str) -> bool:
    return name in _WHOLE or name.endswith(".safetensors") or fnmatch(name, f"{_MORE_TEMPLATES}/*.jinja")


def more_templates(directory: Path) -> Iterator[Path]:
    """Chat templates that stand in a folder of their own; transformers takes the one called `default` for want of another."""
    return directory.glob(f"{_MORE_TEMPLATES}/*.jinja")


def _directories(models_dir: Path) -> Iterator[Path]:
    if models_dir.is_dir():
        yield from sorted(path for path in models_dir.iterdir() if path.is_dir() and MODEL_NAME.fullmatch(path.name))


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the model where that is allowed; a read-only model only costs the digest again."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".p2d-model-")
    except OSError:
        return
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
        os.fchmod(file.fileno(), 0o644)  # a service that runs as another user reads it too
    Path(temporary).replace(path)


def _broken(directory: Path, what: str) -> ModelError:
    return ModelError(
        f"The model {directory.name!r} cannot be used: {what}.", errors=[_fault("model.invalid", f"{what}.")]
    )


def _fault(code: str, message: str) -> ErrorDetail:
    return ErrorDetail(code=code, message=message, pointer="/base_model")
