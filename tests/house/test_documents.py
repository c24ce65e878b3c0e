"""Documents that code can contradict: error catalogue, settings, commands, links, the tree."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from app.cli import cli
from app.problems import STATUS, catalogue

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.md"))

SCRIPT_COMMANDS = {"test"}
"""What `./run` knows beside the commands of `p2d`."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> set[str]:
    command = get_command(cli)
    return set(command.commands)  # type: ignore[attr-defined]


def test_every_error_code_has_a_status_a_meaning_and_a_hint() -> None:
    known = catalogue()

    assert set(STATUS) == set(known)
    for code, cls in known.items():
        assert re.fullmatch(r"[a-z_]+\.[a-z_]+", code)
        assert cls.__doc__
        assert cls.hint.endswith(".")
        assert cls.fault in ("user", "service", "capacity", "dependency")


def test_no_two_unrelated_errors_share_a_code() -> None:
    known = catalogue()
    todo = list(known.values())
    while todo:
        cls = todo.pop()
        assert issubclass(cls, known[cls.code])
        todo += cls.__subclasses__()


@pytest.mark.parametrize("what", ["errors", "settings"])
def test_generated_documents_are_up_to_date(generator: ModuleType, what: str) -> None:
    written = (ROOT / "docs" / f"{what}.md").read_text(encoding="utf-8")

    assert written == getattr(generator, what)(), "run: .venv/bin/python docs/generate.py"


def test_the_tree_of_the_readme_is_up_to_date(generator: ModuleType) -> None:
    written = (ROOT / "README.md").read_text(encoding="utf-8")

    assert written == generator.readme(), "run: .venv/bin/python docs/generate.py"


def test_every_setting_says_what_it_means() -> None:
    lines = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `P2D_")]

    assert rows
    assert all(len(row.split("|")[3].strip()) > 20 for row in rows)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_commands_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    named = set(re.findall(r"(?:\./run|(?<!from )\bp2d) ([a-z]+)\b(?![.:])", "\n".join(code_of(text))))

    assert named <= commands() | SCRIPT_COMMANDS


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_the_links_of_a_document_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))

    assert [link for link in links if "://" not in link and not leads_somewhere(path, link)] == []


def test_the_readme_shows_every_file_of_the_product() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sources = [path for package in ("p2d", "app", "workers", "migrations") for path in (ROOT / package).rglob("*.py")]
    names = {path.name for path in sources} - {"__init__.py"}

    assert {name for name in names if name not in readme} == set()


def code_of(text: str) -> list[str]:
    """The code in a Markdown text: fenced blocks and spans."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line.split(" #")[0] for block in fenced for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", rest)


def leads_somewhere(document: Path, link: str) -> bool:
    """Whether file and heading are there that a document's relative link names."""
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    return target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))


def anchors(text: str) -> set[str]:
    """Anchors of a Markdown text's headings, as code hosts make them: lower case, hyphens for spaces, nothing else but words."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
