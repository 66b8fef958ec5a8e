"""Finds the one file of SGLang's models that has the class of the model to serve.

Knows nothing of TorchRL or of requests. Imports SGLang's models inside `classes_of` alone.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURE_ENV", "PACKAGE_ENV", "classes_of", "offer_model"]

# SGLang's own: a package with models. SGLang imports all of its own ones only where that has not the one to serve.
PACKAGE_ENV = "SGLANG_EXTERNAL_MODEL_PACKAGE"
ARCHITECTURE_ENV = "TORCHRL_SGLANG_HIDDEN_ARCHITECTURE"


def offer_model(model: str) -> None:
    """Have SGLang import one model's file alone, in this process's children too. A package that the user named stays.

    Args:
        model: directory or hub name, as for ``--model-path``.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return
    architectures = config.get("architectures") or []
    if len(architectures) == 1 and PACKAGE_ENV not in os.environ:
        os.environ[PACKAGE_ENV] = "torchrl_sglang_hidden.server.served_model"
        os.environ[ARCHITECTURE_ENV] = architectures[0]


def classes_of(architecture: str) -> list[type[Any]]:
    """Import the class of an architecture from the file of SGLang's models that names it as one of its own.

    Args:
        architecture: as in a model's ``config.json``, such as ``"LlamaForCausalLM"``.

    Returns:
        The class, alone; nothing where no file has it.
    """
    models = importlib.import_module("sglang.srt.models")
    defines = re.compile(rf"^class {re.escape(architecture)}\b", re.MULTILINE)
    for directory in models.__path__:
        for file in sorted(Path(directory).glob("*.py")):
            if defines.search(file.read_text(encoding="utf-8")):
                module = importlib.import_module(f"{models.__name__}.{file.stem}")
                entry: Any = getattr(module, "EntryClass", [])
                found = [cls for cls in (entry if isinstance(entry, list) else [entry]) if cls.__name__ == architecture]
                if found:
                    return found
    return []
