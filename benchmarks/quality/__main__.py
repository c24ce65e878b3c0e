"""The quality matrix: every arm at its best rate, over pools and seeds; resumable, each cell computed once.

    ./run quality --task gsm8k=DIR --task dialogsum=DIR      # clean pools, and pools of which half are bad
    ./run quality --rows 2000 --minutes 480                  # the main table, in the background
    ./run quality --arm "all rows" --arm DoRA                # arms whose name holds one of these
    ./run quality --workers 12 --rows 2000 --batch 16        # on a GPU

Without --task: the GSM8K sample of examples/. Writes quality.json, which is also what a later run goes on from, and quality.md.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.__main__ import positive

ROOT = Path(__file__).resolve().parents[2]

JUNK = ("another's answer", "off task", "echo", "near duplicate", "wrong number", "shuffled words")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and there is time for, then write the page."""
    options = _options(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    from benchmarks.quality.matrix import run
    from p2d.errors import P2DError

    try:
        print(run(options, _say))  # noqa: T201 - a command line
    except (ValueError, P2DError) as error:
        print(f"quality: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)  # noqa: T201


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run quality", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME=DIR", help="gsm8k or dialogsum and its folder; repeatable"
    )
    parser.add_argument("--rows", type=positive, default=240, help="of a pool, or as many as the task has if fewer")
    parser.add_argument(
        "--junk",
        action="append",
        type=_junk,
        default=None,
        help="kind of bad rows in a further pool of each task; repeatable, joined by +; another's answer by default",
    )
    parser.add_argument("--share", type=_share, default=0.5, help="of bad rows in it; 0 = clean pools only")
    parser.add_argument("--arm", action="append", default=[], help="only arms whose name holds this; repeatable")
    parser.add_argument("--core", action="store_true", help="only the arms that tell most")
    parser.add_argument("--pool", default="", help="only pools whose name holds this, such as clean or gsm8k")
    parser.add_argument("--max-tokens", type=positive, default=220, help="longer rows of a task are left out")
    parser.add_argument("--validation", type=positive, default=32)
    parser.add_argument("--held-out", type=positive, default=64)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch", type=positive, default=4, help="rows of an optimizer step")
    parser.add_argument(
        "--workers", type=positive, default=1, help="processes at a time: a small model leaves a GPU idle"
    )
    parser.add_argument(
        "--generate", action="store_true", help="answers are written, too, and judged by exact match or ROUGE-L; dear"
    )
    parser.add_argument("--text", type=Path, help="plain text of any kind, of which it is told what was forgotten")
    parser.add_argument("--minutes", type=_minutes, default=120.0, help="no cell is begun later")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    options.command = _command(options, parser.parse_args(["--model", "DIR"]))
    options.task = options.task or [f"gsm8k={ROOT / 'examples' / 'gsm8k'}"]
    options.junk = options.junk or [JUNK[:1]]
    return options


PLACES = ("model", "task", "text", "out", "minutes", "workers", "threads", "device")
"""Options that say where, not what."""


def _command(options: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """The run in one line, for whoever wants to repeat it: paths are left open, options of its own machine out."""
    words = ["./run quality --model DIR", *(f"--task {one.partition('=')[0]}=DIR" for one in options.task)]
    words += ["--text FILE"] if options.text else []
    for name, value in vars(options).items():
        if name in PLACES or value == getattr(defaults, name):
            continue
        option = f"--{name.replace('_', '-')}"
        given = value if isinstance(value, list) else [value]
        values = ["+".join(kinds) for kinds in given] if name == "junk" else given
        words += [option if one is True else f"{option} {_quoted(str(one))}" for one in values]
    return " ".join(words)


def _quoted(text: str) -> str:
    return f'"{text}"' if "'" in text else shlex.quote(text)  # as one would type "another's answer"


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (share := float(text)) <= 1:
            return share
    raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (minutes := float(text)) < math.inf:
            return minutes
    raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes from 0 on")


def _junk(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(text.split("+")))
    if unknown := [kind for kind in kinds if kind not in JUNK]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(JUNK)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
