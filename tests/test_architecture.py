"""The order of the package, read from the imports of every module, those inside functions too.

`FLOORS` says which package stands on which, and in which order a package's own modules stand. Each floor imports those
below it; packages of one floor know nothing of each other. CONTRIBUTING's table is held against it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import torchrl_sglang_hidden

PACKAGE = "torchrl_sglang_hidden"
ROOT = Path(torchrl_sglang_hidden.__file__).parent
# From the bottom up. A floor is a list of steps: inside one package a module imports those of the steps before its own.
# A module that is not named stands where its package is named.
FLOORS: list[list[set[str]]] = [
    [{"errors", "_version"}],
    [
        {"spec"},
        {"spec.places"},
        {"spec.spans", "spec.constraints"},
        {"spec.hidden", "spec.span_search"},
        {"spec.logits", "spec.heads"},
        {"spec.head_scores"},
    ],
    [{"records", "counters"}],
    [{"reduce", "images"}, {"images.expansion", "images.messages"}],
    [
        {"protocol.excerpts"},
        {"protocol.served_weights", "protocol.status", "protocol.update_lease"},
        {"protocol.shared_memory"},
        {"protocol.tensors"},
        {"protocol"},
    ],
    [
        {"server", "sglang_api", "weights"},
        {"sglang_api.fields", "sglang_api.overflow", "sglang_api.streamed_scores"},
        {
            "sglang_api.sampling",
            "sglang_api.payload",
            "sglang_api.server_info",
            "sglang_api.log_probs",
            "sglang_api.sampled",
            "sglang_api.stock_states",
            "sglang_api.images",
        },
        {"sglang_api.states"},
        {"sglang_api.scores"},
        {"sglang_api.checks", "sglang_api.responses"},
        {"weights.trainers"},
        {"weights.validation"},
        {"weights.control"},
        {"weights.disk", "weights.network", "weights.lease", "weights.heads"},
        {"weights.transports", "weights.sharding"},
        {"weights.adapters"},
    ],
    [{"engines", "service"}, {"service.image_prompts"}, {"service.body"}, {"service.route"}, {"service.plugin"}],
    [
        {"policy"},
        {"policy.outputs", "policy.action_masks", "policy.chat_template", "policy.logits_from_hidden"},
        {"policy.row_fields", "policy.token_rows", "policy.chat_text", "policy.tokenizer"},
        {"policy.sampled_turns", "policy.text_rows", "policy.literal_content"},
        {"policy.chats", "policy.rows"},
        {"policy.prompt_spans", "policy.image_rows"},
        {"policy.prompts", "policy.returned", "policy.batching", "policy.outcomes", "policy.argument_checks"},
        {
            "policy.sampling_rows",
            "policy.assemble_chat",
            "policy.assemble_logits",
            "policy.assemble_states",
        },
        {"policy.assemble_heads"},
        {"policy.assemble", "policy.config", "policy.candidate_ids"},
        {"policy.requests", "policy.reading", "policy.attributes"},
        {"policy.distributions", "policy.candidates", "policy.sending"},
        {"policy.partial"},
        {"policy.wrapper", "policy.weight_sync"},
    ],
    [
        {
            "demo",
            "rl.schedule",
            "rl.prompts",
            "rl.prompt_cache",
            "rl.ablations",
            "rl.projection",
            "rl.background",
            "rl.observations",
            "rl.action_heads",
            "rl.next_states",
            "rl.measures",
            "rl.groups",
            "rl.ridge",
        },
        {"rl.rows", "rl.encoder", "rl.data_rows", "rl.manifest", "rl.probe", "rl.drift"},
        {"rl.group_reward", "rl.cross_rollout", "rl.rank_transform"},
        {"rl.centroid", "rl.exploration"},
        {"rl.transform", "rl.columns", "rl.shards", "rl.layer_sweep"},
        {"rl.labels", "rl.exports", "rl.state_source", "rl.plots"},
        {"rl.recording", "rl.value_head", "rl.reward_head", "rl.actor_critic"},
        {"rl.record", "rl.report", "rl.llm_actor_critic"},
        {"rl"},
    ],
    [
        {"cli.options"},
        {"cli.demo", "cli.doctor", "cli.record", "cli.report", "cli.serve"},
        {"cli.commands"},
        {"cli"},
    ],
    [{"__main__", "__init__"}],
]
LEVELS = {
    name: (floor, step) for floor, steps in enumerate(FLOORS, 1) for step, names in enumerate(steps) for name in names
}
MAX_FLOORS, MAX_ROOT_FILES = 11, 7

FOREIGN = {"sglang", "tensordict", "torchrl", "transformers", "httpx"}
# What a package or module must not import although the order allows it: libraries, or others of this package.
FORBIDDEN: dict[str, set[str]] = {
    "spec": FOREIGN,
    **{f"spec.{part}": {"torch"} for part in ("span_base", "places", "spans", "span_search")},
    "records": FOREIGN,
    "reduce": FOREIGN,
    "images": FOREIGN - {"transformers"},
    "protocol": FOREIGN - {"transformers"},
    **{part: {"transformers"} for part in ("protocol.status", "protocol.request_options", "protocol.answer")},
    "sglang_api": FOREIGN,
    "sglang_api.sampling": {"torch"},
    "weights": FOREIGN - {"transformers"},
    "server": {"tensordict", "torchrl", "httpx"},
    "engines": {"tensordict", "torchrl", f"{PACKAGE}.sglang_api.sampling"},
    "service": {"tensordict", "torchrl", "httpx", "transformers"},
    "policy": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{part}" for part in ("reduce", "protocol", "server", "service", "weights")),
        *(f"{PACKAGE}.sglang_api.{part}" for part in ("payload", "responses", "server_info", "checks")),
    },
    **{
        f"policy.{part}": {f"{PACKAGE}.engines"}
        for part in (
            "outputs",
            "chat_template",
            "chat_text",
            "sampled_turns",
            "chats",
            "prompts",
            "assemble",
            "distributions",
        )
    },
    "policy.action_masks": {"torchrl", f"{PACKAGE}.engines"},
    "rl": {
        "sglang",
        "httpx",
        *(f"{PACKAGE}.{part}" for part in ("records", "reduce", "protocol", "sglang_api", "weights", "engines")),
        *(f"{PACKAGE}.{part}" for part in ("server", "service")),
    },
    "policy.logits_from_hidden": FOREIGN | {f"{PACKAGE}.engines"},
}
# What reaches a package by its front door alone.
FRONT_DOORS = {"policy": {f"{PACKAGE}.engines"}}


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
            # `from package import module` reaches the module.
            names = [f"{base}.{alias.name}" if base == PACKAGE else base for alias in node.names]
        else:
            continue
        yield from (Import(name, node.lineno, id(node) in lazy) for name in dict.fromkeys(names))


def part_of(module: str) -> str:
    """The longest name of `FLOORS` that a module's full name fits; its first part where there is none."""
    parts = module.split(".")[1:] or ["__init__"]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LEVELS), names[-1])


def package_of(part: str) -> str:
    """The package that a part is in; the root's own modules are in none."""
    top = part.split(".")[0]
    return top if (ROOT / top).is_dir() else ""


def is_below(other: str, part: str) -> bool:
    """Whether a part may import another."""
    if LEVELS[other][0] == LEVELS[part][0]:
        return package_of(other) == package_of(part) and LEVELS[other] < LEVELS[part]
    return LEVELS[other] < LEVELS[part]


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
            elif other != part and not is_below(other, part):
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
    found = {module_of(path) for path in modules()}
    assert {part_of(module) for module in found} <= set(LEVELS)
    assert len(found) > 15
    missing = {name for name in LEVELS if f"{PACKAGE}.{name}" not in found} - {"__init__"}
    assert not missing, "named, and not there"


def test_the_root_shows_the_architecture() -> None:
    assert len(FLOORS) <= MAX_FLOORS
    files = [path for path in ROOT.iterdir() if path.is_file()]
    assert len(files) <= MAX_ROOT_FILES, sorted(path.name for path in files)


def table_of_contributing() -> dict[str, int]:
    """Floor by package or root module, as CONTRIBUTING's first table has them."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, flags=re.MULTILINE)
    return {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)/?`", cell)}


def test_contributing_has_the_same_order() -> None:
    floors = {name.split(".")[0]: floor for name, (floor, _) in LEVELS.items()}
    assert table_of_contributing() == floors


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("errors", "from torchrl_sglang_hidden.records import Request", "upward"),
        ("spec.hidden", "def f():\n    from torchrl_sglang_hidden import policy", "upward"),
        ("spec.hidden", "from torchrl_sglang_hidden.spec.logits import LogitsSpec", "upward"),
        ("server.capture", "from torchrl_sglang_hidden.sglang_api import payload", "upward"),
        ("policy.outputs", "from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper", "upward"),
        ("reduce.pooling", "import torchrl_sglang_hidden.sglang_api.sampling", "upward"),
        ("sglang_api.payload", "from torchrl_sglang_hidden import HiddenSpec", "has no place"),
        ("sglang_api.payload", "import torchrl_sglang_hidden", "upward"),
        ("sglang_api.payload", "from .. import engines", "upward"),
        ("sglang_api.payload", "from ..engines import http", "upward"),
        ("server.capture", "from ..engines import base", "upward"),
        ("server.capture", "async def f():\n    import torchrl_sglang_hidden.engines.http", "upward"),
        ("policy.assemble", "from torchrl_sglang_hidden.engines import Engine", "knows nothing of"),
        ("policy.assemble", "from torchrl_sglang_hidden.sglang_api.payload import to_payload", "knows nothing of"),
        ("engines.http", "from torchrl_sglang_hidden.policy.assemble import Row", "upward"),
        ("engines.http", "import tensordict", "knows nothing of"),
        ("server.plugin", "def f():\n    from torchrl.data import x", "knows nothing of"),
        ("server.plugin", "import sglang", "when it is imported itself"),
        ("service.route", "from torchrl_sglang_hidden.engines.http import SGLangServer", "upward"),
        ("service.body", "import torchrl", "knows nothing of"),
        ("policy.wrapper", "from torchrl_sglang_hidden.service.prompts import prompt_ids", "knows nothing of"),
        ("server.plugin", "class A:\n    import sglang.srt", "when it is imported itself"),
        ("policy.wrapper", "from torchrl_sglang_hidden.sglang_api.payload import to_payload", "knows nothing of"),
        ("policy.wrapper", "from torchrl_sglang_hidden.engines.http import SGLangServer", "front door"),
        ("cli", "from torchrl_sglang_hidden.__main__ import main", "upward"),
        ("policy.wrapper", "from torchrl_sglang_hidden.new_room import x", "has no place"),
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
        ("policy.wrapper", "from torchrl_sglang_hidden.engines import Engine"),
        ("__init__", "from torchrl_sglang_hidden import policy, cli"),
    ],
)
def test_the_check_allows_what_is_right(module: str, source: str) -> None:
    assert breaches(source, f"{PACKAGE}.{module}") == []


# --- trust ------------------------------------------------------------------------------------------------------------


UNSAFE = {
    "pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "eval", "exec", "__import__",
    "MultiprocessingSerializer", "recv_pyobj", "unwrap_from_pickle", "safe_pickle_loads",
}  # fmt: skip
# A message of SGLang's own scheduler, on its way from one process of the server to the next.
WITHIN_A_SERVER = {"server/output_stream.py": {"unwrap_from_pickle"}}
# Loaders that unpickle unless told not to, and what tells them.
LOADERS = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
    "yaml.load": "Loader=yaml.SafeLoader",
    "TensorDict.load_memmap": "allow_pickle=False",
    "TensorDict.load": "allow_pickle=False",
}


def unsafe_names(source: str) -> set[str]:
    """Names that run what comes in as data, and loaders not told to leave it; `getattr` tricks are beyond a test."""
    found: set[str] = set()
    calls: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr if node.attr in {"recv_pyobj"} else "")
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in LOADERS:
            told = {ast.unparse(keyword) for keyword in node.keywords}
            calls |= set() if LOADERS[name] in told else {name}
    return (found & UNSAFE) | calls


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_received_can_run(path: Path) -> None:
    allowed = WITHIN_A_SERVER.get(path.relative_to(ROOT).as_posix(), set())
    assert unsafe_names(path.read_text()) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "def f(x):\n    return eval(x)",
        "import torch\ntorch.load('x')",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "torch.load('x', weights_only=False)",
        "yaml.load('x')",
        "TensorDict.load_memmap('x')",
        "socket.recv_pyobj()",
        "from sglang.srt.utils import MultiprocessingSerializer",
    ],
)
def test_the_check_of_unsafe_names_goes_red(source: str) -> None:
    assert unsafe_names(source)
