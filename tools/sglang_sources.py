"""Reads SGLang's sources, from a wheel or a directory, and compares what a name stands for in two of them.

Nothing is imported or run: a version can be read that is not installed and would not start here. Knows nothing of what
this package needs of SGLang.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_VERSION = re.compile(r"""^__version__ = version = ['"](.+?)['"]""", re.MULTILINE)


@dataclass(frozen=True)
class Definition:
    """Says what a name stands for.

    Args:
        node: what defines it: a function, a class, an assignment, or a module.
        module: where that is.
    """

    node: ast.AST
    module: str


class Sources:
    """SGLang's sources.

    Args:
        path: a wheel, or a directory that holds ``sglang/``, such as ``site-packages`` or an unpacked wheel.

    Raises:
        SystemExit: there is no SGLang.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._modules: dict[str, ast.Module | None] = {}
        self._attributes: dict[ast.ClassDef, dict[str, ast.AST]] = {}
        self._wheel: zipfile.ZipFile | None = None
        if path.is_file() and zipfile.is_zipfile(path):
            self._wheel = zipfile.ZipFile(path)
            self.files = {name for name in self._wheel.namelist() if re.match(r"sglang/.*\.py$", name)}
        else:
            self.files = {file.relative_to(path).as_posix() for file in (path / "sglang").rglob("*.py")}
        if "sglang/__init__.py" not in self.files:
            raise SystemExit(f"{path} holds no sglang/__init__.py; name a wheel, or a directory with sglang/ in it")

    @functools.cached_property
    def version(self) -> str:
        """The version that SGLang's build wrote down; empty where there was no build."""
        found = _VERSION.search(self.text("sglang/_version.py")) if "sglang/_version.py" in self.files else None
        return found[1] if found else ""

    def text(self, file: str) -> str:
        """Read one of `files`."""
        data = (self.path / file).read_bytes() if self._wheel is None else self._wheel.read(file)
        return data.decode("utf-8")

    def module(self, name: str) -> ast.Module | None:
        """Parse a module; None where there is none of that name."""
        if name not in self._modules:
            base = name.replace(".", "/")
            file = next((file for file in (f"{base}.py", f"{base}/__init__.py") if file in self.files), None)
            self._modules[name] = None if file is None else ast.parse(self.text(file))
        return self._modules[name]

    def find(self, target: str) -> Definition | None:
        """Find what defines a dotted name, through imports and base classes; None where nothing does."""
        parts = target.split(".")
        for cut in range(len(parts), 0, -1):
            name = ".".join(parts[:cut])
            tree = self.module(name)
            if tree is None:
                continue
            found: Definition | None = Definition(tree, name)
            for part in parts[cut:]:
                found = None if found is None else self._member(found, part)
            if found is not None:
                return found
        return None

    def _member(self, owner: Definition, name: str) -> Definition | None:
        if isinstance(owner.node, ast.Module):
            return self._global(owner.module, name)
        return self._attribute(owner, name) if isinstance(owner.node, ast.ClassDef) else None

    def _global(self, module: str, name: str) -> Definition | None:
        tree = self.module(module)
        for node in [] if tree is None else _statements(tree.body):
            if name in _bound(node):
                lazy = _lazily_imported(node)
                return self.find(lazy) if lazy else Definition(node, module)
            # A module of Python's own that SGLang looks up under its name.
            if isinstance(node, ast.Import) and name in [alias.asname or alias.name for alias in node.names]:
                return Definition(node, module)
            if isinstance(node, ast.ImportFrom):
                source = self._imported_from(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(f"{source}.{alias.name}")
                    if alias.name == "*" and (found := self._global(source, name)) is not None:
                        return found
        return None

    def _imported_from(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = f"{module.replace('.', '/')}/__init__.py" in self.files
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _attribute(self, owner: Definition, name: str) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in owner.node.body:
            if name in _bound(node):
                return Definition(node, owner.module)
        for base in owner.node.bases:
            written = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            parent = self._global(owner.module, written.split(".")[0])
            for part in written.split(".")[1:]:
                parent = None if parent is None else self._member(parent, part)
            found = self._member(parent, name) if parent is not None and parent.node is not owner.node else None
            if found is not None:
                return found
        set_on_self = self._set_on_self(owner.node).get(name)
        return None if set_on_self is None else Definition(set_on_self, owner.module)

    def _set_on_self(self, owner: ast.ClassDef) -> dict[str, ast.AST]:
        if owner not in self._attributes:
            self._attributes[owner] = {
                node.attr: node
                for node in ast.walk(owner)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if isinstance(node.value, ast.Name) and node.value.id == "self"
            }
        return self._attributes[owner]

    def nearest(self, target: str) -> str:
        """Name what a target that is gone may be now; empty where nothing is like it."""
        owner, _, name = target.rpartition(".")
        parent = self.find(owner)
        if parent is not None and isinstance(parent.node, (ast.ClassDef, ast.Module)):
            nodes = _statements(parent.node.body)
            names = sorted({bound for node in nodes for bound in _bound(node)})
            close = difflib.get_close_matches(name, names, n=1)
            if close:
                return f"{owner}.{close[0]}"
        return ", ".join(self._defining(name)[:3])

    def _defining(self, name: str) -> list[str]:
        """List the modules that define a function or a class of that name, at any depth."""
        pattern = re.compile(rf"^\s*(?:async def|def|class) {re.escape(name)}\b", re.MULTILINE)
        files = sorted(file for file in self.files if file.startswith("sglang/srt/"))
        return [f"{name} in {file}" for file in files if pattern.search(self.text(file))]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, and those inside its ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        if not isinstance(node, (*Function, ast.ClassDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _lazily_imported(node: ast.stmt) -> str:
    """Return the target of ``Engine = LazyImport("sglang.srt.entrypoints.engine", "Engine")``; empty for all else."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
        return ""
    found = re.match(r"LazyImport\('([\w.]+)', '(\w+)'\)$", ast.unparse(node.value))
    return f"{found[1]}.{found[2]}" if found else ""


def _bound(node: ast.AST) -> list[str]:
    """List the names that a statement defines; an import defines none here."""
    if isinstance(node, (*Function, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def signature(node: ast.AST) -> str:
    """Write how a function is called: its parameters without annotations; for all else, what kind of thing it is."""
    if not isinstance(node, Function):
        return {ast.ClassDef: "class", ast.Module: "module"}.get(type(node), "value")
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(name.endswith("property") for name in decorators):
        return "value"  # read as an attribute is
    parameters = ast.unparse(_without_annotations(node.args))
    kinds = [f"@{name} " for name in decorators if name in ("classmethod", "staticmethod")]
    return f"{''.join(kinds)}{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}({parameters})"


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    copy = _arguments_of(f"def f({ast.unparse(arguments)}): pass")
    for argument in ast.walk(copy):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return copy


def _arguments_of(source: str) -> ast.arguments:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def body(node: ast.AST) -> list[str]:
    """Write what a function does, without comments and docstrings, line by line; nothing for all else."""
    if not isinstance(node, Function):
        return []
    copy = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(copy, Function)
    if ast.get_docstring(copy) is not None:
        copy.body = copy.body[1:] or [ast.Pass()]
    copy.args, copy.returns = _arguments_of("def f(): pass"), None
    return ast.unparse(copy).splitlines()
