"""README and the pages of the site, read as Markdown: their programs, their commands, their headings."""

from __future__ import annotations

import ast
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = ("bash", "sh", "shell", "console")
# A fence of MyST's that says more than the language: ```{code-block} python, its options, a blank line, the code.
DIRECTIVE = re.compile(r"\{code-block\} *python")
CAPTION = re.compile(r"^:caption: *(\S+\.py)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of Python, as it is printed.

    Args:
        page: the file that it is in.
        line: of the file, from 1, where its first line of code stands.
        code: the code.
        file: the file that it is the content of, by its caption; empty for a part of the page's program.
    """

    page: Path
    line: int
    code: str
    file: str = ""

    @property
    def is_guarded(self) -> bool:
        """Whether it is a program by itself, which says ``if __name__ == "__main__":``."""
        return any(
            isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            for node in ast.parse(self.code).body
        )


@cache
def tokens_of(page: Path) -> tuple[Token, ...]:
    """Every token of a page, those inside paragraphs and tables too."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return tuple(inner for token in tokens for inner in (token, *(token.children or ())))


def headings_of(page: Path) -> list[str]:
    """The texts of a page's headings."""
    tokens = tokens_of(page)
    return [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]


def python_blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    return [found for token in tokens_of(page) if (found := _python_block(page, token)) is not None]


def _python_block(page: Path, token: Token) -> Block | None:
    if token.type != "fence" or token.map is None:
        return None
    if token.info.strip() == "python":
        return Block(page, token.map[0] + 2, token.content)
    if DIRECTIVE.fullmatch(token.info.strip()) is None:
        return None
    options, code = token.content.split("\n\n", 1)
    caption = CAPTION.search(options)
    return Block(page, token.map[0] + 3 + options.count("\n") + 1, code, caption[1] if caption else "")


def expected_prints(block: Block) -> dict[int, str]:
    """What a block's calls of ``print`` print, by their lines of the page: the comment ``# prints …`` behind or below.

    A comment without a call before it stands at line 0, where nothing prints.
    """
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(block.code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(block.code).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("# prints "):
            line = max((line for line in calls if line <= token.start[0]), default=0)
            found[line + block.line - 1 if line else 0] = token.string.removeprefix("# prints ")
    return found


def agrees(expected: str, printed: str) -> bool:
    """Whether a line printed what its comment says, where ``…`` stands for anything, and spaces for any white space."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in expected.strip().split("…")]
    return re.fullmatch(".*".join(parts), printed.strip(), re.DOTALL) is not None


def programs_of(page: Path) -> list[list[Block]]:
    """The programs of a page: each block with a guard by itself, and all the others together, in order.

    Blocks that are the content of a file come with the others: they are written before these are run.
    """
    blocks = python_blocks(page)
    together = [block for block in blocks if not block.is_guarded]
    return [*([together] if together else []), *([block] for block in blocks if block.is_guarded)]


def shell_lines(page: Path) -> Iterator[str]:
    """What a reader types into a shell: lines of shell blocks and of indented blocks, and code inside a sentence."""
    for token in tokens_of(page):
        if token.type == "code_block" or (token.type == "fence" and token.info.strip() in SHELL):
            # A line that goes on below is one, whatever the indentation there.
            yield from re.sub(r"\s*\\\n\s*", " ", token.content).splitlines()
        elif token.type == "code_inline":
            yield token.content


def commands_of(page: Path, program: str) -> list[list[str]]:
    """The words of every call of a program that a page names, such as ``make``; variables before it are left out."""
    call = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?{re.escape(program)}(?P<arguments>(?: .*)?)")
    matches = (call.fullmatch(line.strip()) for line in shell_lines(page))
    return [shlex.split(match["arguments"], comments=True) for match in matches if match is not None]
