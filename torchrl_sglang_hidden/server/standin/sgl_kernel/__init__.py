"""Stands in for SGLang's CUDA kernel package where there is no accelerator: any name imports, and raises when called.

SGLang's CPU engine imports names from ``sgl_kernel`` that it does not call, and the CUDA build cannot be imported
without ``libcuda.so.1``. ``torchrl_sglang_hidden.server.cpu`` puts this directory in front of the real package. It is
not part of the package's import tree, and knows nothing of SGLang or of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # The import system looks for names such as __path__ and __all__: they must be absent, not functions.
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}: this is a stand-in without compiled kernels, for SGLang on the CPU; "
            "use a model that SGLang's torch_native path serves, a build of sglang-kernel-cpu, or an accelerator"
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
