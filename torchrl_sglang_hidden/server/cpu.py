"""SGLang without an accelerator: its CPU engine, and a stand-in for the CUDA kernels that it imports and never calls.

Knows nothing of TorchRL, and imports no SGLang: everything here must happen before SGLang is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torchrl_sglang_hidden.errors import CapabilityError

__all__ = [
    "CPU_DEFAULTS",
    "bind_threads",
    "cpu_engine_environment",
    "cpu_server_args",
    "has_accelerator",
    "ignore_pinning",
    "text_config",
    "use_cpu_engine",
]

CPU_ENGINE_ENV = "SGLANG_USE_CPU_ENGINE"
BIND_ENV = "SGLANG_CPU_OMP_THREADS_BIND"
STANDIN_DIR = Path(__file__).parent / "standin"

CPU_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "device": "cpu",
        # The share of free memory that weights and KV cache may take together. SGLang's own choice, 0.9 and more, has a
        # graphics card in mind that nobody else uses.
        "mem_fraction_static": 0.7,
        # SGLang zeroes the whole KV pool at start, so that on a CPU every token of it is resident memory from then on:
        # without this limit the pool is mem_fraction_static of all free memory.
        "max_total_tokens": 16384,
        # SGLang sizes its request table for 2048 requests, context length × 4 bytes each, also resident. Two cores gain
        # nothing beyond this, and what is over it waits in the queue.
        "max_running_requests": 128,
    }
)

# A request needs its prompt and its response in the pool at once, rounded up to a page: one full context and a bit.
_POOL_HEADROOM_TOKENS = 64


def has_accelerator() -> bool:
    """Whether torch sees a device that SGLang serves on by itself.

    Cheap: asks torch, starts no device context, imports no SGLang. Apple's MPS does not count, as SGLang needs an MLX
    installation of its own there.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


def cpu_server_args(model: str, *, context_length: int | None = None) -> dict[str, Any]:
    """`CPU_DEFAULTS` for one model: a KV pool in which a prompt of the model's full context length has room.

    Args:
        model: directory or hub name, as for ``--model-path``. A model without a readable config leaves the defaults as
            they are: saying what is wrong with it is SGLang's part.
        context_length: tokens, where the user limits it with ``--context-length``; else what the model's config says.

    Returns:
        SGLang server arguments by their Python names.
    """
    longest = context_length or int(text_config(model).get("max_position_embeddings") or 0)
    pool_tokens = max(CPU_DEFAULTS["max_total_tokens"], longest + _POOL_HEADROOM_TOKENS)
    return {**CPU_DEFAULTS, "max_total_tokens": pool_tokens}


def use_cpu_engine() -> None:
    """Makes SGLang, not yet imported, its CPU engine in this process and in every process it starts from here on.

    Sets ``SGLANG_USE_CPU_ENGINE=1`` and puts the stand-in for ``sgl_kernel`` first on ``sys.path`` and first in
    ``PYTHONPATH``, which spawned processes read. Where ``sglang-kernel-cpu``, SGLang's real CPU kernels, is installed,
    no stand-in is used. Calling it again changes nothing.

    Raises:
        CapabilityError: SGLang was imported in this process already, for another device.
    """
    if "sglang" in sys.modules and os.environ.get(CPU_ENGINE_ENV) != "1":
        raise CapabilityError(
            f"sglang was imported in this process before its CPU engine was chosen ({CPU_ENGINE_ENV} is "
            f"{os.environ.get(CPU_ENGINE_ENV)!r}, read when sglang is imported); set {CPU_ENGINE_ENV}=1 before the "
            "first import of sglang, or use a server in a process of its own: launch(model, device='cpu')"
        )
    os.environ[CPU_ENGINE_ENV] = "1"
    # OpenMP's threads spin while they wait for each other. Where another process wants the same cores, each step then
    # waits for a scheduling slice: 25 s instead of 2 s for 3 × 16 tokens beside one busy process, on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if _has_cpu_kernels():
        return
    standin = str(STANDIN_DIR)
    if standin not in sys.path:
        sys.path.insert(0, standin)
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != standin]
    os.environ["PYTHONPATH"] = os.pathsep.join([standin, *inherited])


def bind_threads(num_ranks: int) -> None:
    """Gives each of several SGLang schedulers cores of its own, unless the user did.

    SGLang's CPU engine refuses more schedulers (``dp_size * tp_size``) than the machine has NUMA nodes without it.

    Args:
        num_ranks: schedulers.
    """
    if num_ranks < 2 or BIND_ENV in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::num_ranks] or [cores[rank % len(cores)]] for rank in range(num_ranks)]
    os.environ[BIND_ENV] = "|".join(",".join(map(str, share)) for share in shares)


def ignore_pinning() -> None:
    """Makes torch take ``pin_memory`` for nothing in this process, for code that asks for it on any machine."""
    import torch

    if getattr(torch.Tensor.pin_memory, "_ignored", False):
        return

    def ignoring(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def make_unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        return make_unpinned

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange"):
        setattr(torch, name, ignoring(getattr(torch, name)))
    stay._ignored = True  # type: ignore[attr-defined]
    torch.Tensor.pin_memory = stay  # type: ignore[method-assign,assignment]


@contextmanager
def cpu_engine_environment(enabled: bool = True) -> Iterator[None]:
    """`use_cpu_engine` for the time in which an in-process ``sglang.Engine`` starts its processes.

    Afterwards ``PYTHONPATH`` is what it was, so that the user's own child processes see no stand-in.
    ``SGLANG_USE_CPU_ENGINE`` and ``sys.path`` stay: SGLang goes on reading both in this process.

    Args:
        enabled: False does nothing at all, for engines on an accelerator.

    Raises:
        CapabilityError: SGLang was imported in this process already, for another device.
    """
    if not enabled:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    try:
        use_cpu_engine()
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


def _has_cpu_kernels() -> bool:
    try:
        metadata.version("sglang-kernel-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


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
