"""Has SGLang fork its processes from the one that has imported everything, instead of starting Python anew for each.

SGLang spawns a scheduler for each rank and a detokenizer, and each imports torch, transformers and SGLang again: most
of what a start costs on a CPU. Used by ``python -m torchrl_sglang_hidden.server`` on the CPU engine alone, in a process
that does nothing else. `why_not_fork` says when a process is spawned after all.

Knows nothing of TorchRL, of requests or of models. Imports SGLang inside `fork_children` alone.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torchrl_sglang_hidden.server.cpu import MALLOC_ENV

__all__ = ["HOOKS", "START_METHOD_ENV", "around_launch", "fork_children", "forking", "why_not_fork"]

logger = logging.getLogger(__name__)

# "spawn" goes back to what SGLang does by itself.
START_METHOD_ENV = "TORCHRL_SGLANG_HIDDEN_START_METHOD"
_THREADS = Path("/proc/self/task")
# The numbers of glibc's mallopt for the variables: malloc reads these when a process starts, and a fork does not.
_MALLOPT = dict(zip(MALLOC_ENV, (-3, -1), strict=True))


@dataclass
class _State:
    """What this process does about forks.

    Args:
        harmless: native ids of threads that hold no lock whenever the main thread runs Python code.
        forks: whether `multiprocessing` forks at the moment.
    """

    harmless: frozenset[int] = frozenset()
    forks: bool = False


_state = _State()


def why_not_fork() -> str:
    """Return why this process must not be forked now; empty where it may be.

    A fork has the one thread that forked. A lock that another thread held stays locked in it for ever, and a pool of
    threads, such as OpenMP's after its first parallel region or ZeroMQ's, is there without its threads.
    """
    if os.environ.get(START_METHOD_ENV, "fork") != "fork":
        return f"{START_METHOD_ENV}={os.environ[START_METHOD_ENV]}"
    if not (_THREADS.is_dir() and "fork" in multiprocessing.get_all_start_methods()):
        return "this system does not tell a process's threads"
    others = {int(thread.name) for thread in _THREADS.iterdir()} - _state.harmless - {os.getpid()}
    if others:
        return f"other threads run in this process: {len(others)}"
    import torch

    used_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "this process has used CUDA" if used_cuda else ""


@contextmanager
def forking() -> Iterator[None]:
    """Have ``multiprocessing`` fork inside the block. A process that is forked there goes on as a spawned one would."""
    before = multiprocessing.get_start_method(allow_none=True)
    # Spawned processes share one tracker of shared memory with this one. A fork without it would start its own, which
    # removes what others still read when that process ends.
    resource_tracker.ensure_running()
    # The collector would write into every object that the processes share, and so copy its page.
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)
    _state.forks = True
    try:
        yield
    finally:
        _state.forks = False
        multiprocessing.set_start_method(before, force=True)


def around_launch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fork the processes that SGLang starts in ``original``, or say in the log why they are spawned."""
    because = why_not_fork()
    if because:
        logger.info("torchrl_sglang_hidden: SGLang's processes are spawned and import everything again: %s", because)
        return original(*args, **kwargs)
    with forking():
        return original(*args, **kwargs)


_ENGINE = "sglang.srt.entrypoints.engine.Engine"
# Both run around what they hook.
HOOKS: dict[str, Callable[..., Any]] = {
    f"{_ENGINE}._launch_scheduler_processes": around_launch,
    f"{_ENGINE}._launch_detokenizer_subprocesses": around_launch,
}


def fork_children(harmless: frozenset[int] = frozenset()) -> None:
    """Have SGLang fork its schedulers and its detokenizer from this process, where that is safe when it starts them.

    Args:
        harmless: native ids of threads that hold no lock whenever the main thread runs Python code.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _state.harmless = harmless
    os.register_at_fork(after_in_child=_go_on_as_spawned)
    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()


def _go_on_as_spawned() -> None:
    """Undo in a forked process what a spawned one would not have of its parent, and do what it reads at its start."""
    if not _state.forks:
        return
    _state.forks = False
    # SGLang's data-parallel controller starts its schedulers from threads of its own.
    multiprocessing.set_start_method("spawn", force=True)
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, option in _MALLOPT.items():
        if mallopt is not None and os.environ.get(name, "").isdigit():
            mallopt(option, int(os.environ[name]))
