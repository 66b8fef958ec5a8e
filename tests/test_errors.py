"""Every error of this package tells what to do: its message has an expectation, a remedy, or a question where to look.

Read from the syntax tree, so that no new error can forget it. Of an f-string the literal parts are read:
`f"a={a}; pass b"` is `a=…; pass b`. `tells_what_to_do` says what counts. A message that is put together elsewhere
cannot be read: `EXCEPTIONS` names each, with the reason why it tells what to do all the same.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import torchrl_sglang_hidden
from torchrl_sglang_hidden import errors

PACKAGE = "torchrl_sglang_hidden"
ROOT = Path(torchrl_sglang_hidden.__file__).parent
ERRORS = set(errors.__all__)

# The words with which a remedy begins. A clause that begins otherwise is no remedy, however helpful: add its verb here.
REMEDIES = (
    "add", "allow", "ask", "await", "call", "change", "check", "choose", "connect", "copy", "define", "do", "drop",
    "free", "gather", "generate", "give", "import", "install", "keep", "leave", "load", "look", "lower", "make", "mend",
    "merge", "move", "name", "open", "pass", "please report", "put", "raise", "read", "remove", "report", "run", "save",
    "score", "send", "serve", "set", "shorten", "start", "strip", "tie", "to wait", "train", "try", "update", "use",
    "write",
)  # fmt: skip
# What would have been right, after the value that is not.
EXPECTATIONS = (
    r"\bexpected\b",
    r"\bmust be\b",
    r"\bneeds at least\b",
    r"\b(ids|tokens|they) are (in |within |at least |integers|0\.\.)",
    r"[;:] [\w =…]+ (reads|takes|has) (a|an|it|ids|one|the)\b",
)
# Errors that do not show it here, by function and message, and why they tell what to do all the same. A message that
# is put together elsewhere is None.
EXCEPTIONS: dict[tuple[str, str | None], str] = {
    ("engines.batching.BatchingEngine._serve", None): "a copy of an error that was made by the engine",
    ("engines.batching.BatchingEngine._wait_for_batch", None): "`cleanup` and `close` say it in `_cancel`",
    ("engines.batching.BatchingEngine._send", None): "a copy of an error that was made by the engine",
    ("engines.process.ServerProcess.wait", None): "`how_it_ended` names the log",
    ("engines.restarting.Supervisor.wait", None): "`_delay` names the log and the limit",
    ("engines.restarting.Supervisor._refuse", None): "`_delay` names the log and the limit",
    ("engines.races._race_of_one", None): "a copy of an error that was made by the engine",
    ("engines.streams._Reader.completion", "no completion after … tokens: …"): "the reason, or to read on",
    ("protocol.answer.unpack_answer", "…: …"): "the server half says what to do, in what it refuses",
    ("server.control_guard.around_control", None): "the reason of the scheduler, which names the log or what to pass",
    ("server.request_checks.check_wire", None): "the field and its value, with the type that was expected",
    ("sglang_api.responses._read_row", "…, span …: …"): "the spans' errors, made where states are pooled",
    ("sglang_api.responses._fault_of", "…, span … of heads: …"): "the spans' errors, made where states are pooled",
    ("sglang_api.responses._read_row", "…: …"): "the constraints' errors, made in the server",
    ("engines.launch._check_arguments", "launch(…=…): launch sets this server argument itself; …"): (
        "OWNED_ARGUMENTS has the remedy of each"
    ),
}
# Exceptions of others that are raised on purpose, beside Python's own.
FOREIGN = {"typer.Exit", "typer.BadParameter"}


class Message(NamedTuple):
    function: str
    line: int
    text: str | None


def literal(node: ast.expr | None) -> str | None:
    """The literal text of a message, `…` for what is filled in; None for one that cannot be read here."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(literal(part) or "…" for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) if re.search("remedy|hint", name, re.IGNORECASE):
            return "…: use it"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            before, after = literal(left), literal(right)
            return None if before is None and after is None else f"{before or '…'}{after or '…'}"
    return None


def is_foreign(function: ast.expr) -> bool:
    name = ast.unparse(function)
    return name in FOREIGN or isinstance(getattr(builtins, name, None), type)


def messages(source: str, module: str) -> Iterator[Message]:
    """The message of every error that a module makes, raised or not, and of every raised call of something unknown."""

    def visit(node: ast.AST, path: tuple[str, ...], raised: bool) -> Iterator[Message]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            path = (*path, node.name)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            # `type(error)(f"row 3: {error}")` adds where it was; the error itself tells what to do.
            adds_context = isinstance(node.func, ast.Call) and ast.unparse(node.func.func) == "type"
            if name in ERRORS or (raised and not adds_context and not is_foreign(node.func)):
                yield Message(".".join((module, *path)), node.lineno, literal(node.args[0] if node.args else None))
        for field, child in ast.iter_fields(node):
            for inner in child if isinstance(child, list) else [child]:
                if isinstance(inner, ast.AST):
                    raised_here = isinstance(node, ast.Raise) and field == "exc"
                    if raised_here and isinstance(inner, ast.Name) and inner.id in ERRORS:
                        yield Message(".".join((module, *path)), inner.lineno, None)  # raised without a message
                    yield from visit(inner, path, raised_here)

    yield from visit(ast.parse(source), (), raised=False)


def tells_what_to_do(text: str) -> bool:
    """Whether a message has an expectation, ends with a question, or has a clause that begins with a remedy."""
    if any(re.search(words, text) for words in EXPECTATIONS) or text.endswith("?"):
        return True
    remedy = rf"[;:,.?)] (?:or |else |then |first |for [^;:,.]* )?(?:{'|'.join(REMEDIES)})\b"
    return re.search(remedy, text, re.IGNORECASE) is not None


def silent(source: str, module: str) -> list[str]:
    """The errors of a module that do not tell what to do, and are no exception."""
    return [
        f"{found.function}:{found.line} {found.text or 'has a message made elsewhere'}"
        for found in messages(source, module)
        if (found.text is None or not tells_what_to_do(found.text)) and (found.function, found.text) not in EXCEPTIONS
    ]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=module_of)
def test_every_error_tells_what_to_do(path: Path) -> None:
    assert silent(path.read_text(), module_of(path)) == []


def test_no_exception_is_out_of_date() -> None:
    found = [found for path in modules() for found in messages(path.read_text(), module_of(path))]
    needed = {(one.function, one.text) for one in found if one.text is None or not tells_what_to_do(one.text)}
    assert set(EXCEPTIONS) <= needed


def test_the_messages_are_found() -> None:
    found = [message for path in modules() for message in messages(path.read_text(), module_of(path))]
    assert len(found) > 200
    assert {message.function for message in found} > {"engines.launch._hold_port", "cli.options.parse_layers"}


@pytest.mark.parametrize(
    "code",
    [
        'raise InputError("no")',
        'raise InputError(f"a={a}")',
        'raise InputError(f"a={a}: it passes nothing; the use of it is unclear")',
        'raise errors.InputError("a is wrong. Nothing was sent")',
        "raise InputError(message)",
        "raise InputError",
        'raise (InputError if a else EngineError)("no")',
        'kind = InputError\n    raise kind("no")',
        'return InputError("no")',
        "raise made(a)",
        'raise InputError("a is wrong" + reason)',
    ],
)
def test_the_check_goes_red(code: str) -> None:
    assert silent(f"def f(a):\n    {code}", "x") != []


@pytest.mark.parametrize(
    "code",
    [
        'raise InputError(f"a={a}: expected an integer")',
        'raise InputError(f"a={a} is over the limit of 3; pass less")',
        'raise InputError("a is wrong; " + "use b")',
        'raise InputError("nothing answers; is the server running?")',
        'raise EngineError(f"{a} failed ({a}). Read the log")',
        'raise ValueError("of Python\'s own")',
        "raise typer.Exit(1)",
        "raise",
        "raise a",
    ],
)
def test_the_check_allows_what_is_right(code: str) -> None:
    assert silent(f"def f(a):\n    {code}", "x") == []
