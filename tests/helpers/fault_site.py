"""A server on which faults are tried, and what must hold of it after each: its answers, its load, nothing left over."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from helpers.policy_checks import make_policy, prompt_of, tokens_input
from helpers.process_watch import Watch, still_running, watched
from helpers.weight_changes import answers, assert_answered_with
from torchrl_sglang_hidden import SGLangHiddenError, SGLangHiddenWrapper, SGLangServer, connect, launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX
from torchrl_sglang_hidden.records import Completion

MEMORY = Path("/dev/shm")
PROMPTS = [prompt_of(7, 1), prompt_of(40, 2), prompt_of(3, 3)]
TOKENS = 12
# Some seconds of work for the small model.
LONG = {"max_new_tokens": 700, "ignore_eos": True}
# SGLang looks every few seconds whether somebody still waits for a request.
IDLE_S = 20.0
READY_S = 120.0
READ_TIMEOUT_S = 3.0


class FaultSite:
    """One server of a small random model, which is launched anew on the same port when it was killed.

    Args:
        model_dir: the model.
        trained_dir: other weights of it, for updates.
        tokenizer: the model's.
        log_dir: where the server's log goes.
    """

    def __init__(self, model_dir: str, trained_dir: str, tokenizer: PreTrainedTokenizerBase, log_dir: Path) -> None:
        self.model_dir, self.trained_dir, self._tokenizer = model_dir, trained_dir, tokenizer
        self._log = log_dir / "server.log"
        self._port: int | None = None
        self.rounds: Counter[str] = Counter()
        self.came_to: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.longest_s: defaultdict[str, float] = defaultdict(float)
        # How long an update of each kind takes that nobody disturbs.
        self.update_s: dict[tuple[Any, ...], float] = {}
        self._processes = self._preloaded()
        self._lives, self._victims = True, list[int | None]()
        self.server = self.launch()
        # Kept across every fault, as a training run keeps them.
        self.client = connect(self.server.url)
        self.policy = self.policy_of(self.client)
        self.http = httpx.Client(base_url=self.server.url, timeout=60, trust_env=False)
        self.expected = answers(self.client, PROMPTS, TOKENS)
        for one in self.expected:
            assert_answered_with(one, model_dir)
        self.client.update_weights(trained_dir, version="trained")
        self.expected_trained = answers(self.client, PROMPTS, TOKENS)
        for one in self.expected_trained:
            assert_answered_with(one, trained_dir)
        self._restores = 0
        self.restore()
        self.memory = self.shared_names()

    @staticmethod
    def _preloaded() -> Any:
        """Return a context whose processes start at once: they are forks of one that has imported everything."""
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["helpers.fault_programs"])
        process = context.Process(target=int)
        process.start()
        process.join()
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
        return context

    @property
    def port(self) -> int:
        assert self._port is not None
        return self._port

    def launch(self) -> LaunchedServer:
        server = launch(
            self.model_dir, port=self._port, dtype="float32", sleep_on_idle=True, context_length=1024,
            max_total_tokens=8192, log_file=self._log, progress=False,
        )  # fmt: skip
        self._port = httpx.URL(server.url).port
        return server

    def policy_of(self, engine: Any, **options: Any) -> SGLangHiddenWrapper:
        return make_policy(engine, self._tokenizer, **{**LONG, **options})

    def restore(self) -> None:
        """Give the server its own weights again, by any transport."""
        self._restores += 1
        with connect(self.server.url) as trainer:
            trainer.update_weights(self.model_dir, version=f"own-{self._restores}")

    @contextmanager
    def impatient(self, url: str | None = None) -> Iterator[SGLangHiddenWrapper]:
        """Yield a policy whose calls time out soon."""
        with SGLangServer(url or self.server.url, read_timeout_s=READ_TIMEOUT_S) as engine:
            yield self.policy_of(engine)

    # --- one fault ----------------------------------------------------------------------------------------------------

    def call_fails(
        self,
        fault: str,
        policy: SGLangHiddenWrapper,
        strike: Callable[[], None],
        delay_s: float,
        limit_s: float,
        since: Callable[[], float] | None = None,
    ) -> SGLangHiddenError:
        """Check that a call that is struck after ``delay_s`` raises in time, and leaves its input as it was.

        Args:
            fault: its name, in the record.
            policy: makes the call.
            strike: the fault.
            delay_s: seconds from the call's beginning to the fault.
            limit_s: most seconds from the fault to the error.
            since: returns when the fault came to be, where that is later than its strike.
        """
        given = tokens_input(PROMPTS)
        before, struck = given.clone(), list[float]()

        def at_the_moment() -> None:
            struck.append(time.monotonic())
            strike()

        timer = threading.Timer(delay_s, at_the_moment)
        timer.start()
        try:
            policy(given)
        except SGLangHiddenError as error:
            found = error
        else:
            raise AssertionError(f"{fault} after {delay_s:.2f} s: the call went well")
        finally:
            timer.join()
        self.note(fault, type(found).__name__, time.monotonic() - (since() if since is not None else struck[0]))
        assert self.longest_s[fault] < limit_s, f"{fault}: {self.longest_s[fault]:.1f} s to {found!r}"
        assert_same_input(given, before)
        return found

    def note(self, fault: str, came_to: str, seconds: float) -> None:
        """Record what a round of a fault came to: the name of an error, or what went on."""
        self.came_to[fault][came_to] += 1
        self.longest_s[fault] = max(self.longest_s[fault], seconds)

    @contextmanager
    def victim(self, program: Callable[..., None], *args: Any) -> Iterator[psutil.Process]:
        """Yield a process that runs a program and is ready; it is killed at the end of the block, if it still runs."""
        ready = self._processes.Event()
        process = self._processes.Process(target=program, args=(*args, ready))
        process.start()
        self._victims.append(process.pid)
        try:
            assert ready.wait(READY_S)
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.join()

    # --- what must hold afterwards ------------------------------------------------------------------------------------

    def group(self) -> list[int]:
        """Return the ids of the server's processes."""
        leader = psutil.Process(self.server.pid)
        return [leader.pid, *(child.pid for child in leader.children(recursive=True))]

    def scheduler(self) -> int:
        found = [pid for pid in self.group() if "scheduler" in " ".join(psutil.Process(pid).cmdline())]
        assert len(found) == 1, [psutil.Process(pid).cmdline() for pid in self.group()]
        return found[0]

    @contextmanager
    def dies(self, *, anew: bool) -> Iterator[None]:
        """Check that a server that dies in the block leaves nothing, and launch it ``anew`` for the same clients."""
        with watched(self.group()) as handles:
            yield
            self.assert_ended(handles)
        self.server.close()
        self._lives = False
        assert self.shared_names() & self.memory == set(), "the dead server left files in shared memory"
        if not anew:
            return
        self.server = self.launch()
        self._lives = True
        self.restore()
        self.memory = self.shared_names()

    @staticmethod
    def assert_ended(handles: Watch) -> None:
        assert still_running(handles, timeout_s=30) == [], "orphans of the dead server"

    def load(self) -> int:
        return int(self.http.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"])

    def assert_idle(self) -> None:
        limit = time.monotonic() + IDLE_S
        while (load := self.load()) and time.monotonic() < limit:
            pass
        assert load == 0, f"{load} requests still run for nobody"

    def shared_names(self) -> set[str]:
        """Return the files in shared memory that are this server's or of its trainers."""
        if self._lives:
            sign = str(self.http.get("/server_info").json()["internal_states"][0][CHANNEL]["shared"])
            self._token = sign.removesuffix("-here")
            noted = self.server._process._files.directory / "shared-memory"
            self._listed = {Path(line).name for line in noted.read_text().splitlines()}
            assert any(name.startswith("sglang_loads_") for name in self._listed)
        # Other tests' servers and trainers have files there too.
        prefixes = (self._token, *(f"{PUSHED_PREFIX}{pid}-" for pid in (os.getpid(), *self._victims)))
        return {path.name for path in MEMORY.iterdir() if path.name in self._listed or path.name.startswith(prefixes)}

    def assert_well(self, expected: list[Completion] | None = None, *, engine: Any = None) -> None:
        """Check that nothing runs or is left over, and that every client gets the right answers."""
        self.assert_idle()
        left = self.shared_names() - self.memory
        assert left == set(), f"left over: {left}"
        for client in (engine,) if engine is not None else (self.client, connect(self.server.url)):
            assert_same_answers(answers(client, PROMPTS, TOKENS), expected or self.expected)
            if client is not self.client and client is not engine:
                client.close()

    def close(self) -> None:
        if self._lives:
            with self.dies(anew=False):
                self.server.close()
        self.client.close()
        self.http.close()


def assert_same_answers(found: list[Completion], expected: list[Completion]) -> None:
    """Check tokens, log-probs and pooled states of greedy answers against those of another moment."""
    for one, other in zip(found, expected, strict=True):
        assert one.response_ids == other.response_ids
        torch.testing.assert_close(one.log_probs_T, other.log_probs_T, atol=1e-3, rtol=0)
        assert one.hidden.keys() == other.hidden.keys()
        for segment, pooled in one.hidden.items():
            assert pooled.count == other.hidden[segment].count
            torch.testing.assert_close(pooled.vector, other.hidden[segment].vector, atol=1e-4, rtol=1e-4)


def assert_same_input(found: TensorDict, before: TensorDict) -> None:
    assert set(found.keys(True)) == set(before.keys(True)), "a call that failed wrote something"
    for one, other in zip(found.unbind(0), before.unbind(0), strict=True):
        for key in other.keys(True, True):
            assert torch.equal(one[key], other[key]), key
