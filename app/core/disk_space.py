"""Keep some of the disk free: PostgreSQL, running steps and the log need space that uploads must not take."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.errors import DiskFull
from app.settings import Settings


def need_space(settings: Settings) -> None:
    """Raise DiskFull while a disk on which uploads lie, on their way or for good, has less free than the floor."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    folders, store = [settings.work_dir], urlsplit(settings.url("store_url"))
    if store.scheme == "file":
        folders.append(Path(unquote(store.path)))
    for folder in folders:
        disk = shutil.disk_usage(folder)
        if disk.free < min(settings.disk_floor * disk.total, 2 * settings.max_upload_bytes):
            raise DiskFull(
                f"Of the service's disk {100 * disk.free / disk.total:.1f} % are free, which is kept for its work."
            )
