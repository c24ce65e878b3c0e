"""Write docs/errors.md, docs/settings.md and the README's tree from the code: `.venv/bin/python docs/generate.py`.

A test compares them.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from app.problems import STATUS, catalogue
from app.settings import Settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HEAD = "<!-- Written by docs/generate.py; do not edit. -->\n"


def errors() -> str:
    """Every code that an answer, a job or the command line can carry."""
    lines = [
        "# Errors",
        HEAD,
        "Every error is `application/problem+json` (RFC 9457) with these codes; `job.error` is the same object. Match on",
        "`code`: it never changes its meaning. `fault` says who can mend it; faults other than `user` may pass by themselves.",
        "",
        "| code | status | fault | meaning | what to do |",
        "| --- | --- | --- | --- | --- |",
    ]
    for code, cls in sorted(catalogue().items()):
        meaning = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
        lines.append(f"| `{code}` | {STATUS[code]} | {cls.fault} | {_cell(meaning)} | {_cell(cls.hint)} |")
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Every P2D_ variable."""
    lines = [
        "# Settings",
        HEAD,
        "Read from the environment by every process of the service. `p2d doctor` shows what this machine has.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in Settings.model_fields.items():
        text = " ".join((field.description or "").split())
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if shown in (None, "") or field.default_factory else f"`{shown}`"
        # Paths below home have no fixed default: the text says which.
        default = "" if isinstance(field.default, Path) else default
        lines.append(f"| `P2D_{name.upper()}` | {default} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def tree() -> str:
    """The README's tree: every source file with the first sentence of its docstring, and what else stands at the top."""
    lines = ["```"]
    for folder in ("p2d", "app", "workers", "migrations"):
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (len(path.parent.parts), path)):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if text is not None:
                name = str(path.relative_to(ROOT)).removesuffix("__init__.py")
                lines.append(f"{name:<40}{_first_sentence(text)}")
    lines += [f"{name:<40}{text}" for name, text in ELSEWHERE]
    return "\n".join([*lines, "```"])


def readme() -> str:
    """README.md with its tree as the files now are."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(TREE_FROM)
    return before + TREE_FROM + tree() + TREE_TO + rest.split(TREE_TO)[1]


TREE_FROM, TREE_TO = "<!-- tree: written by docs/generate.py -->\n", "\n<!-- end of tree -->"

ELSEWHERE = (
    ("tests/", "p2d/ app/ workers/ mirror the source; faults/ e2e/ house/ hold what spans rooms"),
    ("benchmarks/", "cost (`./run bench`), worth (`./run quality`), load (`./run load`): each beside its peers"),
    ("docs/", "jobs, data, models, operating, errors, settings; architecture, decisions; what it is worth; the LOG"),
    ("examples/gsm8k/", "300 training and 60 test rows of GSM8K, with licence and origin"),
    ("run", "the one script: demo, test, up and every other command"),
    ("constraints.txt", "the lock: exact versions of everything"),
    ("Dockerfile docker-compose.yml", "the same parts as containers"),
)


def _first_sentence(docstring: str) -> str:
    """The docstring up to its first full stop."""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"\.(?: |$)", first, maxsplit=1)[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "errors.md").write_text(errors(), encoding="utf-8")
    (HERE / "settings.md").write_text(settings(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
