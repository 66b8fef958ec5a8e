"""A rollout whose server dies: calls from several threads, and what the server has on the machine meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from helpers.policy_checks import SEGMENTS, Row, prompt_of, rows_of, tokens_input
from torchrl_sglang_hidden import SGLangHiddenWrapper

SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Rollout:
    """Calls a policy over and over, and keeps what each call returned or raised."""

    policy: SGLangHiddenWrapper
    rows: list[tuple[list[int], Row]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    calls: int = 0

    @contextmanager
    def running(self, callers: int) -> Iterator[None]:
        """Call from so many threads while the block runs."""
        ended = threading.Event()
        threads = [threading.Thread(target=self._run, args=(caller, ended)) for caller in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()

    def _run(self, caller: int, ended: threading.Event) -> None:
        seed = 100_000 * caller
        while not ended.is_set():
            prompts = [prompt_of(20 + seed % 7, seed=seed), prompt_of(9, seed=seed + 1)]
            seed += 2
            try:
                out = self.policy(tokens_input(prompts))
            except Exception as error:  # noqa: BLE001  # the test looks at each
                self.errors.append(error)
            else:
                self.rows += zip(prompts, rows_of(out, SEGMENTS), strict=True)
            self.calls += 1


def family_of(leader: psutil.Process) -> list[psutil.Process]:
    return [leader, *leader.children(recursive=True)]


def scheduler_of(leader: psutil.Process) -> int:
    """Return the process that has the model: SGLang gives it this name."""
    named = {child.pid: " ".join(child.cmdline()) for child in leader.children(recursive=True)}
    found = [pid for pid, name in named.items() if "scheduler" in name]
    assert len(found) == 1, f"the children of {leader}: {named}"
    return found[0]


def traces_of(leader: psutil.Process) -> set[Path]:
    """List what a server has on this machine that must not outlive it, as its processes and the directories show it."""
    mapped = {Path(entry.path) for process in family_of(leader) for entry in process.memory_maps()}
    pushed = SHARED_MEMORY.glob(f"torchrl-sglang-hidden-weights-{os.getpid()}-*")
    temporary = Path(leader.environ()["TMPDIR"])
    assert list(temporary.iterdir()), "SGLang's sockets are elsewhere"
    return {*(path for path in mapped if path.parent == SHARED_MEMORY and path.exists()), *pushed, temporary}
