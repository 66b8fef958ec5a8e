"""What a server is started for: held against the model's own configuration, and against what can be imported.

Knows nothing of TorchRL, and imports no SGLang.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["check_layers", "check_modules", "text_config"]


def text_config(model: str) -> dict[str, Any]:
    """The language model's configuration; empty where none can be read: saying what is wrong is SGLang's part.

    Args:
        model: directory or hub name, as for ``--model-path``.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return {}
    # Multimodal models keep the language model's numbers one level down.
    return {**config, **(config.get("text_config") or {})}


def check_layers(layers: int | Sequence[int], model: str) -> str:
    """The layers to start a server for, as the server half reads them from its environment.

    Args:
        layers: ids as in `HiddenSpec`. The last layer's states are always there.
        model: directory or hub name.

    Raises:
        InputTypeError: no integer, or no sequence of them.
        InputError: an id that the model does not have, where its configuration can be read from here.
    """
    from torchrl_sglang_hidden.spec.hidden import (
        canonical_layer,  # imports torch, which the server's start does not wait for
    )

    ids = [layers] if isinstance(layers, int) else layers
    if isinstance(ids, str) or not isinstance(ids, Sequence) or any(type(layer) is not int for layer in ids):
        raise InputTypeError(f"layers={layers!r}: expected an integer or a tuple of them, such as (7, 15, -1)")
    num_layers = text_config(model).get("num_hidden_layers")
    if num_layers is not None:
        ids = [canonical_layer(layer, int(num_layers)) for layer in ids]
    return ",".join(str(layer) for layer in dict.fromkeys((*ids, -1)))


def check_modules(modules: Sequence[str]) -> dict[str, str]:
    """The environment in which a server finds modules with constraints of the user's own. Imports them here.

    Args:
        modules: their full names.

    Raises:
        InputError: one that cannot be imported here, or none of whose constraints a server could import.
        InputTypeError: no sequence of names.
    """
    from torchrl_sglang_hidden.protocol import CONSTRAINTS_ENV
    from torchrl_sglang_hidden.spec.constraints import constraints_of

    if isinstance(modules, str) or not all(isinstance(name, str) and name for name in modules):
        raise InputTypeError(
            f"constraint_modules={modules!r}: expected a tuple of module names, such as ('my.module',)"
        )
    roots = []
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"constraint_modules: {name!r} cannot be imported here ({error})") from error
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
    # What this process found through sys.path the server must find too.
    path = os.pathsep.join(dict.fromkeys((*roots, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))))
    return {CONSTRAINTS_ENV: ",".join(modules), "PYTHONPATH": path}
