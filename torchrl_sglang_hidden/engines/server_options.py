"""A model, layers and constraint modules to start an SGLang with, checked against what this machine can see of them.

Used by `launch` and by `SGLangOffline`. Imports no SGLang.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchrl_sglang_hidden.errors import CapabilityError, InputError, InputTypeError
from torchrl_sglang_hidden.protocol import ALL_LAYERS, CONSTRAINTS_ENV, PLUGIN_ENV
from torchrl_sglang_hidden.server.cpu import text_config
from torchrl_sglang_hidden.spec.constraints import constraints_of
from torchrl_sglang_hidden.spec.hidden import canonical_layer

__all__ = ["opted_in", "require_sglang", "resolve_layers", "resolve_model", "resolve_modules"]


def resolve_layers(layers: int | Sequence[int] | None, model: str) -> str:
    """Write the layers that a server's CUDA graphs record as the server half reads them from its environment.

    Args:
        layers: one id or several, as in `HiddenSpec`. The last layer is always added. None for all where that is cheap.
        model: directory or hub name.

    Returns:
        ``"all"``, or canonical ids with commas in between, such as ``"7,15,-1"``. Where the model's configuration
        cannot be read from here, the ids are as given, and SGLang checks them when it starts.

    Raises:
        InputTypeError: ``layers`` is neither an integer nor a sequence of integers, nor None.
        InputError: an id that the model does not have.
    """
    if layers is None:
        return ALL_LAYERS
    ids = [layers] if isinstance(layers, int) else layers
    if isinstance(ids, str) or not isinstance(ids, Sequence) or any(type(layer) is not int for layer in ids):
        raise InputTypeError(
            f"layers={layers!r}: expected an integer or a tuple of them, such as (7, 15, -1), or None for all"
        )
    num_layers = text_config(model).get("num_hidden_layers")
    if num_layers is not None:
        ids = [canonical_layer(layer, int(num_layers)) for layer in ids]
    return ",".join(str(layer) for layer in dict.fromkeys((*ids, -1)))


def resolve_modules(modules: Sequence[str]) -> dict[str, str]:
    """Import the user's modules with constraints, and return the environment in which a server finds them.

    Args:
        modules: full names of the modules.

    Returns:
        Environment variables by name; none for no modules.

    Raises:
        InputError: a module that cannot be imported here, that a server could not import, or that defines no named
            constraint.
        InputTypeError: ``modules`` is no sequence of names.
    """
    if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
        raise InputTypeError(
            f"constraint_modules={modules!r}: expected a tuple of module names, such as ('my.module',)"
        )
    roots = []
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"constraint_modules: {name!r} cannot be imported here ({error}); install the module, or put its "
                "directory on PYTHONPATH"
            ) from error
        if name == "__main__" or getattr(module, "__file__", None) is None:
            raise InputError(
                f"constraint_modules: {name!r} is no module of a file that a server could import; make it one"
            )
        if not constraints_of(name):
            raise InputError(
                f"constraint_modules: {name!r} defines no LogitConstraint with a name; import the module that does"
            )
        file = Path(str(module.__file__))
        package = file.parent if file.name == "__init__.py" else file.with_suffix("")
        roots.append(str(package.parents[name.count(".")]))
    if not roots:
        return {}
    # The server must find what this process found through sys.path.
    path = os.pathsep.join(dict.fromkeys((*roots, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))))
    return {CONSTRAINTS_ENV: ",".join(modules), "PYTHONPATH": path}


def resolve_model(model: str | os.PathLike[str]) -> str:
    """Return the model as SGLang takes it: an absolute directory, or a model hub's name unchanged.

    Args:
        model: directory or hub name. A path object, a string that starts with ``.``, ``~`` or ``/``, and a string that
            names an existing path are directories.

    Raises:
        InputTypeError: ``model`` is neither a string nor a path.
        InputError: the directory does not exist, or has no ``config.json``.
    """
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InputTypeError(f"model={model!r}: expected a model directory or a model hub's name")
    name = os.fspath(model)
    path = Path(name).expanduser()
    if isinstance(model, str) and not name.startswith((".", "~", "/")) and not path.exists():
        return name
    if (path / "config.json").is_file():
        return str(path.absolute())
    found = "does not exist" if not path.exists() else "is not a directory with a config.json"
    raise InputError(
        f"model={name!r}: {path.absolute()} {found}; pass a directory written by save_pretrained, a model hub's name "
        "such as 'Qwen/Qwen3-0.6B', or demo_model()"
    )


def require_sglang() -> None:
    """Check that SGLang is installed, without importing it.

    Raises:
        CapabilityError: SGLang is not installed.
    """
    if importlib.util.find_spec("sglang") is None:
        raise CapabilityError(
            "sglang is not installed in this environment; "
            "install it with pip install 'torchrl-sglang-hidden[sglang]', or connect to a server that runs elsewhere"
        )


@contextmanager
def opted_in(options: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that switch the server half on, while SGLang starts its processes."""
    chosen = {PLUGIN_ENV: "1", **options}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
