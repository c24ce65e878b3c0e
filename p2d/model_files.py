"""Opening a user's model files with transformers: whatever it raises becomes one error that names the cause. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from p2d.errors import ModelError, P2DError
from p2d.memory_guard import memory_guard


@contextmanager
def opening(what: str, *, failed: str, model: str) -> Iterator[None]:
    """Blame a model's files for what a library raises on them. Only the library's call belongs inside.

    Args:    what: as in "loading 'm'". failed: as in "The model 'm' cannot be loaded", which the cause follows.
    Raises:  OutOfMemory, of which the files are innocent; else ModelError.
    """
    try:
        with memory_guard(what):
            yield
    # A door: a wrong value in config.json is an AssertionError here, a KeyError there, and a bare Exception in tokenizers.
    except Exception as error:
        if isinstance(error, P2DError):
            raise
        raise ModelError(f"{failed}: {_cause(error)}", model=model) from error


def _cause(error: Exception) -> str:
    """In one line; with the kind of error, for a KeyError says nothing but the key."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) else f"{text} ({type(error).__name__})"
