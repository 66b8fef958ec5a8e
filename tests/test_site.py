"""The site and README keep their word: names and errors have entries, pages are listed, commands exist.

What the tables of docs/ say is held by `test_docs`, and their programs run in `engine/test_documented_programs`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer.main
from helpers.documents import PAGES, ROOT, agrees, commands_of, expected_prints, headings_of, python_blocks, tokens_of

import torchrl_sglang_hidden
from torchrl_sglang_hidden import errors
from torchrl_sglang_hidden.cli import app

DOCS = ROOT / "docs"
COLUMN = 88  # of code; docs/ruff.toml says fewer, and some lines cannot be broken
ENTRY = re.compile(r"^\.\. auto(?:class|function|exception):: (\w+)$", re.MULTILINE)


# --- the pages of the site -------------------------------------------------------------------------------------------


def test_every_public_name_has_one_entry_in_the_api_reference() -> None:
    entries = [
        name
        for token in tokens_of(DOCS / "api.md")
        if token.type == "fence" and token.info.strip() == "{eval-rst}"
        for name in ENTRY.findall(token.content)
    ]
    assert sorted(entries) == sorted(name for name in torchrl_sglang_hidden.__all__ if name != "__version__")


def test_every_error_has_its_place_in_troubleshooting() -> None:
    headings = [heading.strip("`") for heading in headings_of(DOCS / "troubleshooting.md") if heading.startswith("`")]
    assert sorted(headings) == sorted(errors.__all__)


def test_every_page_is_in_the_table_of_contents() -> None:
    """Sphinx says it too, and links that lead nowhere; this is at once there."""
    listed = {
        line.rpartition("<")[2].rstrip(">")
        for token in tokens_of(DOCS / "index.md")
        if token.type == "fence" and token.info.strip() == "{toctree}"
        for line in token.content.splitlines()
        if line and not line.startswith(":")
    }
    assert {page.stem for page in DOCS.glob("*.md")} == {"index", *listed}


def test_every_function_on_the_way_of_a_request_is_there() -> None:
    package = Path(torchrl_sglang_hidden.__file__).parent
    rows = re.findall(r"^\| `(\w+/\w+\.py)` \| (.+?) \|", (DOCS / "how_it_works.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    for file, names in rows:
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in definitions_of(package / file), (file, name)


def definitions_of(path: Path) -> set[str]:
    """The functions and classes of a module, and the methods of its classes by ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_comment_about_what_is_printed_has_its_print(page: Path) -> None:
    for block in python_blocks(page):
        assert len(expected_prints(block)) == block.code.count("# prints ")
        assert 0 not in expected_prints(block)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_code_fits_into_the_sites_column(page: Path) -> None:
    blocks = [token for token in tokens_of(page) if token.type == "fence" and token.info.strip() != "{eval-rst}"]
    assert [line for block in blocks for line in block.content.splitlines() if len(line) > COLUMN] == []


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("torch.Size([2, 576])", "torch.Size([2, 576])\n", True),
        ("torch.Size([2, 576])", "torch.Size([2, 575])", False),
        ("tensor([3, 2]) tensor([1])", "tensor([3,\n 2]) tensor([1])", True),
        ("…Paris…", "It is Paris.\nYes.", True),
        ("…Paris", "Paris.", False),
        ("1.5", "1x5", False),
    ],
)
def test_what_agrees_with_a_comment(expected: str, printed: str, same: bool) -> None:
    assert agrees(expected, printed) is same


# --- what is typed into a shell --------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_target_of_make_exists() -> None:
    named = {word for page in PAGES for words in commands_of(page, "make") for word in words if "=" not in word}
    assert {"demo", "test"} <= named
    assert named <= make_targets()


def test_every_command_exists_with_its_options() -> None:
    group = typer.main.get_command(app)
    commands = getattr(group, "commands")  # noqa: B009 - typer does not say that it is a group
    called = [(page.name, words) for page in PAGES for words in commands_of(page, "torchrl-sglang-hidden")]
    assert {"demo", "serve"} <= {words[0] for _, words in called if words}
    for where, words in called:
        if not words or words[0] in ("…", "--help"):
            continue
        assert words[0] in commands, (where, words)
        if commands[words[0]].context_settings.get("ignore_unknown_options"):
            continue  # SGLang's: a test with an engine asks it
        known = {name for parameter in commands[words[0]].params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words[1:] if word.startswith("--")} <= known, (where, words)
