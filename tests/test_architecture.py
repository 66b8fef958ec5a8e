"""The order of the package, read from the imports of every module, those inside functions too.

`ORDER` lists packages and modules; what it names imports what stands before it, or itself. A module belongs to the
longest name that fits it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import torchrl_sglang_hidden

PACKAGE = "torchrl_sglang_hidden"
ROOT = Path(torchrl_sglang_hidden.__file__).parent
ORDER: list[set[str]] = [
    {"_version"},
    {"errors", "spec", "reduce", "sglang_api", "weights"},
    {"spec.spans", "spec.constraints"},
    {"spec.hidden"},
    {"spec.logits"},
    {"records"},
    {"reduce.pooling", "heads", "reduce.token_logits", "sglang_api.sampling", "places", "actions", "outputs"},
    {"protocol.shared_memory", "protocol.served_weights"},
    {"protocol.tensors"},
    {"protocol"},
    {"sglang_api.payload", "sglang_api.server_info"},
    {"sglang_api.checks", "sglang_api.responses"},
    {"server", "weights.validation", "weights.control", "prompts"},
    {"weights.disk", "weights.network"},
    {"engines", "assemble"},
    {"distributions", "options"},
    {"calls", "configured"},
    {"candidates"},
    {"policy"},
    {"weight_sync"},
    {"demo"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

# What a package or module must not import beyond the order: others of this package, or libraries.
FORBIDDEN: dict[str, set[str]] = {
    "spec.spans": {"sglang", "tensordict", "torchrl", "transformers", "httpx", "torch"},
    "spec.constraints": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "spec.hidden": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "spec.logits": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "records": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "reduce.token_logits": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "protocol.tensors": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "sglang_api.checks": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "reduce.pooling": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "heads": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "protocol.shared_memory": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "sglang_api.sampling": {"sglang", "tensordict", "torchrl", "transformers", "httpx", "torch"},
    "protocol": {"sglang", "tensordict", "torchrl", "httpx"},
    **{part: {"transformers"} for part in ("protocol.status", "protocol.request_options", "protocol.answer")},
    "sglang_api.server_info": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "sglang_api.payload": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "sglang_api.responses": {"sglang", "tensordict", "torchrl", "transformers", "httpx"},
    "server": {"tensordict", "torchrl", f"{PACKAGE}.wire", f"{PACKAGE}.sampling"},
    "engines": {"tensordict", "torchrl", f"{PACKAGE}.sampling"},
    "prompts": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{room}" for room in ("sglang_api.payload", "protocol", "sglang_api.sampling", "reduce.pooling")),
    },
    "assemble": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{room}" for room in ("server", "engines", "sglang_api.payload", "protocol")),
    },
    "places": {"sglang", "httpx"},
    "actions": {"sglang", "httpx", "torchrl"},
    "outputs": {"sglang", "httpx"},
    "calls": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{room}" for room in ("sglang_api.payload", "protocol", "reduce.pooling", "server")),
    },
    "candidates": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{room}" for room in ("sglang_api.payload", "protocol", "reduce.pooling", "server")),
    },
    "policy": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{room}" for room in ("sglang_api.payload", "protocol", "reduce.pooling", "server")),
    },
}
# What reaches the engines by their front door.
FRONT_DOORS = {
    room: {f"{PACKAGE}.engines"} for room in ("options", "calls", "configured", "candidates", "policy", "weight_sync")
}


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import of a module, by the full name of what it reaches. Those for type checkers count too."""
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            # `from package import room` reaches the room.
            names = [f"{base}.{alias.name}" if base == PACKAGE else base for alias in node.names]
        else:
            continue
        yield from (Import(name, node.lineno, id(node) in lazy) for name in dict.fromkeys(names))


def part_of(module: str) -> str:
    """The longest name of the order that a module's full name fits; its first part where there is none."""
    parts = module.split(".")[1:] or ["__init__"]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVELS), names[-1])


def rules_of(rules: dict[str, set[str]], module: str) -> set[str]:
    """The rules of a module and of the packages that it is in."""
    parts = module.split(".")[1:]
    return {rule for length in range(len(parts)) for rule in rules.get(".".join(parts[: length + 1]), ())}


def breaches(source: str, module: str) -> list[str]:
    """What a module imports and should not."""
    part, found = part_of(module), []
    for target, line, lazy in imports_of(source, module):
        where = f"{module}:{line} imports {target}"
        top = target.split(".")[0]
        if top == PACKAGE:
            other = part_of(target)
            if other not in LEVELS:
                found.append(f"{where}, which has no place in the order")
            elif other != part and LEVELS[other] >= LEVELS[part]:
                found.append(f"{where}, upward")
            if any(target.startswith(f"{door}.") for door in rules_of(FRONT_DOORS, module)):
                found.append(f"{where}, past the front door")
        if top == "sglang" and not lazy:
            found.append(f"{where} when it is imported itself")
        if any(target == name or target.startswith(f"{name}.") for name in rules_of(FORBIDDEN, module)):
            found.append(f"{where}, which {part} knows nothing of")
    return found


def module_of(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def modules() -> list[Path]:
    # The stand-in is no part of the package: it takes the place of `sgl_kernel` on a path of its own.
    return [path for path in sorted(ROOT.rglob("*.py")) if "standin" not in path.parts]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert breaches(path.read_text(), module_of(path)) == []


def test_every_module_has_its_place() -> None:
    assert {part_of(module_of(path)) for path in modules()} <= set(LEVELS)
    assert len(modules()) > 15


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("errors", "from torchrl_sglang_hidden.records import Request", "upward"),
        ("spec.hidden", "def f():\n    from torchrl_sglang_hidden import policy", "upward"),
        ("reduce.pooling", "import torchrl_sglang_hidden.sglang_api.sampling", "upward"),
        ("sglang_api.payload", "from torchrl_sglang_hidden import HiddenSpec", "has no place"),
        ("sglang_api.payload", "import torchrl_sglang_hidden", "upward"),
        ("sglang_api.payload", "from .. import engines", "upward"),
        ("sglang_api.payload", "from ..engines import http", "upward"),
        ("server.capture", "from ..engines import base", "upward"),
        ("server.capture", "async def f():\n    import torchrl_sglang_hidden.engines.http", "upward"),
        ("assemble", "from torchrl_sglang_hidden.engines import Engine", "upward"),
        ("assemble", "from torchrl_sglang_hidden.sglang_api.payload import to_payload", "knows nothing of"),
        ("engines.http", "from torchrl_sglang_hidden.assemble import Row", "upward"),
        ("engines.http", "import tensordict", "knows nothing of"),
        ("server.plugin", "def f():\n    from torchrl.data import x", "knows nothing of"),
        ("server.plugin", "import sglang", "when it is imported itself"),
        ("server.plugin", "class A:\n    import sglang.srt", "when it is imported itself"),
        ("policy", "from torchrl_sglang_hidden.sglang_api.payload import to_payload", "knows nothing of"),
        ("policy", "from torchrl_sglang_hidden.engines.http import SGLangServer", "front door"),
        ("cli", "from torchrl_sglang_hidden.__main__ import main", "upward"),
        ("policy", "from torchrl_sglang_hidden.new_room import x", "has no place"),
    ],
)
def test_the_check_goes_red(module: str, source: str, words: str) -> None:
    found = breaches(source, f"{PACKAGE}.{module}")
    assert any(words in breach for breach in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.plugin", "def f():\n    import sglang"),
        ("engines.launch", "from torchrl_sglang_hidden.server.cpu import x\nfrom .http import y"),
        ("policy", "from torchrl_sglang_hidden.engines import Engine"),
        ("__init__", "from torchrl_sglang_hidden import policy, cli"),
    ],
)
def test_the_check_allows_what_is_right(module: str, source: str) -> None:
    assert breaches(source, f"{PACKAGE}.{module}") == []


# --- trust ------------------------------------------------------------------------------------------------------------


UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "eval", "exec", "__import__"}


def unsafe_names(source: str) -> set[str]:
    """Names that run what comes in as data; `tensor.load` and `getattr` tricks are beyond a test like this."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found |= {"pickle"} if node.attr == "load" else set()
    return found & UNSAFE


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_received_can_run(path: Path) -> None:
    assert unsafe_names(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "def f(x):\n    return eval(x)", "import torch\ntorch.load('x')"],
)
def test_the_check_of_unsafe_names_goes_red(source: str) -> None:
    assert unsafe_names(source)
