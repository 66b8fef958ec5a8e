"""Whether a process may be forked, and what a forked one is like. Each case runs in a fresh process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from torchrl_sglang_hidden.server.cpu import BLAS_ENV, MALLOC_ENV, THREADS_ENV
from torchrl_sglang_hidden.server.forking import START_METHOD_ENV

# SGLang's registry, as far as it is used: it notes the hooks.
START = """
import json, multiprocessing, os, signal, sys, threading, types
from torchrl_sglang_hidden.server import cpu, forking
cpu.use_cpu_engine()
import torch
noted = []
registry = types.SimpleNamespace(register=lambda target, hook, kind: noted.append(kind), apply_hooks=lambda: None)
module = types.ModuleType("hook_registry")
module.HookRegistry, module.HookType = registry, types.SimpleNamespace(AROUND="around")
for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["sglang.srt.plugins.hook_registry"] = module
multiprocessing.set_start_method("spawn")
forking.fork_children()
"""

REASONS = """
reasons = {"alone": forking.why_not_fork()}
method = lambda: forking.around_launch(multiprocessing.get_start_method)
methods = [method()]
waiting = threading.Event()
beside = threading.Thread(target=waiting.wait)
beside.start()
reasons["beside a thread"] = forking.why_not_fork()
methods.append(method())
forking.fork_children(frozenset({beside.native_id}))
reasons["beside one that harms nobody"] = forking.why_not_fork()
waiting.set()
beside.join()
torch.cuda.is_initialized = lambda: True
reasons["after CUDA"] = forking.why_not_fork()
os.environ["TORCHRL_SGLANG_HIDDEN_START_METHOD"] = "spawn"
reasons["as the user says"] = forking.why_not_fork()
del os.environ["TORCHRL_SGLANG_HIDDEN_START_METHOD"]
forking._THREADS = forking.Path("/proc/nowhere")
reasons["elsewhere"] = forking.why_not_fork()
print(json.dumps([reasons, methods, noted, multiprocessing.get_start_method()]))
"""

# A pool of OpenMP's, which the process has from its first parallel region on.
COMPUTES = """
before = forking.why_not_fork()
torch.set_num_threads(2)
torch.randn(1024, 1024) @ torch.randn(1024, 1024)
print(json.dumps([before, forking.why_not_fork()]))
"""

FORKED = """
import ctypes
class Blocks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Blocks, ctypes.c_void_p, [ctypes.c_size_t]

def maps_memory():
    before = libc.mallinfo2().hblks
    libc.malloc(100 * 2**20)
    return libc.mallinfo2().hblks - before

def tell(writer):
    handlers = [signal.getsignal(number) for number in (signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1)]
    expected = [signal.SIG_DFL, signal.default_int_handler, signal.SIG_IGN]
    threads = [thread.name for thread in threading.enumerate()]
    writer.send([multiprocessing.get_start_method(), handlers == expected, maps_memory(), os.getppid(), threads,
        multiprocessing.resource_tracker._resource_tracker._fd])

def launch():
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=tell, args=(writer,))
    process.start()
    found = reader.recv()
    process.join()
    return found

signal.signal(signal.SIGQUIT, lambda number, frame: None)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
child = forking.around_launch(launch)
here = [maps_memory(), os.getpid(), multiprocessing.resource_tracker._resource_tracker._fd]
print(json.dumps([child, here, signal.getsignal(signal.SIGQUIT) != signal.SIG_DFL]))
"""


def run(code: str) -> Any:
    """Return the JSON that a fresh interpreter prints last."""
    unset = (START_METHOD_ENV, BLAS_ENV, THREADS_ENV, *MALLOC_ENV)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", START + code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_is_forked_only_where_nothing_can_be_held_by_another_thread() -> None:
    reasons, methods, hooks, after = run(REASONS)
    assert reasons == {
        "alone": "",
        "beside a thread": "other threads run in this process: 1",
        "beside one that harms nobody": "",
        "after CUDA": "this process has used CUDA",
        "as the user says": f"{START_METHOD_ENV}=spawn",
        "elsewhere": "this system does not tell a process's threads",
    }
    assert methods == ["fork", "spawn"]
    assert hooks[:2] == ["around", "around"]
    assert after == "spawn"


def test_not_after_the_first_parallel_region_of_openmp() -> None:
    before, after = run(COMPUTES)
    assert before == ""
    assert after.startswith("other threads run in this process: ")


def test_a_forked_process_goes_on_as_a_spawned_one() -> None:
    """No handler of its parent's, its own start method, memory as its variables say, and the common tracker."""
    (method, own_handlers, mapped, parent, threads, tracker), here, kept = run(FORKED)
    assert method == "spawn"
    assert own_handlers
    assert threads == ["MainThread"]
    # 100 MiB are a mapping of their own, but not under MALLOC_MMAP_THRESHOLD_: malloc read it in the child alone.
    assert (mapped, here[0]) == (0, 1)
    assert [parent, tracker] == here[1:]
    assert tracker is not None
    assert kept, "the parent lost its own handler"
