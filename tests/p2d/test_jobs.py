"""A whole job in one process on a tiny model: both recipes, all kinds, the same files each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.report import headline, summary
from p2d import Result, adapt, identify_heads, select_data
from p2d.adapters import load_adapter, merge
from p2d.config import Control, DataConfig, HeadsConfig, JobConfig, TrainingConfig
from p2d.errors import Cancelled, ConfigError, DatasetFileMissing, DatasetTooSmall, RowTooLong, TemplateRefuses
from p2d.evaluation import row_losses
from p2d.models import load_base_model
from p2d.pipeline import STEPS, ModelCache, PlannedStep, StepCall, is_input, plan_steps, run_step
from p2d.plans import split_rows
from p2d.rows import Turn, conversation, load_rows, write_rows
from p2d.selection_file import load_kept, read_selection
from tests.factories import some_rows, tiny_model_dir

RESULTS = {"heads.safetensors", "manifest.json", "head_map.json", "selection.jsonl", "report.json"}


SYSTEM, ASKED, SAID = Turn("system", "Add up."), Turn("user", "1+1"), Turn("assistant", "2")
EARLIER = ((), (SYSTEM,), (ASKED, SAID), (SYSTEM, ASKED, SAID))


def a_config(recipe: str = "default", controls: tuple[Control, ...] = ()) -> JobConfig:
    return JobConfig(
        recipe=recipe,
        heads=HeadsConfig(proxy_rows=8, ratio=0.2),
        data=DataConfig(ratio=0.3, n_demos=3, n_queries=2),
        training=TrainingConfig(epochs=2),
        controls=controls,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", some_rows(24))
    write_rows(folder / "held_out.jsonl", some_rows(12, first=200))
    return folder


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One finished job that several tests look at."""
    out = tmp_path_factory.mktemp("whole")
    held_out = files / "held_out.jsonl"
    return adapt(
        model=tiny_dir, data=files / "train.jsonl", validation=held_out, out=out, config=a_config(), device="cpu"
    )


def shown(report: Mapping[str, Any]) -> str:
    """What `p2d show` prints of a report."""
    console = Console(width=500)
    with console.capture() as capture:
        console.print(summary(report))
    return capture.get()


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_recipe_adapts_the_model_and_reports(recipe: str, tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    chats = [replace(row, before=EARLIER[row.line % 4]) for row in some_rows(24)]
    (tmp_path / "chats.jsonl").write_bytes(b"".join(map(conversation, chats)))

    result = adapt(
        model=tiny_dir,
        data=tmp_path / "chats.jsonl",
        validation=files / "held_out.jsonl",
        out=tmp_path,
        config=a_config(recipe),
        device="cpu",
    )

    assert {path.name for path in tmp_path.iterdir()} >= RESULTS
    kept = load_kept(tmp_path / "selection.jsonl")
    assert list(kept) == [row for row in chats if row.line in {one.line for one in kept}]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # the scratch folder is gone
    report = result.report
    assert report["evaluation"]["loss_after"] < report["evaluation"]["loss_before"]
    assert report["heads"]["kept"] == 4  # ceil(0.2 * 18)
    assert report["heads"]["trained_parameters"] == report["training"]["n_parameters"]
    assert (report["selection"]["kept"], report["selection"]["repeating"]) == (8, 0)
    assert "stood behind" not in shown(report)
    repeating = {**report, "selection": {**report["selection"], "repeating": 3}}
    assert "; 3 nearly repeat a better one and stood behind" in shown(repeating)
    good = {**report, "selection": {**report["selection"], "good_enough": 0, "scored": 40}}
    assert "; 0 are taken to be as good as most held-out rows, and chance decides among them" in shown(good)
    assert "as good as most" not in shown(report)  # fewer than eight rows guide
    sampled = {**report, "selection": {**good["selection"], "trusted": 24, "seem_good": 9, "rows": 40, "scored": 16}}
    assert "; 16 were scored, and for 24 a random sample vouches; 0 are taken" in shown(sampled)
    assert "; about 9 of 40 that repeat no other seem to be like them" in shown(sampled)
    left_out = {**report, "selection": {**sampled["selection"], "unlike": 5}}
    assert "vouches; 5 do not read like the held-out rows and were left out; 0 are taken" in shown(left_out)
    left_out["selection"]["trusted"] = 0
    assert "; 16 were scored; 5 do not read like the held-out rows" in shown(left_out)
    del repeating["selection"]["repeating"]  # as in reports of earlier versions
    assert "stood behind" not in shown(repeating)
    assert sum(row.kept for row in read_selection(tmp_path / "selection.jsonl")) == 8
    assert report["cost"]["aer"] > 0
    assert report["cost"]["aer_flop"] > report["cost"]["counted_flops"] / report["cost"]["lora_flops"] / 2 > 0
    worked = {"heads", "respond", "train"}
    assert {step["step"] for step in report["cost"]["steps"] if step["flops"]} == worked
    assert report["evaluation"]["full_fine_tuning"]["projected"] is True
    expected = {
        "default": ("attribution", "alignment_likelihood", ["v", "o"]),
        "paper": ("pad", "icl", ["q", "k", "v"]),
    }[recipe]
    assert (report["heads"]["scorer"], report["selection"]["scorer"], report["heads"]["projections"]) == expected


def test_a_job_without_settings_trains_a_low_rank_in_all_heads_on_all_rows_that_pass_and_asks_no_model_which(
    tiny_dir: Path, files: Path, tmp_path: Path
) -> None:
    held_out = files / "held_out.jsonl"
    result = adapt(model=tiny_dir, data=files / "train.jsonl", validation=held_out, out=tmp_path, device="cpu")

    report = result.report
    heads, training, config = report["heads"], report["training"], report["config"]
    assert (heads["scorer"], heads["kept"], heads["proxy"]) == ("uniform", 18, None)
    assert heads["reproducibility"]["rank_correlation"] == 0.0
    assert (training["rank"], config["training"]["rank"]) == (8, 8)
    # Layers, units of o and of v, the rank, both sides of a slice.
    assert training["n_parameters"] == 3 * (6 + 2) * 8 * (16 + 96)
    assert (report["selection"]["kept"], report["selection"]["scorer"], config["data"]["ratio"]) == (24, "lexical", 1.0)
    assert config["training"]["epochs"] == 3  # 6 steps each
    assert config["training"]["learning_rate"] == training["learning_rate"]
    assert config["training"]["precision"] == report["dtype"]
    assert {"/training/learning_rate", "/training/precision"} <= set(report["reasons"])
    assert "auto" not in [value for group in ("heads", "data", "training") for value in config[group].values()]
    assert report["evaluation"]["loss_after"] < report["evaluation"]["loss_before"]
    spent = {step["step"]: (step["flops"], step["tokens"], step["rows"]) for step in report["cost"]["steps"]}
    assert spent["heads"] == (0, 0, 0)
    assert spent["respond"] == (0, 0, 24)
    assert "all 18: none had to be found" in shown(report)
    assert "half-proxies" not in shown(report)
    assert "24 of 24 by lexical; their words gave no reason to leave one out" in shown(report)
    left_out = {**report, "selection": {**report["selection"], "good_enough": 21}}
    assert "; by their words 3 answers do not go with the prompt" in shown(left_out)
    some = {**report, "selection": {**report["selection"], "good_enough": 23, "kept": 9}}
    assert "9 of 24 by lexical; by their words 1 answer does not go with the prompt, and chance decides" in shown(some)
    everything = {**report, "selection": {**report["selection"], "scorer": "uniform", "combine": "quality"}}
    everything["selection"] |= {"good_enough": None, "seem_good": None}
    assert "all 24: none had to be chosen" in shown(everything)


def test_a_validation_dataset_that_can_guide_decides_how_many_rows_are_kept(tiny_dir: Path, tmp_path: Path) -> None:
    rows = some_rows(96)
    data, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    write_rows(data, [row for place, row in enumerate(rows) if place % 4])
    write_rows(held_out, rows[::4])  # 24 rows, of which 9 guide
    config = JobConfig(kind="select_data")

    result = adapt(model=tiny_dir, data=data, validation=held_out, out=tmp_path / "out", config=config, device="cpu")

    report, selection = result.report, result.report["selection"]
    assert selection["kept"] == max(selection["seem_good"], 8)
    assert report["config"]["data"]["ratio"] == selection["kept"] / 72
    assert "as many rows as seemed to be like those of the validation dataset" in report["reasons"]["/data/ratio"]
    assert not [warning for warning in report["warnings"] if "as clean as it is" in warning]


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_a_family_with_fused_weights_and_one_with_windows_are_adapted_the_same_way(
    family: str, files: Path, tmp_path: Path
) -> None:
    directory = tiny_model_dir(tmp_path / family, family=family)

    result = adapt(
        model=directory,
        data=files / "train.jsonl",
        validation=files / "held_out.jsonl",
        out=tmp_path / "out",
        config=a_config(),
        device="cpu",
    )

    evaluation = result.report["evaluation"]
    assert evaluation["loss_after"] < evaluation["loss_before"]
    merged = load_base_model(merge(directory, result.out, tmp_path / "merged"), precision="fp32", device="cpu")
    split = split_rows(load_rows(files / "train.jsonl"), load_rows(files / "held_out.jsonl"), seed=0, proxy_rows=8)
    loss = row_losses(merged, [merged.renderer.render(row) for row in split.evaluation]).mean
    assert loss == pytest.approx(evaluation["loss_after"], rel=1e-2)  # trained in bf16 where the machine has it


def test_the_reported_loss_is_that_of_base_and_adapter_loaded_afresh(
    tiny_dir: Path, files: Path, whole: Result
) -> None:
    base = load_base_model(tiny_dir, precision=whole.report["dtype"], device="cpu")
    load_adapter(whole.out).apply(base)
    split = split_rows(load_rows(files / "train.jsonl"), load_rows(files / "held_out.jsonl"), seed=0, proxy_rows=8)

    loss = row_losses(base, [base.renderer.render(row) for row in split.evaluation]).mean

    assert loss == whole.report["evaluation"]["loss_after"]


def test_a_table_of_the_datasets_library_gives_the_adapter_of_its_file(
    whole: Result, tiny_dir: Path, files: Path, tmp_path: Path
) -> None:
    from datasets import Dataset

    tables = [
        Dataset.from_list([{"prompt": row.prompt, "answer": row.answer} for row in load_rows(files / name)])
        for name in ("train.jsonl", "held_out.jsonl")
    ]

    result = adapt(model=tiny_dir, data=tables[0], validation=tables[1], out=tmp_path, config=a_config(), device="cpu")

    assert result.file("heads.safetensors").read_bytes() == whole.file("heads.safetensors").read_bytes()


def test_earlier_results_take_the_place_of_the_steps_that_make_them(
    tiny_dir: Path, files: Path, whole: Result, tmp_path: Path
) -> None:
    train, held_out = files / "train.jsonl", files / "held_out.jsonl"
    found = identify_heads(
        model=tiny_dir, data=train, validation=held_out, out=tmp_path / "heads", config=a_config(), device="cpu"
    )
    chosen = select_data(
        model=tiny_dir,
        data=train,
        validation=held_out,
        out=tmp_path / "rows",
        config=a_config(),
        head_map=found.file("head_map.json"),
        device="cpu",
    )
    steps: list[str] = []

    result = adapt(
        model=tiny_dir,
        data=train,
        validation=held_out,
        out=tmp_path / "again",
        config=a_config(),
        head_map=found.file("head_map.json"),
        selection=chosen.file("selection.jsonl"),
        device="cpu",
        on_progress=lambda planned, done, total, metrics: steps.append(planned.step),
    )

    assert set(steps) == {"validate", "train", "evaluate", "package"}
    same_bytes(result.out, whole.out)


def same_bytes(one: Path, other: Path) -> None:
    """A job is a pure function of its input: what it makes has one hash."""
    for name in ("heads.safetensors", "head_map.json", "selection.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_head_map_of_another_model_is_refused(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    other = tiny_model_dir(tmp_path / "other", seed=1)
    found = identify_heads(
        model=other, data=files / "train.jsonl", out=tmp_path / "heads", config=a_config(), device="cpu"
    )

    with pytest.raises(ConfigError, match="The head map is of 'other'"):
        select_data(
            model=tiny_dir,
            data=files / "train.jsonl",
            out=tmp_path / "rows",
            config=a_config(),
            head_map=found.file("head_map.json"),
            device="cpu",
        )


def test_a_given_head_map_is_the_jobs_scorer_and_forbids_a_fast_mode_that_nobody_measured(
    tiny_dir: Path, files: Path, tmp_path: Path
) -> None:
    by_chance = replace(a_config(), heads=replace(a_config().heads, scorer="random"))
    data, given = files / "train.jsonl", tmp_path / "heads" / "head_map.json"
    identify_heads(model=tiny_dir, data=data, out=given.parent, config=by_chance, device="cpu")

    fast = replace(a_config(), data=DataConfig(mode="fast", ratio=0.3))
    with pytest.raises(ConfigError, match="1 field") as caught:
        adapt(model=tiny_dir, data=data, out=tmp_path / "fast", config=fast, head_map=given, device="cpu")
    assert "the head scorer 'random'" in caught.value.errors[0].message
    assert not (tmp_path / "fast").exists()

    chosen = select_data(
        model=tiny_dir, data=data, out=tmp_path / "rows", config=a_config(), head_map=given, device="cpu"
    )
    assert chosen.report["config"]["heads"]["scorer"] == chosen.report["heads"]["scorer"] == "random"
    assert chosen.report["reasons"]["/heads/scorer"] == "it made the head map that is given"


def test_controls_are_trained_at_the_same_size(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    config = a_config(controls=("random_heads", "random_data"))

    result = adapt(model=tiny_dir, data=files / "train.jsonl", out=tmp_path, config=config, device="cpu")

    heads, rows = result.report["evaluation"]["controls"]
    assert (heads["control"], rows["control"]) == ("random_heads", "random_data")
    assert heads["rows"] == rows["rows"] == result.report["selection"]["kept"]
    assert rows["trained_parameters"] == result.report["heads"]["trained_parameters"]
    info = result.report["base_model"]
    one_head = 2 * info["head_dim"] * info["hidden_size"]  # its v and o slices
    assert abs(heads["trained_parameters"] - rows["trained_parameters"]) <= one_head


def test_a_control_that_trains_what_the_job_trains_gets_no_verdict(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    config = replace(a_config(controls=("random_heads", "random_data")), data=DataConfig(ratio=1.0))

    result = adapt(model=tiny_dir, data=files / "train.jsonl", out=tmp_path, config=config, device="cpu")

    heads, rows = result.report["evaluation"]["controls"]
    assert heads["verdict"] in ("better", "worse", "no clear difference")
    assert rows["verdict"] == "no comparison"
    assert rows["rows"] == result.report["rows"]["train"]["rows"]
    assert not any("as clean as it is" in text for text in result.report["warnings"])  # no row is left out
    (warning,) = (text for text in result.report["warnings"] if "random_data" in text)
    assert "compares nothing" in warning
    assert f"control random_data {rows['loss']:.4f}: no comparison" in headline(result.report)
    assert "no comparison, for it trained the same heads and rows" in shown(result.report)


def test_lora_on_all_rows_is_trained_as_a_control_and_the_job_is_held_against_it(
    tiny_dir: Path, files: Path, tmp_path: Path
) -> None:
    config, outs = a_config(controls=("lora",)), [tmp_path / name for name in ("one", "two")]

    one, two = (adapt(model=tiny_dir, data=files / "train.jsonl", out=out, config=config, device="cpu") for out in outs)

    evaluation = one.report["evaluation"]
    (lora,) = evaluation["controls"]
    assert (lora["control"], lora["heads"], lora["rows"]) == ("lora", 0, one.report["rows"]["train"]["rows"])
    assert lora["trained_parameters"] == evaluation["lora"]["trained_parameters"]
    assert lora["loss"] < evaluation["loss_before"]
    assert lora["verdict"] in ("better", "worse", "no clear difference")
    assert f"control lora {lora['loss']:.4f}: " in headline(one.report)
    assert lora["against_job"]["difference"] == pytest.approx(evaluation["loss_after"] - lora["loss"])
    losses, again = (json.loads(out.file("row_losses.json").read_text()) for out in (one, two))
    assert losses["lora"] == again["lora"]
    assert len(losses["lora"]) == evaluation["rows"]
    alone = adapt(model=tiny_dir, data=files / "train.jsonl", out=tmp_path / "alone", config=a_config(), device="cpu")
    assert json.loads(alone.file("row_losses.json").read_text())["after"] == losses["after"]


@pytest.mark.parametrize("scorers", [("random", "random"), ("shift", "alignment")])
def test_every_scorer_may_meet_every_other(
    scorers: tuple[str, str], tiny_dir: Path, files: Path, tmp_path: Path
) -> None:
    config = a_config()
    config = replace(
        config, heads=replace(config.heads, scorer=scorers[0]), data=replace(config.data, scorer=scorers[1])
    )

    result = select_data(model=tiny_dir, data=files / "train.jsonl", out=tmp_path, config=config, device="cpu")

    assert (result.report["heads"]["scorer"], result.report["selection"]["scorer"]) == scorers


def test_a_failed_job_leaves_nothing_behind(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    def cancel(planned: PlannedStep, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if planned.step == "train":
            raise Cancelled("asked to stop")

    with pytest.raises(Cancelled):
        adapt(
            model=tiny_dir,
            data=files / "train.jsonl",
            out=tmp_path / "out",
            config=a_config(),
            device="cpu",
            on_progress=cancel,
        )

    assert not (tmp_path / "out").exists()


def test_every_over_long_row_is_listed_before_the_model_loads(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    rows = some_rows(24)
    rows[4] = replace(rows[4], prompt="long " * 200)
    rows[20] = replace(rows[20], answer="long " * 200)
    write_rows(tmp_path / "train.jsonl", rows)

    with pytest.raises(RowTooLong) as caught:
        adapt(
            model=tiny_dir,
            data=tmp_path / "train.jsonl",
            validation=files / "held_out.jsonl",
            out=tmp_path / "out",
            config=a_config(),
            device="cpu",
        )

    assert [(error.pointer, error.line) for error in caught.value.errors] == [("/dataset", 5), ("/dataset", 21)]
    assert "long" not in json.dumps([error.message for error in caught.value.errors]).replace("long ", "")


def test_conversations_that_the_models_template_refuses_are_listed_before_it_loads(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "model")
    template = model / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusing + template.read_text())
    chats = [replace(row, before=EARLIER[row.line % 4]) for row in some_rows(24)]
    (tmp_path / "chats.jsonl").write_bytes(b"".join(map(conversation, chats)))

    with pytest.raises(TemplateRefuses) as caught:
        adapt(model=model, data=tmp_path / "chats.jsonl", out=tmp_path / "out", config=a_config(), device="cpu")

    assert [error.line for error in caught.value.errors] == [row.line for row in chats if SYSTEM in row.before]


def test_over_long_rows_are_listed_file_by_file_in_line_order(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    config = replace(a_config(), training=TrainingConfig(epochs=1, max_length=9))

    with pytest.raises(RowTooLong) as caught:
        adapt(
            model=tiny_dir,
            data=files / "train.jsonl",
            validation=files / "held_out.jsonl",
            out=tmp_path,
            config=config,
            device="cpu",
        )

    listed = [(error.pointer, error.line) for error in caught.value.errors]
    every = [("/dataset", line) for line in range(1, 25)] + [("/validation_dataset", line) for line in range(1, 13)]
    assert listed == every


def test_a_refused_job_leaves_no_folder_and_a_missing_file_is_said(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetFileMissing):
        adapt(model=tiny_dir, data=tmp_path / "none.jsonl", out=tmp_path / "out", config=a_config(), device="cpu")

    assert not (tmp_path / "out").exists()


def test_a_proxy_larger_than_the_dataset_is_refused(tiny_dir: Path, files: Path, tmp_path: Path) -> None:
    config = replace(a_config(), heads=HeadsConfig(scorer="attribution", proxy_rows=100))

    with pytest.raises(DatasetTooSmall):
        adapt(model=tiny_dir, data=files / "train.jsonl", out=tmp_path, config=config, device="cpu")


def test_steps_on_separate_workers_give_the_bytes_of_one(
    tiny_dir: Path, files: Path, whole: Result, tmp_path: Path
) -> None:
    """Each step gets only the files that STEPS names for it, as a worker would fetch them, and a model of its own."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copyfile(files / "train.jsonl", store / "dataset.jsonl")
    shutil.copyfile(files / "held_out.jsonl", store / "validation.jsonl")
    for number, planned in enumerate(plan_steps(a_config(), 24, shard_rows=100)):
        inputs, out = tmp_path / f"in-{number}", tmp_path / f"out-{number}"
        inputs.mkdir()
        for path in store.iterdir():
            if is_input(planned.step, path.name):
                shutil.copyfile(path, inputs / path.name)
        call = StepCall(step=planned.step, config=a_config(), model_dir=tiny_dir, inputs=inputs, out=out, device="cpu")
        run_step(call, models=ModelCache())
        for pattern in STEPS[planned.step].writes:
            for path in out.glob(pattern):
                shutil.copyfile(path, store / path.name)

    same_bytes(store, whole.out)
