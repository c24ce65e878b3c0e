"""A comparison to look at: one self-contained HTML page with drawn curves, or one CSV of everything. Computes nothing.

The page loads nothing and runs no script. Names and values come from users, so every text is escaped.
"""

from __future__ import annotations

import colorsys
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from p2d.comparison import Comparison, Facts, LossDifference, Metrics, Pair
from p2d.pipeline import STEPS

NAMED_COLUMNS = 4
"""Jobs whose names fit side by side above a table."""

Row = tuple[str, str, str, str, Any]
"""section, job, other job, name, value."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
thead th { white-space: nowrap; vertical-align: bottom; } small { color: #5b6776; } span[title] { white-space: nowrap; }
th, td { border-bottom: 1px solid #d9e0e8; padding: .3rem .7rem; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.good { background: #e2f3e6; } td.bad { background: #fbe6e3; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.note { color: #5b6776; }
"""


def to_csv(jobs: Sequence[Facts], comparison: Comparison) -> str:
    """Everything, one value a line; `other_job` only where it is about two jobs."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("section", "job", "other_job", "name", "value"))
    table.writerows(_rows(jobs, comparison))
    return text.getvalue()


def _rows(jobs: Sequence[Facts], comparison: Comparison) -> Iterator[Row]:
    for setting in comparison.settings:
        for job, value in zip(jobs, setting.values, strict=True):
            yield "settings", job.id, "", setting.pointer, _plain(value)
    for job, metrics in zip(jobs, comparison.metrics, strict=True):
        for name, value in asdict(metrics).items():
            if name == "step_s":
                yield from (("seconds", job.id, "", step, seconds) for step, seconds in value.items())
            else:
                yield "metrics", job.id, "", name, value
    for pair in comparison.pairs:
        yield from _pair_rows(pair, jobs[pair.one].id, jobs[pair.other].id)
    for job, losses in zip(jobs, comparison.curves.losses, strict=True):
        for tokens, loss in zip(comparison.curves.tokens, losses, strict=True):
            yield "curve", job.id, "", str(tokens), loss


def _pair_rows(pair: Pair, one: str, other: str) -> Iterator[Row]:
    for name, reason in pair.reasons.items():
        yield name, one, other, "absent", reason
    if pair.heads is not None:
        yield "heads", one, other, "rank_correlation", pair.heads.rank_correlation
        for name, value in asdict(pair.heads.chosen).items():
            yield "heads", one, other, name, value
        for layer in pair.heads.layers:
            yield "heads", one, other, f"layer {layer.layer} jaccard", layer.chosen.jaccard
            yield "heads", one, other, f"layer {layer.layer} rank_correlation", layer.rank_correlation
    for section in ("rows", "loss"):
        if (found := getattr(pair, section)) is not None:
            for name, value in asdict(found).items():
                yield section, one, other, name, value


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else json.dumps(value)


# --- the page --------------------------------------------------------------------------------------------------------


def to_html(title: str, jobs: Sequence[Facts], comparison: Comparison) -> str:
    """The page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        _jobs(jobs),
        _section("Results", _metric_table(jobs, comparison.metrics)),
        _section("Held-out loss, pair by pair", _matrix(jobs, comparison.pairs, _loss_cell), _LOSS_NOTE),
        _section(
            "Training loss", _curves(jobs, comparison), "Over the tokens trained on; steps in between are averaged."
        ),
        _section("Chosen heads in common", _matrix(jobs, comparison.pairs, _heads_cell), _HEADS_NOTE),
        _layers(jobs, comparison.pairs),
        _section(
            "Kept rows in common", _matrix(jobs, comparison.pairs, _rows_cell), "Shared rows, and their Jaccard ratio."
        ),
        _section(
            "Seconds of each step", _seconds(jobs, comparison.metrics), "Measured inside the step, loading included."
        ),
        _section("What was asked differently", _settings(jobs, comparison)),
        "</body></html>\n",
    ]
    return "".join(parts)


_LOSS_NOTE = (
    "Row minus column, nats per answer token on the same rows, with the 95 % interval of a paired bootstrap; below zero the "
    "row's job is better."
)
_HEADS_NOTE = "Jaccard ratio of the chosen heads, and Spearman's rank correlation over all heads."


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<h2>{escape(title)}</h2>{said}<div class="wide">{body}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(row[1:])}</tr>' for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="n {kind}">{escape(text)}</td>'


def _colour(place: int, count: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(place / max(1, count), 0.42, 0.6)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _key(jobs: Sequence[Facts], place: int) -> str:
    return f'<span class="key" style="background:{_colour(place, len(jobs))}"></span>'


def _label(jobs: Sequence[Facts], place: int) -> str:
    return f"{_key(jobs, place)}{place + 1}. {escape(jobs[place].name or jobs[place].id)}"


def _short(jobs: Sequence[Facts], place: int) -> str:
    """Where names have no room: of many jobs the number alone, the name on hovering."""
    if len(jobs) <= NAMED_COLUMNS:
        return _label(jobs, place)
    name = escape(jobs[place].name or jobs[place].id)
    return f'<span title="{name}">{_key(jobs, place)}{place + 1}</span>'


def _columns(jobs: Sequence[Facts]) -> list[str]:
    return [_short(jobs, place) for place in range(len(jobs))]


def _jobs(jobs: Sequence[Facts]) -> str:
    return _table(
        ["job", "id", "kind"],
        [
            [_label(jobs, place), f"<td>{escape(job.id)}</td>", f"<td>{escape(str(job.config.get('kind', '')))}</td>"]
            for place, job in enumerate(jobs)
        ],
    )


_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss_before", "held-out loss before", lambda value: f"{value:.4f}"),
    ("loss_after", "held-out loss after", lambda value: f"{value:.4f}"),
    ("metric_before", "task metric before", lambda value: f"{value:.1%}"),
    ("metric_after", "task metric after", lambda value: f"{value:.1%}"),
    ("trained_parameters", "trained parameters", lambda value: f"{value:,.0f}"),
    ("learning_rate", "learning rate", lambda value: f"{value:.3g}"),
    ("aer", "AER, seconds", lambda value: f"{value:.3f}"),
    ("aer_lora", "AER against LoRA, seconds", lambda value: f"{value:.3f}"),
    ("aer_flop", "AER, operations", lambda value: f"{value:.3f}"),
    ("aer_lora_flop", "AER against LoRA, operations", lambda value: f"{value:.3f}"),
    ("counted_s", "seconds counted", lambda value: f"{value:,.1f}"),
    ("spent_s", "of them its own", lambda value: f"{value:,.1f}"),
    ("full_s", "full fine-tuning, projected s", lambda value: f"{value:,.1f}"),
    ("lora_s", "LoRA, projected s", lambda value: f"{value:,.1f}"),
    ("peak_memory_bytes", "peak memory", lambda value: f"{value / 1e9:.2f} GB"),
)


def _metric_table(jobs: Sequence[Facts], metrics: Sequence[Metrics]) -> str:
    rows = []
    tasks = {one.metric for one in metrics if one.metric}
    task = min(tasks).replace("_", " ") if len(tasks) == 1 else "task metric"
    for name, words, show in _SHOWN:
        values, said = [getattr(one, name) for one in metrics], words.replace("task metric", task)
        if any(value is not None for value in values):
            rows.append([escape(said), *(_cell("-" if value is None else show(value)) for value in values)])
    return _table(["", *_columns(jobs)], rows)


def _matrix(jobs: Sequence[Facts], pairs: Sequence[Pair], cell: Callable[[Pair, bool], str]) -> str:
    """Every job against every other; `cell` is told whether the row is the pair's other job."""
    by_places = {(pair.one, pair.other): pair for pair in pairs}
    rows = []
    for row in range(len(jobs)):
        cells = [_short(jobs, row)]
        for column in range(len(jobs)):
            if row == column:
                cells.append(_cell(""))
            else:
                pair = by_places[min(row, column), max(row, column)]
                cells.append(cell(pair, row > column))
        rows.append(cells)
    return _table(["", *_columns(jobs)], rows)


def _absent(pair: Pair, name: str) -> str:
    return f'<td class="n" title="{escape(pair.reasons[name])}">-</td>'


def _loss_cell(pair: Pair, row_is_other: bool) -> str:
    if pair.loss is None:
        return _absent(pair, "loss")
    found: LossDifference = pair.loss
    value, low, high = found.difference, found.low, found.high
    if not row_is_other:
        value, low, high = -value, -high, -low
    kind = "good" if high < 0 else "bad" if low > 0 else ""
    return f'<td class="n {kind}">{value:+.4f}<br><small>{low:+.4f} to {high:+.4f}</small></td>'


def _heads_cell(pair: Pair, _: bool) -> str:
    if pair.heads is None:
        return _absent(pair, "heads")
    return _cell(f"{pair.heads.chosen.jaccard:.2f}, {pair.heads.rank_correlation:+.2f}")


def _rows_cell(pair: Pair, _: bool) -> str:
    if pair.rows is None:
        return _absent(pair, "rows")
    return _cell(f"{pair.rows.shared:,}, {pair.rows.jaccard:.2f}")


def _layers(jobs: Sequence[Facts], pairs: Sequence[Pair]) -> str:
    """Rank correlation of every pair in every layer."""
    known = [pair for pair in pairs if pair.heads is not None]
    if not known:
        return ""
    n_layers = max(len(pair.heads.layers) for pair in known if pair.heads)
    rows = [
        [
            f"{pair.one + 1} and {pair.other + 1}",
            *(_cell(f"{layer.rank_correlation:+.2f}") for layer in (pair.heads.layers if pair.heads else ())),
        ]
        for pair in known
    ]
    head = ["jobs", *(str(layer) for layer in range(n_layers))]
    return _section("Rank correlation of the heads in each layer", _table(head, rows))


def _seconds(jobs: Sequence[Facts], metrics: Sequence[Metrics]) -> str:
    done = {step for one in metrics for step in one.step_s}
    steps = [*(step for step in STEPS if step in done), *sorted(done - {*STEPS})]
    rows = [
        [escape(step), *(_cell(f"{one.step_s[step]:,.1f}" if step in one.step_s else "-") for one in metrics)]
        for step in steps
    ]
    return _table(["", *_columns(jobs)], rows)


def _settings(jobs: Sequence[Facts], comparison: Comparison) -> str:
    if not comparison.settings:
        return "<p>Nothing.</p>"
    rows = [
        [escape(setting.pointer), *(f"<td>{escape(str(_plain(value)))}</td>" for value in setting.values)]
        for setting in comparison.settings
    ]
    return _table(["", *_columns(jobs)], rows)


def _curves(jobs: Sequence[Facts], comparison: Comparison) -> str:
    """One line a job, drawn as SVG."""
    tokens, lines = comparison.curves.tokens, comparison.curves.losses
    known = [loss for line in lines for loss in line if loss is not None]
    if not known:
        return "<p>None of the jobs has trained.</p>"
    width, height, left, bottom = 760, 300, 60, 36
    low, high = min(known), max(known)
    spread = (high - low) or 1.0

    def at(place: int, loss: float) -> str:
        x = left + (width - left - 10) * tokens[place] / tokens[-1]
        y = 12 + (height - bottom - 12) * (high - loss) / spread
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'font-family="sans-serif" font-size="11"><title>Training loss over tokens</title>',
        f'<rect x="{left}" y="12" width="{width - left - 10}" height="{height - bottom - 12}" fill="none" stroke="#d9e0e8"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = 12 + (height - bottom - 12) * share
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{high - spread * share:.3f}</text>')
        x = left + (width - left - 10) * share
        anchor = "end" if share == 1.0 else "middle"
        said = f"{round(tokens[-1] * share):,}{' tokens' if share == 1.0 else ''}"
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="{anchor}">{said}</text>')
    for place, line in enumerate(lines):
        # Between two steps of a job the axis repeats a loss: one point for it, so that the line has no stairs.
        told = [(n, loss) for n, loss in enumerate(line) if loss is not None and (n == 0 or loss != line[n - 1])]
        points = " ".join(at(index, loss) for index, loss in told)
        colour = _colour(place, len(jobs))
        name = escape(jobs[place].name or jobs[place].id)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"><title>{name}</title></polyline>'
        )
    return "".join([*parts, "</svg>"])
