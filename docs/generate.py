"""Write docs/errors.md and docs/settings.md from the code: `.venv/bin/python docs/generate.py`. A test compares them."""

from __future__ import annotations

import inspect
from pathlib import Path

from app.problems import STATUS, catalogue
from app.settings import Settings

HERE = Path(__file__).resolve().parent
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
        default = "" if field.default is None or field.default_factory else f"`{field.default}`"
        # Paths below home have no fixed default: the text says which.
        default = "" if isinstance(field.default, Path) else default
        lines.append(f"| `P2D_{name.upper()}` | {default} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "errors.md").write_text(errors(), encoding="utf-8")
    (HERE / "settings.md").write_text(settings(), encoding="utf-8")
