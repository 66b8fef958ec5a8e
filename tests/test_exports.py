"""The public names: one flat namespace, loaded when used, and nothing else loaded with it."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_sglang_hidden
from torchrl_sglang_hidden import SGLangHiddenError, errors

PACKAGE = "torchrl_sglang_hidden"
SOURCE = Path(torchrl_sglang_hidden.__file__).read_text()
NAMES = [name for name in torchrl_sglang_hidden.__all__ if name != "__version__"]


def type_checking_imports() -> dict[str, str]:
    """Return each name's module, as type checkers see it."""
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "mypy --strict sees a re-export only in `import X as X`"
            found[alias.name] = str(node.module).removeprefix(f"{PACKAGE}.")
    return found


def test_type_checkers_see_what_is_there() -> None:
    assert type_checking_imports() == torchrl_sglang_hidden._MODULES


def test_all_is_sorted_and_without_doubles() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert torchrl_sglang_hidden.__all__ == ["__version__", *sorted(NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_that_of_its_module(name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{torchrl_sglang_hidden._MODULES[name]}")
    value = getattr(torchrl_sglang_hidden, name)
    assert value is getattr(module, name)
    assert value.__module__ == module.__name__, "re-exported from where it is defined"
    assert name in getattr(module, "__all__", [name])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(torchrl_sglang_hidden, name)
    # From the source: tensordict puts the signature in the place of a TensorClass's docstring.
    (source,) = ast.parse(inspect.getsource(value)).body
    assert isinstance(source, (ast.ClassDef, ast.FunctionDef))
    assert ast.get_docstring(source)
    members = vars(value).items() if inspect.isclass(value) else ()
    for member_name, member in members:
        code = member.fget if isinstance(member, property) else member
        if not member_name.startswith("_") and inspect.isfunction(code) and code.__module__ == value.__module__:
            assert code.__doc__, f"{name}.{member_name}"


def test_every_error_is_exported() -> None:
    defined = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, SGLangHiddenError)
    }
    assert defined == set(errors.__all__) <= set(NAMES)


def test_whoever_talks_to_an_engine_has_its_contract() -> None:
    """What `Engine.stream` takes, what comes back, and the annotations of its records."""
    contract = {"Engine", "EngineInfo", "Request", "Completion", "Pooled", "TokenRows", "TokenLogits"}
    assert contract <= set(NAMES)
    assert loaded_by(f"from {PACKAGE} import {', '.join(contract)}", "sglang", "torchrl") == []


def test_dir_lists_the_public_names() -> None:
    assert set(torchrl_sglang_hidden.__all__) <= set(dir(torchrl_sglang_hidden))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"'torchrl_sglang_hidden' has no attribute 'HidenSpec'"):
        _ = torchrl_sglang_hidden.HidenSpec
    with pytest.raises(ImportError):
        exec("from torchrl_sglang_hidden import HidenSpec")


def test_a_star_import_gives_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from torchrl_sglang_hidden import *", namespace)
    assert set(torchrl_sglang_hidden.__all__) <= set(namespace)


def loaded_by(statement: str, *modules: str) -> list[str]:
    script = f"{statement}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_loads_nothing() -> None:
    heavy = ("sglang", "torchrl", "tensordict", "torch", "transformers", "httpx", "numpy", "rich")
    assert loaded_by(f"import {PACKAGE}", *heavy) == []
    assert loaded_by("import httpx", *heavy)[0] == "httpx", "the check sees what is loaded"


def test_a_client_loads_neither_sglang_nor_transformers() -> None:
    """A tokenizer is loaded with transformers when a policy needs one: that import takes seconds."""
    names = "SGLangServer, SGLangHiddenWrapper, HiddenSpec, launch"
    assert loaded_by(f"from {PACKAGE} import {names}", "sglang", "transformers", "httpx") == ["httpx"]
    # As workers of environments do, whose policy is a pickle.
    assert loaded_by(f"import {PACKAGE}.rl", "sglang", "transformers", "torchrl") == ["torchrl"]


def test_this_process_has_loaded_no_sglang() -> None:
    """Fast tests must not: SGLang takes seconds, and needs a CUDA wheel that a plain machine cannot load."""
    assert "sglang" not in sys.modules
