"""Stands in for SGLang's CUDA kernel package where there is no accelerator: names import, calls refuse.

SGLang's CPU engine imports names from ``sgl_kernel`` that it does not call; the CUDA build cannot be imported without
``libcuda.so.1``. This directory is put in front of the real package by ``torchrl_sglang_hidden.server.cpu`` and is not
part of the package's import tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Dunder names are probed by the import system (__path__, __all__) and must be absent, not functions.
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}: this is a stand-in without compiled kernels, for SGLang on the CPU; "
            "use a model that SGLang's torch_native path serves, a build of sglang-kernel-cpu, or an accelerator"
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
