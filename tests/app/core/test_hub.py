"""Laws of choosing files on the Hub: as its own libraries choose them, from what its API is documented to say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from app.core.hub import API, MAX_MATCHED_CHARS, CardConfig, HubFiles, _Repository, choose_files
from app.dataset_errors import SourceInvalid
from tests.hub import COMMIT, repository

REPOSITORIES: dict[str, list[str]] = {
    "one file": ["README.md", "rows.jsonl"],
    "files named by split": ["train.csv", "test.csv", "dev.csv"],
    "names around the split": ["my-train-v2.jsonl", "my_test_v2.jsonl", "contrain.jsonl"],
    "folders named by split": ["data/train/a.parquet", "data/train/b.parquet", "data/eval/a.parquet"],
    "folders before names": ["train/test.csv", "test/train.csv"],
    "shards": [f"data/{s}-0000{n}-of-00002.parquet" for s in ("train", "held_out") for n in range(2)],
    "shards with a hash": ["data/train-00000-of-00001-0a1b2c3d4e5f6a7b.parquet", "data/other.parquet"],
    "what is no data": ["LICENSE", "config.json", ".hidden/train.csv", "__cache__/train.csv", "rows.csv"],
}


@pytest.mark.parametrize("what", REPOSITORIES)
def test_splits_are_those_that_the_hubs_library_finds(what: str, tmp_path: Path) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    names = REPOSITORIES[what]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    resolved = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), str(tmp_path))
    kinds = (".csv", ".jsonl", ".parquet")
    expected = {
        str(split): sorted(str(Path(file).relative_to(tmp_path)) for file in files if file.endswith(kinds))
        for split, files in resolved.items()
    }

    found = {split: choose_files(names, [], config=None, split=split)[2] for split in expected}

    assert found == expected


CARD = [
    {"config_name": "all", "data_files": "**/*.csv", "default": True},
    {
        "config_name": "en",
        "data_files": [
            {"split": "train", "path": ["en/b.csv", "en/part-[0-9].csv"]},
            {"split": "test", "path": "en/held/**"},
        ],
    },
    {"config_name": "de", "data_dir": "de"},
    {"config_name": "two", "data_dir": "en", "data_files": [{"split": "train", "path": "?.csv"}]},
    {"config_name": "empty", "data_files": "none/*.csv"},
]
FILES = ["de/test.csv", "de/train.csv", "en/a.csv", "en/b.csv", "en/held/x/c.csv", "en/part-1.csv", "en/part-x.csv"]


def choose(config: str | None, split: str | None) -> tuple[str, str, list[str]]:
    return choose_files(FILES, [CardConfig.model_validate(one) for one in CARD], config=config, split=split)


@pytest.mark.parametrize(
    ("config", "split", "expected"),
    [
        (None, None, ("all", "train", FILES)),
        ("en", "train", ("en", "train", ["en/b.csv", "en/part-1.csv"])),
        ("en", "test", ("en", "test", ["en/held/x/c.csv"])),
        ("de", "test", ("de", "test", ["de/test.csv"])),
        ("two", None, ("two", "train", ["en/a.csv", "en/b.csv"])),
    ],
)
def test_a_card_says_which_files_a_config_and_split_have(
    config: str | None, split: str | None, expected: tuple[str, str, list[str]]
) -> None:
    assert choose(config, split) == expected


@pytest.mark.parametrize(
    ("config", "split", "named"),
    [
        ("fr", None, "all, en, de, two, empty"),
        ("en", None, "test, train"),
        ("en", "dev", "test, train"),
        ("empty", None, "none"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(config: str, split: str | None, named: str) -> None:
    with pytest.raises(SourceInvalid, match=named):
        choose(config, split)


def test_the_hubs_own_conversion_is_read_by_its_folders() -> None:
    names = [
        f"{config}/{split}/000{n}.parquet"
        for config in ("en", "de")
        for split in ("train", "train_sft")
        for n in (0, 1)
    ]

    assert choose_files(names, [], config="en", split="train") == (
        "en",
        "train",
        ["en/train/0000.parquet", "en/train/0001.parquet"],
    )
    with pytest.raises(SourceInvalid, match="train, train_sft"):
        choose_files(names, [], config="de", split="test")


def test_a_card_of_very_many_configs_makes_no_long_message() -> None:
    configs = [CardConfig(config_name=f"{n} " + "x" * 1000) for n in range(1000)]

    with pytest.raises(SourceInvalid, match="and 970 others") as refused:
        choose_files(FILES, configs, config="y", split=None)

    assert len(refused.value.text) < 4000


def test_a_card_that_would_take_very_long_is_refused() -> None:
    names = ["x" * 4000 + f"{number}.csv" for number in range(100)]
    patterns = ["*x" * 200 + "y"] * (MAX_MATCHED_CHARS // (4000 * len(names)) + 1)
    start = time.process_time()

    with pytest.raises(SourceInvalid, match="patterns"):
        choose_files(names, [CardConfig(data_files=patterns)], config=None, split=None)

    assert time.process_time() - start < 20  # 1 s; patterns that backtrack would take for ever


def test_addresses_are_those_that_the_hubs_client_uses() -> None:
    from huggingface_hub import hf_hub_url

    files = HubFiles(repo="owner/sums", commit=COMMIT, paths=("data/a b.csv",))

    assert files.url("data/a b.csv") == hf_hub_url("owner/sums", "data/a b.csv", repo_type="dataset", revision=COMMIT)
    assert API == "https://huggingface.co/api/datasets/{repo}/revision/{revision}"


def test_an_answer_of_the_api_is_read_as_the_hubs_client_reads_it() -> None:
    from huggingface_hub.hf_api import DatasetInfo

    answer = repository(["train.csv"], configs=[{"config_name": "x", "data_files": "train.csv"}])

    theirs: Any = DatasetInfo(**answer)  # type: ignore[no-untyped-call]
    ours = _Repository.model_validate(answer)

    assert (theirs.sha, [one.rfilename for one in theirs.siblings or []]) == (ours.sha, ["train.csv"])
    assert ours.cardData is not None
    assert theirs.card_data.to_dict()["configs"] == [
        one.model_dump(exclude_unset=True) for one in ours.cardData.configs
    ]
