"""Hooks that let SGLang start where it would not: without an accelerator, and with weights that are made up.

Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl_sglang_hidden.server.cpu import has_accelerator, ignore_pinning
from torchrl_sglang_hidden.server.weight_routes import read_adapters

__all__ = ["BEFORE_START", "before_lora"]


def before_lora(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Let SGLang's LoRA manager start on a CPU: it pins memory, which torch refuses without an accelerator.

    And let a server that was started with ``load_format="dummy"`` read adapters: SGLang reads them as the model.
    """
    if not has_accelerator():
        ignore_pinning()
    return args, read_adapters(kwargs)


def before_host_cache(*args: Any, **kwargs: Any) -> None:
    """Let SGLang record routed experts on a CPU: it registers the memory for them with CUDA on every machine."""
    if not has_accelerator():
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS, alloc_with_pin_memory

        ignore_pinning()
        ALLOC_MEMORY_FUNCS["cpu"] = alloc_with_pin_memory


BEFORE_START: dict[str, Callable[..., Any]] = {
    "sglang.srt.lora.lora_manager.LoRAManager.__init__": before_lora,
    "sglang.srt.state_capturer.base.BaseHostCache.__init__": before_host_cache,
}
