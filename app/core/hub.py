"""Datasets of the Hugging Face Hub: from a repository, a config and a split at a revision to files at one commit.

What the Hub says of a repository is read here; the files themselves are fetched by app.core.sources. Nobody's code runs: a
repository whose rows only a script can make has no files here, but for what the Hub converted itself, under the revision
`refs/convert/parquet`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from app.core.egress import Egress
from app.dataset_errors import SourceFailed, SourceInvalid
from p2d.errors import DatasetTooLarge

API = "https://huggingface.co/api/datasets/{repo}/revision/{revision}"
FILE = "https://huggingface.co/datasets/{repo}/resolve/{commit}/{path}"

MAX_API_BYTES = 4 << 20
"""Longest answer of the API that is read: some 50,000 files. It bounds the work on names as well."""

MAX_MATCHED_CHARS = 30_000_000
"""Most characters of names that the patterns of one config are held against: 1 or 2 seconds of work, at any form of name."""

MAX_FILES = 200
"""Most files of one split. Each is a request; what needs more would pass the limit on bytes anyway."""

COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(rf"{_PART}(/{_PART})*")
_DATA = re.compile(r"\.(jsonl|ndjson|json|csv|parquet)(\.(gz|gzip|zst|zstd))?$", re.IGNORECASE)

# The Hub's own rules of what belongs to which split, as `datasets` 5.2 has them in data_files.py.
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_END = "[-._ 0-9]"
_FOLDERS = {split: re.compile(rf"(.*{_END})?({words})({_END}.*)?") for split, words in _WORDS.items()}
_NAMES = {split: re.compile(rf"(.*{_END})?({words}){_END}.*") for split, words in _WORDS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFiles:
    """Files of a repository, in the order in which they make one dataset."""

    repo: str
    commit: str
    paths: tuple[str, ...]
    config: str | None = None
    split: str | None = None

    def url(self, path: str) -> str:
        """Where one of them is fetched."""
        return FILE.format(repo=self.repo, commit=self.commit, path=quote(path))


GivenPath = Annotated[str, Field(max_length=500)]


class DataFiles(BaseModel):
    """Files of one split, as a dataset card names them: paths, or patterns of paths."""

    split: str = "train"
    path: GivenPath | list[GivenPath]


class CardConfig(BaseModel):
    """One config of a dataset card."""

    config_name: str = "default"
    data_files: GivenPath | list[GivenPath | DataFiles] | None = None
    data_dir: GivenPath | None = None
    default: bool = False


class _Card(BaseModel):
    configs: list[CardConfig] = []


class _File(BaseModel):
    rfilename: str


class _Repository(BaseModel):
    """What the API says, as far as it is needed here."""

    sha: Annotated[str, Field(pattern=f"^{COMMIT.pattern}$")]
    siblings: list[_File] = []
    cardData: _Card | None = None


def find_files(egress: Egress, source: Mapping[str, str | None], scratch: Path) -> HubFiles:
    """The files that a source of type `hf` names. A revision that is no commit is resolved to the commit that it is now.

    Args:   scratch: a file to be written and removed.
    Raises: SourceInvalid where the repository has no such config, split or file; what `Egress.fetch` raises.
    """
    repo, revision, path = source["repo"] or "", source["revision"] or "", source["path"]
    if not _REPO.fullmatch(repo):
        raise SourceInvalid("The repository is `owner/name`, of letters, digits and . _ -")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise SourceInvalid("The revision is a commit, or the name of a branch or tag.")
    if path is not None:
        if source["config"] is not None or source["split"] is not None:
            raise SourceInvalid("Name one file by its path, or files by config and split.")
        if {"", ".", ".."} & set(path.split("/")) or not path.isprintable() or set("?#%\\") & set(path):
            raise SourceInvalid("The path is that of one file in the repository.")
        commit = revision if COMMIT.fullmatch(revision) else _ask(egress, repo, revision, scratch).sha
        return HubFiles(repo=repo, commit=commit, paths=(path,))
    found = _ask(egress, repo, revision, scratch)
    names = [file.rfilename for file in found.siblings]
    configs = found.cardData.configs if found.cardData else []
    config, split, paths = choose_files(names, configs, config=source["config"], split=source["split"])
    if len(paths) > MAX_FILES:
        raise SourceInvalid(f"The split has {len(paths)} files; {MAX_FILES} are the most. Name one by its path.")
    return HubFiles(repo=repo, commit=found.sha, paths=tuple(paths), config=config, split=split)


def choose_files(
    names: Iterable[str], configs: Sequence[CardConfig], *, config: str | None, split: str | None
) -> tuple[str, str, list[str]]:
    """Config, split and files in order; what was not asked for is the only one that there is.

    A config is one of the dataset card. Without any there, it is a folder of that name, or everything (`default`); a split is
    then told by the names of folders and files, as `datasets.load_dataset` tells it.
    Raises: SourceInvalid that names what there is.
    """
    files = sorted(name for name in names if _is_data(name))
    if configs:
        chosen = _pick_config(configs, config)
        config, splits = chosen.config_name, _card_splits(files, chosen)
    elif config in (None, "default"):
        config, splits = "default", _split_by_name(files)
    else:
        splits = _split_by_folder([name for name in files if name.startswith(f"{config}/")], config or "")
    splits = {name: found for name, found in splits.items() if found}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        there = _listed(sorted(splits)) or "none: its rows are not in files that are read here"
        raise SourceInvalid(f"Name one split of the config {config!r}; the repository has {there}.")
    assert config is not None
    assert split is not None
    return config, split, splits[split]


def _pick_config(configs: Sequence[CardConfig], wanted: str | None) -> CardConfig:
    by_name = {config.config_name: config for config in configs}
    if wanted is None:
        marked = [config for config in configs if config.default]
        found = marked[0] if marked else next(iter(by_name.values())) if len(by_name) == 1 else by_name.get("default")
    else:
        found = by_name.get(wanted)
    if found is None:
        raise SourceInvalid(f"Name one config; the repository has {_listed(by_name)}.")
    return found


def _listed(names: Collection[str]) -> str:
    """Names of a stranger's choice, within bounds."""
    said = ", ".join(name[:100] for name in [*names][:30])
    return f"{said} and {len(names) - 30} others" if len(names) > 30 else said


def _card_splits(files: list[str], config: CardConfig) -> dict[str, list[str]]:
    """Files by split as the card says; those of one pattern by name, patterns in the card's order."""
    folder = (config.data_dir or "").strip("/")
    base = f"{folder}/" if folder and folder != "." else ""
    if config.data_files is None:
        return _split_by_name([name for name in files if name.startswith(base)], base)
    given = [config.data_files] if isinstance(config.data_files, str) else config.data_files
    there, matched, whole = set(files), 0, sum(map(len, files))
    splits: dict[str, dict[str, None]] = {}
    for one in given:
        entry = one if isinstance(one, DataFiles) else DataFiles(path=one)
        found = splits.setdefault(entry.split, {})
        for path in [entry.path] if isinstance(entry.path, str) else entry.path:
            wanted = base + path.removeprefix("./")
            if not set("*?[") & set(wanted):
                found.update(dict.fromkeys({wanted} & there))
                continue
            matched += whole
            if matched > MAX_MATCHED_CHARS:
                raise SourceInvalid("The config has too many files and patterns of paths; name one file by its path.")
            found.update(dict.fromkeys(name for name in files if _is_like(name, wanted)))
    return {split: list(found) for split, found in splits.items()}


def _split_by_folder(files: list[str], config: str) -> dict[str, list[str]]:
    """Files of a folder, where `config/split/file` says the split exactly, as under refs/convert/parquet; else by name."""
    parts = [name.split("/") for name in files]
    if parts and all(len(part) == 3 for part in parts):
        return {split: [name for name in files if name.split("/")[1] == split] for split in {part[1] for part in parts}}
    return _split_by_name(files, f"{config}/")


def _split_by_name(files: list[str], base: str = "") -> dict[str, list[str]]:
    """Files by the split that their names say: shards in `data/`, else folders, else file names, else all is `train`."""
    shards: dict[str, list[str]] = {}
    for name in files:
        if found := _SHARD.fullmatch(name.removeprefix(base)):
            shards.setdefault(found["split"], []).append(name)
    if shards:
        return shards
    folders = {split: [name for name in files if _in_folder(name.removeprefix(base), split)] for split in _WORDS}
    if any(folders.values()):
        return folders
    named = {split: [name for name in files if _NAMES[split].fullmatch(name.rpartition("/")[2])] for split in _WORDS}
    return named if any(named.values()) else {"train": files}


def _in_folder(name: str, split: str) -> bool:
    return any(_FOLDERS[split].fullmatch(part) for part in name.split("/")[:-1])


def _is_data(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith((".", "__")) for part in parts)
    return bool(_DATA.search(name)) and not hidden and ".." not in parts and parts[-1] not in _NOT_DATA


def _is_like(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*`, `?` and `[...]` within one name, `**` through any folders."""
    parts = name.split("/")
    ends = {0}
    for piece in pattern.split("/"):
        if piece == "**":
            ends = set(range(min(ends), len(parts) + 1)) if ends else ends
        else:
            ends = {end + 1 for end in ends if end < len(parts) and fnmatch.fnmatchcase(parts[end], piece)}
    return len(parts) in ends


def _ask(egress: Egress, repo: str, revision: str, scratch: Path) -> _Repository:
    url = API.format(repo=repo, revision=quote(revision, safe=""))
    try:
        replace(egress, max_bytes=MAX_API_BYTES).fetch(url, scratch)
        return _Repository.model_validate_json(scratch.read_bytes())
    except ValidationError:
        raise SourceFailed("The Hub describes the repository in a way that is not understood.") from None
    except DatasetTooLarge:
        raise SourceInvalid("The repository has too many files to choose from; name one by its path.") from None
    finally:
        scratch.unlink(missing_ok=True)
