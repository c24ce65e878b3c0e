"""The quality matrix: every arm at its best rate, over pools and seeds; resumable, each cell computed once.

    ./run quality --task gsm8k=DIR --task dialogsum=DIR      # clean pools, and pools of which half are bad
    ./run quality --rows 2000 --minutes 480                  # the main table, in the background
    ./run quality --arm alignment                            # arms whose name holds a word
    ./run quality --workers 12 --rows 2000 --batch 16        # on a GPU

Without --task: the GSM8K sample of examples/. Writes quality.json, which is also what a later run goes on from, and quality.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

JUNK = ("another's answer", "off task", "echo", "near duplicate", "wrong number")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and there is time for, then write the page."""
    options = _options(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    from benchmarks.quality.matrix import run

    try:
        print(run(options, _say))  # noqa: T201 - a command line
    except ValueError as error:
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
    parser.add_argument("--rows", type=int, default=240, help="of a pool, or as many as the task has if fewer")
    parser.add_argument(
        "--junk",
        action="append",
        type=_junk,
        default=None,
        help="kind of bad rows in a further pool of each task; repeatable, joined by +; another's answer by default",
    )
    parser.add_argument("--share", type=float, default=0.5, help="of bad rows in it; 0 = clean pools only")
    parser.add_argument("--arm", default="", help="only arms whose name holds this")
    parser.add_argument("--core", action="store_true", help="only the arms that tell most")
    parser.add_argument("--pool", default="", help="only pools whose name holds this, such as clean or gsm8k")
    parser.add_argument("--max-tokens", type=int, default=220, help="longer rows of a task are left out")
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows of an optimizer step")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time: a small model leaves a GPU idle")
    parser.add_argument("--metric", choices=("exact_match", "rouge_l"), help="answers are written, too; dear")
    parser.add_argument("--minutes", type=float, default=120.0, help="no cell is begun later")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    options.task = options.task or [f"gsm8k={ROOT / 'examples' / 'gsm8k'}"]
    options.junk = options.junk or [JUNK[:1]]
    return options


def _junk(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(text.split("+")))
    if unknown := [kind for kind in kinds if kind not in JUNK]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(JUNK)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
