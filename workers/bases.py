"""Merged models as base models of later jobs: brought from the store once, whole, and kept on this machine while they are used.

Each is a folder named by its artifact, beside the work folders and not among the installed models, which all projects see. It gets
its name when it is complete and its digest right, so any number of workers may bring the same one at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from app.blobs import BlobStore
from p2d.errors import ModelError
from p2d.model_info import model_digest

UNUSED_H = 24.0
"""Hours after its last use for which a model stays here. A guess: the jobs of a day share it; deleted ones are gone in a day."""


def bring(store: BlobStore, files: Mapping[str, str], place: Path, digest: str) -> Path:
    """The folder of a model of these files (`name -> sha256`), fetched unless it is there; its hours begin anew.

    Raises: ModelError if the files are not those of this digest; BlobMissing, BlobCorrupt, StoreUnavailable.
    """
    if _use(place):
        if model_digest(place) == digest:
            return place
        shutil.rmtree(place, ignore_errors=True)  # somebody has changed it
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        for name, sha256 in files.items():
            store.fetch(sha256, unfinished / name)
        if model_digest(unfinished) != digest:
            raise ModelError(f"The files of {place.name!r} are not the model that the job was made with.")
        with contextlib.suppress(OSError):  # another worker was faster: it has brought the same
            unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return place


def drop_unused(folder: Path, *, unused_h: float = UNUSED_H) -> int:
    """Remove what nobody has used for so many hours, and what a killed worker left half-way; how many."""
    dropped = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another sweep was faster
            if time.time() - path.stat().st_mtime > unused_h * 3600:
                # Out of sight first: nobody is to open half of it.
                away = path.with_name(f".{path.name.lstrip('.')}-away-{os.getpid()}")
                path.rename(away)
                shutil.rmtree(away, ignore_errors=True)
                dropped += 1
    return dropped


def _use(place: Path) -> bool:
    try:
        os.utime(place)
    except FileNotFoundError:
        return False
    return True
