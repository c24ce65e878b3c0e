"""A job's report.json as a person reads it on a terminal: what was found, what it is worth, what it cost; its estimate; and
several jobs side by side.

Shows; every number was made by the engine (`p2d.report`). Says what was projected and not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from app.progress import duration
from p2d.config import UNIFORM
from p2d.wording import counted


def summary(report: Mapping[str, Any]) -> RenderableType:
    """The report of a finished `adapt` job as three small tables."""
    result = Table("result", "", box=None, title_justify="left", pad_edge=False)
    for name, text in _results(report):
        result.add_row(name, text)
    return Group("", result, "", _seconds(report["cost"]), "", _ratios(report["cost"]), _meaning(report["cost"]))


def _results(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    heads, selection, training = report["heads"], report["selection"], report["training"]
    if heads["kept"] == heads["total"]:
        yield "heads", f"all {heads['total']}: none had to be found"
    else:
        chosen = ", ".join(f"{layer}.{head}" for layer, head in heads["chosen"])
        yield "heads found", f"{heads['kept']} of {heads['total']} by {heads['scorer']} (layer.head): {chosen}"
    if heads["proxy"] is not None:
        again = heads["reproducibility"]
        yield (
            "found again",
            f"two half-proxies share {again['top_k_overlap']} of their top {again['k']} heads (chance {again['chance']:.1f}), "
            f"rank correlation {again['rank_correlation']:.2f}",
        )
    yield "rows kept", _rows_kept(selection)
    share = f"{heads['trained_share']:.2%} of the model"
    if training["rank"] is not None:
        share += f", factors of rank {training['rank']} updates"
    yield (
        "trained",
        f"{heads['trained_parameters']:,} parameters ({share}), learning rate {training['learning_rate']:g}",
    )
    yield from _worth(report["evaluation"])


def _rows_kept(selection: Mapping[str, Any]) -> str:
    """How many rows, and by what."""
    kept = f"{selection['kept']} of {selection['rows']} by {selection['scorer']}"
    if selection["scorer"] == UNIFORM and selection["kept"] == selection["rows"]:
        kept = f"all {selection['rows']}: none had to be chosen"
    trusted, unlike = selection.get("trusted"), selection.get("unlike")  # reports of earlier versions know of neither
    if trusted or unlike:
        kept += f"; {selection['scored']} were scored" + (
            f", and for {trusted} a random sample vouches" if trusted else ""
        )
    if unlike:
        kept += f"; {unlike} do not read like the held-out rows and were left out"
    kept += _going_together(selection) if selection.get("combine") == "pass" else _like_held_out(selection)
    if repeating := selection.get("repeating"):  # reports of earlier versions know of none
        kept += f"; {repeating} nearly repeat a better one and stood behind"
    return kept


def _going_together(selection: Mapping[str, Any]) -> str:
    left_out = selection["scored"] - selection["good_enough"]
    if not left_out:
        return "; their words gave no reason to leave one out"
    them = counted(left_out, "answer does", "answers do")
    chance = ", and chance decides among the others" if selection["kept"] < selection["seem_good"] else ""
    return f"; by their words {them} not go with the prompt{chance}"


def _like_held_out(selection: Mapping[str, Any]) -> str:
    like = ""
    if (good := selection.get("good_enough")) is not None:
        enough = f"{good} are taken to be as good as most held-out rows"
        if selection.get("like_guide"):
            enough = "all in all they are like the held-out rows"
        like += f"; {enough}" + (", and chance decides among them" if selection["kept"] < selection["rows"] else "")
    if (seem_good := selection.get("seem_good")) is not None:
        known = selection["scored"] + selection["trusted"] - selection["repeating"]
        like += f"; about {seem_good} of {known} that repeat no other seem to be like them" if seem_good < known else ""
    return like


def _worth(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    change = evaluation["change"]
    better = "better" if change["high"] < 0 else "worse" if change["low"] > 0 else "no clear difference"
    yield (
        "held-out loss",
        f"{evaluation['loss_before']:.4f} before, {evaluation['loss_after']:.4f} after, on the same {evaluation['rows']} rows: "
        f"{change['difference']:+.4f} (95 % interval {change['low']:+.4f} to {change['high']:+.4f}: {better})",
    )
    yield (
        evaluation["metric"].replace("_", " "),
        f"{evaluation['metric_before']:.1%} before, {evaluation['metric_after']:.1%} after, "
        f"on {evaluation['metric_rows']} rows",
    )
    for control in evaluation.get("controls") or []:
        yield f"control {control['control']}", _beside(control)


def _verdict(control: Mapping[str, Any]) -> str:
    """Whether the job did better than a control; that it did worse nobody is to overlook."""
    verdict: str = control["verdict"]
    return verdict.upper() if verdict == "worse" else verdict


def _beside(control: Mapping[str, Any]) -> str:
    """A control, and whether the job did better."""
    change = control["against_job"]
    verdict = _verdict(control)
    if verdict == "no comparison":
        verdict += ", for it trained the same heads and rows as this job"
    else:
        interval = f"95 % interval {change['low']:+.4f} to {change['high']:+.4f}"
        verdict = f"this job: {verdict}, {change['difference']:+.4f} ({interval})"
    return (
        f"held-out loss {control['loss']:.4f} at {control['trained_parameters']:,} parameters on {control['rows']:,} rows; "
        f"{verdict}"
    )


def _seconds(cost: Mapping[str, Any]) -> Table:
    table = Table("seconds of each part", "seconds", "counts", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for line in cost["lines"]:
        if line["seconds"] >= 0.05:
            table.add_row(line["name"], f"{line['seconds']:.1f}", "yes" if line["counted"] else "no")
    table.add_row("sum of what counts", f"{cost['counted_s']:.1f}", "")
    if cost["spent_s"] < cost["counted_s"]:
        table.add_row("of it spent by this job itself", f"{cost['spent_s']:.1f}", "")
    for step in cost["not_known"]:
        table.add_row(f"{step}: given as a file", "not known", "no")
    return table


_AGAINST = (("full fine-tuning", "full", "AER", "aer"), ("LoRA, all linear layers", "lora", "aer_lora", "aer_lora"))
"""Alternatives: words, name in the report, and the ratio's two names."""


def _ratios(cost: Mapping[str, Any]) -> Table:
    table = Table("cost against", "in", "amount", "ratio", "meaning", box=None, pad_edge=False)
    for name, other, word, ratio in _AGAINST:
        seconds, flops = cost[f"{other}_s"], cost[f"{other}_flops"]
        if seconds is None:
            table.add_row(name, "seconds", "-", "-", f"{word}: not measured")
        else:
            formula = f"{word} = {cost['counted_s']:.1f} / {seconds:.1f}: {_cheaper(cost[ratio])}"
            table.add_row(name, "seconds", f"{seconds:.1f} (projected)", f"{cost[ratio]:.2f}", formula)
        if flops is not None:
            formula = f"{word}_flop = {cost['counted_flops'] / 1e12:.2f} / {flops / 1e12:.2f}"
            table.add_row("", "TFLOP", f"{flops / 1e12:.2f}", f"{cost[f'{ratio}_flop']:.2f}", formula)
    return table


def _cheaper(ratio: float) -> str:
    return "cheaper" if ratio < 1 else "NOT cheaper at this size"


def _meaning(cost: Mapping[str, Any]) -> Text:
    epochs = f"{cost['epochs']} epochs on both sides" if cost["epochs"] != 1 else "1 epoch on both sides"
    return Text(f"{epochs}. Of seconds all is counted; of operations: {cost['flops_are']}.", style="dim")


def ratios(report: Mapping[str, Any]) -> Iterator[str]:
    """What a job cost beside each alternative that it was measured against, a line each."""
    cost = report["cost"]
    for name, other, word, ratio in _AGAINST:
        if cost[f"{other}_s"] is not None:
            yield f"{word} {cost[ratio]:.2f} (against {name}): {_cheaper(cost[ratio])}"


def headline(report: Mapping[str, Any]) -> str:
    """One line about a finished job of any kind."""
    parts = [report["kind"]]
    if report.get("heads"):
        parts.append(f"{report['heads']['kept']} of {report['heads']['total']} heads")
    if report.get("selection"):
        parts.append(f"{report['selection']['kept']} of {report['selection']['rows']} rows")
    if report.get("evaluation"):
        evaluation = report["evaluation"]
        parts.append(f"held-out loss {evaluation['loss_before']:.4f} -> {evaluation['loss_after']:.4f}")
        parts += verdicts(report)
    cost = report["cost"]
    reused_s = cost["counted_s"] - cost["spent_s"]
    parts.append(
        f"{duration(cost['counted_s'])} counted" + (f", {duration(reused_s)} of it reused" if reused_s else "")
    )
    if cost["not_known"]:
        parts.append(f"not counted: {', '.join(cost['not_known'])}, given as files")
    return ", ".join(parts)


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """Each control of a job, and whether the job did better."""
    controls = (report.get("evaluation") or {}).get("controls") or []
    return [f"control {one['control']} {one['loss']:.4f}: {_verdict(one)}" for one in controls]


_COMPARED = {
    "loss_before": ("held-out loss before", "{:.4f}"),
    "loss_after": ("held-out loss after", "{:.4f}"),
    "metric_before": ("metric before", "{:.1%}"),
    "metric_after": ("metric after", "{:.1%}"),
    "trained_parameters": ("trained parameters", "{:,}"),
    "learning_rate": ("learning rate", "{:g}"),
    "counted_s": ("seconds counted", "{:.1f}"),
    "aer": ("AER", "{:.2f}"),
    "aer_lora": ("AER against LoRA", "{:.2f}"),
    "peak_memory_bytes": ("peak memory, bytes", "{:,}"),
}
"""Lines of the table of `side_by_side`: metric -> words and form."""


def side_by_side(comparison: Mapping[str, Any]) -> RenderableType:
    """What GET /comparisons/{id} answered."""
    jobs = [job["name"] or job["id"] for job in comparison["jobs"]]
    table = Table(
        "", *(Column(Text(f"{place}  {name}")) for place, name in enumerate(jobs, 1)), box=None, pad_edge=False
    )
    table.add_row("status", *(job["status"] for job in comparison["jobs"]))
    for setting in comparison["settings"]:
        table.add_row(Text(setting["pointer"]), *(Text(str(value)) for value in setting["values"]))
    for metric, (words, form) in _COMPARED.items():
        values = [one[metric] for one in comparison["metrics"]]
        if any(value is not None for value in values):
            table.add_row(words, *("-" if value is None else form.format(value) for value in values))
    return Group(table, "", *(Text(line) for pair in comparison["pairs"] for line in _agreement(pair)))


def _agreement(pair: Mapping[str, Any]) -> Iterator[str]:
    one, other = pair["one"] + 1, pair["other"] + 1
    if (heads := pair["heads"]) is not None:
        shared, ranks = _shared(heads["chosen"]), heads["rank_correlation"]
        yield f"{one} and {other}: heads {shared}; rank correlation {ranks:.2f}"
    if (rows := pair["rows"]) is not None:
        yield f"{one} and {other}: kept rows {_shared(rows)}"
    if (loss := pair["loss"]) is not None:
        better = {"one": f"{one} is better", "other": f"{other} is better"}.get(loss["verdict"], loss["verdict"])
        interval = f"95 % interval {loss['low']:+.4f} to {loss['high']:+.4f}"
        yield f"{one} -> {other}: held-out loss {loss['difference']:+.4f} ({interval}, {loss['rows']} rows: {better})"
    for what, why in pair["reasons"].items():
        yield f"{one} and {other}: {what} cannot be compared: {why}"


def _shared(overlap: Mapping[str, Any]) -> str:
    return f"{overlap['one']} and {overlap['other']}, {overlap['shared']} of them shared"


def foreseen(estimate: Mapping[str, Any]) -> RenderableType:
    """What POST /estimates answered."""
    table = Table("step", "seconds", "in eight of ten cases", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    whole = {"step": "all", "seconds": estimate["seconds"]}
    for step in [*estimate["steps"], whole]:
        seconds = step["seconds"]
        table.add_row(step["step"], f"{seconds['p50']:.1f}", f"{seconds['p10']:.1f} to {seconds['p90']:.1f}")
    kept, size, wait = estimate["rows"], estimate["artifacts"]["total"], estimate["wait"]
    lines = [
        f"Before it: {wait['p50']:.0f} s in the queue ({wait['p10']:.0f} to {wait['p90']:.0f})",
        f"{kept['kept']} of {kept['train']} rows kept, {_range(size['least'], size['most'])} stored",
        f"peak memory {_peak(estimate['memory']['peak'])}",
    ]
    if (cost := estimate["cost"]) is not None:
        lines.append(f"cost {cost['job']['p50']:,.2f} ({cost['job']['p10']:,.2f} to {cost['job']['p90']:,.2f})")
    if estimate["aer"] is not None:
        lines.append(f"projected AER {estimate['aer']:.2f}, against LoRA {estimate['aer_lora']:.2f}")
    for name, word in (("full", "full fine-tuning"), ("lora", "LoRA")):
        if (other := estimate[name]) is not None:
            price = "" if other["cost"] is None else f", cost {other['cost']:,.2f}"
            said = f"{duration(other['seconds'])}, peak memory {_peak(other['peak'])}"
            said += f", {other['artifact_bytes'] / 1e6:,.1f} MB of weights{price}"
            lines.append(f"{word} instead: {said}{'' if other['fits'] else ', does not fit'}")
    lines += [f"{name}: {text}" for name, text in estimate["basis"].items()]
    lines += _decided(estimate)
    lines += [f"Note: {text}" for text in estimate["warnings"]] + [
        f"Does not fit: {text}" for text in estimate["misfits"]
    ]
    lines += [f"Would fit: {one['pointer']} = {one['value']} ({one['why']})" for one in estimate["changes"]]
    return Group(table, "", *(Text(line) for line in lines))


def _decided(estimate: Mapping[str, Any]) -> Iterator[str]:
    """What each `auto` became, a line each; where that was measured is left to `reasons`."""
    config = estimate["config"]
    for pointer, reason in estimate["reasons"].items():
        group, name = pointer.strip("/").split("/")
        yield f"{group}.{name} = {_short(config[group][name])}: {re.sub(r' [(]docs/[^)]*[)]', '', reason)}"
    left = [f"training.{name}" for name in ("learning_rate", "precision") if config["training"][name] == "auto"]
    if left:
        yield f"Decided in the run: {', '.join(left)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else "null" if value is None else str(value)


def _peak(peak: Mapping[str, int]) -> str:
    host = f"{peak['host'] / 1e9:.1f} GB"
    return host if not peak["device"] else f"{peak['device'] / 1e9:.1f} GB of the device and {host} beside it"


def _range(least: int, most: int) -> str:
    return f"up to {most / 1e6:,.1f} MB" if least < most else f"{most / 1e6:,.1f} MB"
