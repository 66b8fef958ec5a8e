"""Stands in for SGLang's CUDA kernel package where there is no accelerator: any name imports, and raises when called.

SGLang's CPU engine imports names from ``sgl_kernel`` that it does not call, and the CUDA build cannot be imported
without ``libcuda.so.1``. ``torchrl_sglang_hidden.server.cpu`` puts this directory in front of the real package. It is
not part of the package's import tree, and knows nothing of SGLang or of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

# Qwen3.5's model file reads them of torch's operators when it is imported, and SGLang's processors of images for the
# whole Qwen-VL family import that file. No more of them: SGLang takes `convert_weight_packed` for a sign of AMX.
_OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


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


for _operator in _OPERATORS:
    setattr(torch.ops.sgl_kernel, _operator, __getattr__(_operator))
