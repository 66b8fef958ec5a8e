"""Lists what this package needs of SGLang: what it hooks, imports, reads and sets there.

Most of it is read off the package's own sources, so that it stays true; the tables below say which variables there are
SGLang's objects. What comes in answers, as JSON, is not listed: the tests on real servers hold that.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchrl_sglang_hidden
from torchrl_sglang_hidden.server import forking, plugin
from torchrl_sglang_hidden.server.cpu import CPU_DEFAULTS
from torchrl_sglang_hidden.service import plugin as service_plugin
from torchrl_sglang_hidden.sglang_api.sampling import SGLANG_NAMES

PACKAGE = Path(torchrl_sglang_hidden.__file__).parent

_SRT = "sglang.srt"
_MANAGERS, _EXECUTOR = f"{_SRT}.managers", f"{_SRT}.model_executor"
SAMPLING_PARAMS = f"{_SRT}.sampling.sampling_params.SamplingParams"
GENERATE = f"{_MANAGERS}.io_struct.GenerateReqInput"
# Arguments of a server: fields of classes in modules beside this one, which SGLang puts together when it is imported.
SERVER_ARGS = f"{_SRT}.server_args.ServerArgs"
# Routes: words in the decorators of this module.
ROUTES = f"{_SRT}.entrypoints.http_server"

# What variables of the server half, of the vector service and of `engines.offline` are.
VARIABLES: Mapping[str, str] = {
    "req": f"{_MANAGERS}.schedule_batch.Req",
    "batch": f"{_MANAGERS}.schedule_batch.ScheduleBatch",
    "forward_batch": f"{_EXECUTOR}.forward_batch_info.ForwardBatch",
    "sampling_info": f"{_SRT}.sampling.sampling_batch_info.SamplingBatchInfo",
    "logits_output": f"{_SRT}.layers.logits_processor.LogitsProcessorOutput",
    "processor": f"{_SRT}.layers.logits_processor.LogitsProcessor",
    "image_processor": f"{_SRT}.multimodal.processors.llava.LlavaMultimodalProcessor",
    "model_runner": f"{_EXECUTOR}.model_runner.ModelRunner",
    "scheduler": f"{_MANAGERS}.scheduler.Scheduler",
    "manager": f"{_MANAGERS}.tokenizer_manager.TokenizerManager",
    "tree_cache": f"{_SRT}.mem_cache.base_prefix_cache.BasePrefixCache",
    "commit": f"{_MANAGERS}.auxiliary_output.CommittedTokens",
    "message": f"{_MANAGERS}.io_struct.BatchTokenIDOutput",
    "kept": f"{_SRT}.layers.layer_boundary.residual.stream.ResidualStream",
}
# What their attributes are, where these have attributes that are read in turn.
ATTRIBUTES: Mapping[str, str] = {
    "sampling_params": SAMPLING_PARAMS,
    "sampling_info": VARIABLES["sampling_info"],
    "model_config": f"{_SRT}.configs.model_config.ModelConfig",
    "model_runner": VARIABLES["model_runner"],
    "server_args": SERVER_ARGS,
    "engine": f"{_SRT}.entrypoints.engine.Engine",
    "tokenizer_manager": VARIABLES["manager"],
}
# The class that the server half subclasses, by the subclass's name.
BASES: Mapping[str, str] = {
    "PooledOutputStreamer": f"{_MANAGERS}.scheduler_components.output_streamer.SchedulerOutputStreamer",
}
# What SGLang calls on objects of this package.
CALLED_BY_SGLANG = (
    f"{_MANAGERS}.auxiliary_output.DeviceAuxiliaryOutput.copy_to_host",
    f"{_MANAGERS}.auxiliary_output.HostAuxiliaryOutput.consume",
)
# What is read of values that functions return.
RETURNED = (f"{_SRT}.runtime_context.RuntimeContext.config_leaf",)
# What this package sets itself on SGLang's objects, for itself.
OWN = {"later"}


@dataclass(frozen=True, order=True)
class Need:
    """Names something of SGLang's.

    Args:
        kind: what it is here: "hook", "import", "attribute", "argument", "field" or "route".
        target: its dotted name.
        where: what in this package needs it.
    """

    kind: str
    target: str
    where: str


def needs() -> list[Need]:
    """List all, each once."""
    found = {need.target: need for need in sorted(_all(), reverse=True)}
    # A hook says most about its target, and comes last in the order of kinds.
    found |= {need.target: need for need in _hooks()}
    return sorted(found.values())


def _all() -> Iterator[Need]:
    for target in CALLED_BY_SGLANG:
        yield Need("attribute", target, "SGLang calls it on the server half's outputs")
    for target in RETURNED:
        yield Need("attribute", target, "server/settings.py")
    for name in (*CPU_DEFAULTS, "enable_return_hidden_states"):
        yield Need("argument", f"{SERVER_ARGS}.{name}", "server/cpu.py")
    for name in SGLANG_NAMES:
        yield Need("field", f"{SAMPLING_PARAMS}.{name}", "sglang_api/sampling.py")
    for file in sorted(PACKAGE.rglob("*.py")):
        yield from _of_file(ast.parse(file.read_text(encoding="utf-8")), file.relative_to(PACKAGE).as_posix())


def _hooks() -> Iterator[Need]:
    for target, hook in hooks().items():
        yield Need("hook", target, f"{hook.__name__}{inspect.signature(_plain(hook))}")


def hooks() -> dict[str, Callable[..., Any]]:
    """Return the hooks by what they hook."""
    return {**plugin._BEFORE, **plugin._AFTER, **plugin._AROUND, **service_plugin.HOOKS, **forking.HOOKS}


def _plain(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the same parameters, without their types."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(hook).parameters.values()
    ]
    plain: Any = lambda: None  # noqa: E731 - a function to put a signature on
    plain.__signature__ = inspect.Signature(parameters)
    return plain  # type: ignore[no-any-return]


def _of_file(tree: ast.Module, file: str) -> Iterator[Need]:
    imported = dict(_imports(tree))
    for target in imported.values():
        yield Need("import", target, file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            yield Need("import", f"{imported[node.value.id]}.{node.attr}", file)
        in_client = file.startswith(("engines/", "weights/"))
        if in_client and isinstance(node, ast.Call) and (route := _route(node)) is not None:
            yield Need("route", f"{ROUTES}.{route}", file)
        if isinstance(node, ast.Subscript) and _name(node.value) == "payload" and isinstance(node.ctx, ast.Store):
            for field in _text(node.slice):
                yield Need("field", f"{GENERATE}.{field}", file)
        if isinstance(node, ast.Call) and _name(node.func) == "leaf":
            yield Need("argument", f"{SERVER_ARGS}.{ast.literal_eval(node.args[0])}", file)
        # In-process engines call the tokenizer manager's methods of the routes' names.
        if isinstance(node, ast.Dict) and any(_is_input(value) for value in node.values):
            for key in node.keys:
                for route in () if key is None else _text(key):
                    yield Need("attribute", f"{VARIABLES['manager']}.{route}", file)
    if file.startswith("server/") or file in ("engines/offline.py", "service/route.py"):
        for target in _read(tree, dict(VARIABLES), _hooked_objects()):
            kind = "argument" if target.startswith(SERVER_ARGS) else "attribute"
            yield Need(kind, target, file)


def _name(node: ast.expr) -> str:
    """Return the name of a plain variable; empty for all else."""
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> tuple[str, ...]:
    """Return the string that is written out, alone; nothing for all else."""
    return (node.value,) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ()


def _is_input(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and _name(node.value) == "io_struct"


def _route(node: ast.Call) -> str | None:
    """Return the route that is called: ``self._get("/model_info")``, ``call("pause_generation", …)``."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
    texts = [text for value in node.args for text in _text(value)]
    if name in ("_get", "post", "stream"):
        return next((text for text in texts if text.startswith("/")), None)
    return f"/{texts[0]}" if name in ("call", "_call") and texts else None


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sglang":
                    yield alias.asname or alias.name, alias.name


def _hooked_objects() -> dict[str, dict[str, str]]:
    """Return, by the name of each hook, which class its parameter is of that stands for the method's object."""
    found = {}
    for target, hook in hooks().items():
        names = [name for name in inspect.signature(hook).parameters if name not in ("args", "kwargs", "cls")]
        # Hooks before have the method's parameters, the others one in front of them.
        place = 0 if target in plugin._BEFORE else 1
        owner = target.split(".")[-2]
        # A function of a module has no object.
        if len(names) > place and owner[0].isupper() and not target.endswith("ForwardBatch.init_new"):
            found[hook.__name__] = {names[place]: target.rpartition(".")[0]}
    return found


def _read(node: ast.AST, known: dict[str, str], hooked: Mapping[str, dict[str, str]]) -> Iterator[str]:
    """Yield what is read, set or called on SGLang's objects."""
    for child in ast.iter_child_nodes(node):
        inner = known
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = {**known, **hooked.get(child.name, {})}
        elif isinstance(child, ast.ClassDef) and child.name in BASES:
            inner = {**known, "self": BASES[child.name]}
            overridden = [part.name for part in child.body if isinstance(part, ast.FunctionDef)]
            yield from (f"{BASES[child.name]}.{name}" for name in overridden if name != "__post_init__")
        elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            kind = _kind(child.value, known)
            if kind is not None:
                known[child.targets[0].id] = kind
        name = _attribute(child)
        if name is not None:
            owner, attribute = name
            kind = _kind(owner, known)
            if kind is not None and attribute not in OWN:
                yield f"{kind}.{attribute}"
        yield from _read(child, inner, hooked)


def _attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """Return the object and the name of ``x.name`` and ``getattr(x, "name")``."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Call) and _name(node.func) in ("getattr", "hasattr"):
        return next(((node.args[0], name) for name in _text(node.args[1])), None)
    return None


def _kind(node: ast.expr, known: Mapping[str, str]) -> str | None:
    """Return the class of SGLang's that an expression is of; None where it is none that is known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (_kind(node.value, known) or _name(node.value) == "self"):
        return ATTRIBUTES.get(node.attr)
    return None
