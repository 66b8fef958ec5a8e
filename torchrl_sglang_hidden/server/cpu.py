"""Sets SGLang's CPU engine up, with a stand-in for the CUDA kernels that it imports and never calls.

Knows nothing of TorchRL or of requests, and imports no SGLang: everything here must happen before SGLang is imported.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    "library_environment",
    "text_config",
    "use_cpu_engine",
]

CPU_ENGINE_ENV = "SGLANG_USE_CPU_ENGINE"
BIND_ENV = "SGLANG_CPU_OMP_THREADS_BIND"
NCCL_ENV = "SGLANG_NCCL_SO_PATH"
THREADS_ENV = "OMP_NUM_THREADS"
# NumPy's and SciPy's BLAS starts a pool of threads when it is loaded. SGLang has no use for it, and a process with
# threads is not forked.
BLAS_ENV = "OPENBLAS_NUM_THREADS"
STANDIN_DIR = Path(__file__).parent / "standin"
# A file that is not there. SGLang then does without NCCL.
NO_NCCL = str(STANDIN_DIR / "no-nccl.so")
# glibc's malloc gives memory over 32 MiB back to the system whenever a tensor of that size is freed, and each prefill
# pays for every page anew. Under these, in bytes, it keeps up to half a GiB: prefills of 128 × 32 and 2 × 2048 tokens
# with D = 4096 took 0.6 of the time on two cores (with a whole GiB).
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**29}
# What `use_cpu_engine` sets for the processes of SGLang. This process does not need them once those are started.
_FOR_CHILDREN = ("PYTHONPATH", "OMP_WAIT_POLICY", THREADS_ENV, BIND_ENV, BLAS_ENV, NCCL_ENV, *MALLOC_ENV)

CPU_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "device": "cpu",
        # The share of free memory that weights and KV cache may take together. SGLang's own default, 0.9 and more, is
        # for a graphics card that nobody else uses.
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
    """Return whether torch sees a device that SGLang serves on without further set-up.

    Cheap: asks torch, starts no device context, imports no SGLang. Apple's MPS does not count, as SGLang needs a
    separate MLX installation there.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


def cpu_server_args(model: str, *, context_length: int | None = None) -> dict[str, Any]:
    """Return `CPU_DEFAULTS` for one model, with a KV pool that holds a prompt of the model's full context length.

    Args:
        model: directory or hub name, as for ``--model-path``. The defaults stay as they are for a model whose config
            cannot be read: SGLang then says what is wrong with it.
        context_length: the user's ``--context-length`` in tokens; None for the length in the model's config.

    Returns:
        SGLang server arguments by their Python names.
    """
    longest = context_length or int(text_config(model).get("max_position_embeddings") or 0)
    pool_tokens = max(CPU_DEFAULTS["max_total_tokens"], longest + _POOL_HEADROOM_TOKENS)
    return {**CPU_DEFAULTS, "max_total_tokens": pool_tokens}


def use_cpu_engine(num_ranks: int = 1) -> None:
    """Choose SGLang's CPU engine for this process and every process it starts, before SGLang is imported.

    Sets ``SGLANG_USE_CPU_ENGINE=1`` and puts the stand-in for ``sgl_kernel`` first on ``sys.path`` and first in
    ``PYTHONPATH``, which spawned processes read. Where ``sglang-kernel-cpu``, SGLang's real CPU kernels, is installed,
    no stand-in is used. Variables that the user set stay as they are. Calling it again changes nothing.

    Args:
        num_ranks: the number of schedulers, ``dp_size * tp_size``. Several share the cores, see `bind_threads`.

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
    # torch's CUDA build brings NCCL, which SGLang takes wherever the library loads, on the CPU too: with several ranks
    # the start ends in "Expected a cuda device". Without the library SGLang leaves collectives to torch, that is gloo.
    os.environ.setdefault(NCCL_ENV, NO_NCCL)
    for name, num_bytes in MALLOC_ENV.items():
        os.environ.setdefault(name, str(num_bytes))
    _limit_threads(num_ranks)
    if _has_cpu_kernels():
        return
    standin = str(STANDIN_DIR)
    if standin not in sys.path:
        sys.path.insert(0, standin)
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != standin]
    os.environ["PYTHONPATH"] = os.pathsep.join([standin, *inherited])


def _limit_threads(num_ranks: int) -> None:
    # OpenMP's threads spin while they wait for each other. When another process wants the same cores, each step waits
    # for a scheduling slice: 3 × 16 tokens took 25 s instead of 2 s beside one busy process, on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(BLAS_ENV, "1")
    bind_threads(num_ranks)


def bind_threads(num_ranks: int) -> None:
    """Divide the cores among several SGLang schedulers. What the user set of the two variables stays.

    Sets ``SGLANG_CPU_OMP_THREADS_BIND``, without which SGLang's CPU engine refuses to run more schedulers than the
    machine has NUMA nodes, and ``OMP_NUM_THREADS``, as SGLang binds no threads on processors without AMX.

    Args:
        num_ranks: the number of schedulers, ``dp_size * tp_size``.
    """
    if num_ranks < 2:
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::num_ranks] or [cores[rank % len(cores)]] for rank in range(num_ranks)]
    os.environ.setdefault(BIND_ENV, "|".join(",".join(map(str, share)) for share in shares))
    os.environ.setdefault(THREADS_ENV, str(len(shares[-1])))


def ignore_pinning() -> None:
    """Make torch ignore ``pin_memory`` in this process, for code that asks for it on every machine."""
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
def library_environment(num_ranks: int = 1) -> Iterator[None]:
    """Import torch inside the block as `use_cpu_engine` wants it, before it is known whether the CPU engine runs.

    OpenMP and BLAS read their environment when torch and NumPy load them. It is restored after the block.

    Args:
        num_ranks: the number of schedulers, ``dp_size * tp_size``.
    """
    with _restored(_FOR_CHILDREN):
        _limit_threads(num_ranks)
        yield


@contextmanager
def cpu_engine_environment(enabled: bool = True, num_ranks: int = 1) -> Iterator[None]:
    """Run `use_cpu_engine` while an in-process ``sglang.Engine`` starts its processes, then restore the environment.

    Otherwise the user's own child processes would import the stand-in, and compute with the threads of one rank.
    ``SGLANG_USE_CPU_ENGINE`` and ``sys.path`` stay as set: SGLang goes on reading both in this process.

    Args:
        enabled: False does nothing, for engines on an accelerator.
        num_ranks: the number of schedulers, ``dp_size * tp_size``.

    Raises:
        CapabilityError: SGLang was imported in this process already, for another device.
    """
    if not enabled:
        yield
        return
    with _restored(_FOR_CHILDREN):
        use_cpu_engine(num_ranks)
        yield


@contextmanager
def _restored(names: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _has_cpu_kernels() -> bool:
    try:
        metadata.version("sglang-kernel-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def text_config(model: str) -> dict[str, Any]:
    """Read the language model's configuration; empty where none can be read, as SGLang then says what is wrong.

    Args:
        model: directory or hub name, as for ``--model-path``.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return {}
    # Multimodal models keep the language model's settings one level down.
    return {**config, **(config.get("text_config") or {})}
