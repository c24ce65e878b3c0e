"""The rules of the house that no linter knows: who imports torch, how long a file is, what is said where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("p2d", "app", "workers", "migrations", "benchmarks", "tests", "docs", "examples")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
DRAWERS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
HEAVY = {"torch", "transformers", "peft", "accelerate"}
"""What the `engine` extra brings: the API image has none of it."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize(
    "module", ["app.main", "workers.loop", "app.cli", "app.demo", "p2d", "p2d.client", "p2d.pipeline"]
)
def test_importing_leaves_torch_unloaded(module: str) -> None:
    heavy = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


def test_the_rooms_stand_on_each_other_as_agreed() -> None:
    lint = Path(sys.executable).parent / "lint-imports"

    done = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_and_its_functions_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    long = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(path)}

    assert 0 < lines <= MAX_FILE_LINES
    assert {name: count for name, count in long.items() if count > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_what_it_answers_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert path.stem not in DRAWERS


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_all_exceptions_are_caught_at_the_doors_only(path: Path) -> None:
    doors = {"p2d/model_files.py", "app/problems.py", "workers/attempt.py", "workers/child.py", "app/cli.py"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    broad = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
    ]

    assert broad == [] or name_of(path) in doors


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_data_layer_speaks_sql(path: Path) -> None:
    room = name_of(path)
    if room.startswith(("app/db/", "migrations/", "tests/")):
        return
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }

    assert "sqlalchemy" not in imported
