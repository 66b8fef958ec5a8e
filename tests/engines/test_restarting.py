"""A launched server that dies and comes back, without SGLang: how often, when, and what calls do meanwhile.

The processes are real, and a few lines of http.server answer in the server's place. With real SGLang:
tests/engine/test_started_without_weights.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.process_watch import still_running, watched

from torchrl_sglang_hidden.engines import process as process_module
from torchrl_sglang_hidden.engines.launch import resumed_arguments
from torchrl_sglang_hidden.engines.process import ServerProcess
from torchrl_sglang_hidden.engines.restarting import Restart, Supervisor
from torchrl_sglang_hidden.errors import (
    EngineError,
    InputError,
    InputTypeError,
    RestartError,
    ServerRestartingError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.weights.kept import BASE, Resumption

SERVES = """
    import http.server, os, pathlib, sys, time
    port, directory = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    print("start number", len(list(directory.iterdir())), flush=True)
    (directory / str(os.getpid())).touch()
    if (directory.parent / "broken").exists():
        sys.exit(3)
    while (directory.parent / "slow").exists():
        time.sleep(0.01)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
FAST = {"backoff_s": 0.0, "max_backoff_s": 0.0, "wait_s": 60.0}


class Site:
    """A supervised server of a few lines, whose starts are counted and can be spoilt."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "starts").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.resumptions: list[Resumption] = []
        self.read: list[str] = []
        self.supervisors: list[Supervisor] = []

    def start(self, resumption: Resumption) -> ServerProcess:
        self.resumptions.append(resumption)
        arguments = [str(self.port), str(self.directory / "starts")]
        return ServerProcess(arguments, log_path=self.directory / "server.log", api_key=None)

    def supervise(self, **options: Any) -> Supervisor:
        process = self.start(Resumption())
        process.wait_until_ready(self.url, timeout_s=60, progress=False)
        restart = Restart(**{**FAST, **options})
        supervisor = Supervisor(self.start, process, restart, url=self.url, timeout_s=60)
        supervisor.watch(lambda: self.read.append("read") or "7")
        self.supervisors.append(supervisor)
        return supervisor

    def spoil(self, how: str) -> None:
        (self.directory / how).touch()

    def mend(self, how: str) -> None:
        (self.directory / how).unlink()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    (tmp_path / "fake_server.py").write_text(textwrap.dedent(SERVES))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process_module, "_SERVER_MODULE", "fake_server")
    site = Site(tmp_path)
    yield site
    for supervisor in site.supervisors:
        supervisor.stop()


def kill(supervisor: Supervisor) -> None:
    with watched([supervisor.process.pid]) as handles:
        os.kill(supervisor.process.pid, signal.SIGKILL)
        assert still_running(handles, timeout_s=10) == []


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    event = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        event.wait(0.01)


def test_a_server_that_dies_is_back_at_its_port(site: Site) -> None:
    supervisor = site.supervise()
    first = supervisor.process
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    supervisor.admit(generates=True)
    assert supervisor.process is not first
    assert site.read == ["read"], "the client reads the description of the new process"
    assert site.resumptions[1] == Resumption()
    assert "start number 1" in site.directory.joinpath("server.log").read_text()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_calls_wait_while_it_comes_back_and_then_go_on(site: Site, way: str) -> None:
    supervisor = site.supervise()
    site.spoil("slow")
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    done = threading.Event()

    def call() -> None:
        if way == "sync":
            supervisor.admit(generates=True)
        else:
            asyncio.run(supervisor.aadmit(generates=True))
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert not done.wait(0.3)
    site.mend("slow")
    assert done.wait(60)
    thread.join()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_call_that_has_waited_long_enough_says_how_it_stands(site: Site, way: str) -> None:
    supervisor = site.supervise(wait_s=0.2, limit=4)
    site.spoil("slow")
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    words = (
        rf"{site.url} ended \d+ s ago and is being started again \(restart 1 of at most 4 within 600 s\), and was not "
        r"back within wait_s=0\.2; call again later, .*signal 9 \(Killed\)(?s:.)*start number 0"
    )
    call = {
        "sync": lambda: supervisor.admit(generates=True),
        "async": lambda: asyncio.run(supervisor.aadmit(generates=True)),
    }[way]
    with pytest.raises(ServerRestartingError, match=words):
        call()
    site.mend("slow")


def test_a_call_does_not_wait_for_weights_that_are_being_kept(site: Site) -> None:
    """They may take seconds to copy, and an event loop must go on."""
    supervisor = site.supervise()
    admitted = threading.Event()

    def call() -> None:
        supervisor.admit(generates=True)
        asyncio.run(supervisor.aadmit(generates=True))
        admitted.set()

    with supervisor._changed:
        thread = threading.Thread(target=call)
        thread.start()
        assert admitted.wait(60)
    thread.join()


def test_at_the_limit_every_call_says_why_it_stays_down(site: Site) -> None:
    supervisor = site.supervise(limit=2)
    site.spoil("broken")
    kill(supervisor)
    words = (
        rf"{site.url} was started again 2 times within 600 s, which is the limit, and stays down; look into "
        r".*server\.log, .*exit code 3(?s:.)*start number 2"
    )
    until(lambda: supervisor._state == "failed")
    for call in (lambda: supervisor.admit(generates=True), lambda: supervisor.admit(generates=False), supervisor.wait):
        with pytest.raises(RestartError, match=words):
            call()
    assert len(list((site.directory / "starts").iterdir())) == 3


def test_a_start_that_fails_is_tried_again(site: Site) -> None:
    supervisor = site.supervise(limit=50)
    site.spoil("broken")
    kill(supervisor)
    until(lambda: supervisor.start >= 2)
    site.mend("broken")
    supervisor.admit(generates=True)
    assert site.read == ["read"]


def test_a_machine_without_memory_for_a_process_is_asked_again(site: Site) -> None:
    supervisor = site.supervise(limit=50)
    start, failures = supervisor._start, []

    def fail(resumption: Resumption) -> ServerProcess:
        if len(failures) < 2:
            failures.append(OSError(12, "Cannot allocate memory"))
            raise failures[-1]
        return start(resumption)

    supervisor._start = fail
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    supervisor.admit(generates=True)
    assert len(failures) == 2


def test_waits_double_up_to_the_most_and_old_restarts_do_not_count(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = site.supervise(limit=5, window_s=100.0, backoff_s=1.0, max_backoff_s=6.0)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    waits = []
    for _ in range(4):
        waits.append(supervisor._delay())
        now[0] += 30
    assert waits == [1.0, 2.0, 4.0, 6.0]
    now[0] += 1000
    assert [supervisor._delay() for _ in range(6)] == [1.0, 2.0, 4.0, 6.0, 6.0, None]
    monkeypatch.undo()
    supervisor._state = "up"


def test_what_was_pushed_is_there_at_the_next_start(site: Site, tmp_path: Path) -> None:
    supervisor = site.supervise()
    pushed = write(tmp_path / "pushed", b"weights")
    adapter = write(tmp_path / "adapter", b"adapter")
    supervisor.keep_weights(pushed, "7", supervisor.start, is_users=True)
    supervisor.keep_adapter("a", adapter, "8", supervisor.start, is_users=True)
    supervisor.keep_adapter("b", adapter, "9", supervisor.start, is_users=True)
    supervisor.drop_adapter("b")
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    supervisor.admit(generates=True)
    assert site.resumptions[1] == Resumption("9", pushed, {"a": adapter}, frozenset({"b"}), {})


def test_heads_are_kept_for_the_next_start(site: Site) -> None:
    supervisor = site.supervise()
    for name in ("a", "b", "a"):
        supervisor.keep_head(name, f"call of {name}", supervisor.start)
    supervisor.keep_head("b", None, supervisor.start)
    assert supervisor.heads.calls == {"a": "call of a"}
    kill(supervisor)
    until(lambda: supervisor.start == 1 and supervisor._state == "up")
    assert supervisor.heads.calls == {"a": "call of a"}
    with pytest.raises(EngineError, match=r"ended right after it took head 'c'.*push it again"):
        supervisor.keep_head("c", "call of c", 0)


def test_nothing_is_kept_of_heads_where_nothing_is_kept(site: Site) -> None:
    supervisor = site.supervise(keep="nothing")
    supervisor.keep_head("a", "call of a", supervisor.start)
    assert supervisor.heads.calls == {}


def test_weights_that_are_gone_are_an_error_of_the_next_call_until_new_ones_come(site: Site, tmp_path: Path) -> None:
    supervisor = site.supervise(keep="nothing")
    assert not supervisor.keeps
    supervisor.keep_weights(None, "7", supervisor.start, is_users=False)
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    supervisor.admit(generates=False)  # new weights may come
    words = r"could not be brought back \(the weights: Restart\(keep='nothing'\) keeps none\); call update_weights"
    for call in (
        lambda: supervisor.admit(generates=True),
        lambda: asyncio.run(supervisor.aadmit(generates=True)),
    ):
        with pytest.raises(RestartError, match=words):
            call()
    supervisor.keep_weights(None, "8", supervisor.start, is_users=False)
    supervisor.admit(generates=True)


def test_weights_that_a_dead_process_took_are_not_taken_for_served(site: Site, tmp_path: Path) -> None:
    supervisor = site.supervise()
    sent_to = supervisor.start
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    with pytest.raises(EngineError, match=r"ended right after it took version '7'.*; update again"):
        supervisor.keep_weights(write(tmp_path / "p", b""), "7", sent_to, is_users=True)


def test_weights_that_another_client_pushed_are_not_taken_for_kept_ones(site: Site, tmp_path: Path) -> None:
    supervisor = site.supervise()
    supervisor.keep_weights(write(tmp_path / "p", b""), "7", supervisor.start, is_users=True)
    # As the server half does when any client has pushed.
    (supervisor.process._files.directory / "weight-version").write_text("8")
    for restart in (1, 2):
        kill(supervisor)
        until(lambda restart=restart: supervisor.start == restart)
        with pytest.raises(RestartError, match="version '8' came from another client"):
            supervisor.admit(generates=True)


def test_stop_ends_a_server_that_is_coming_back(site: Site) -> None:
    supervisor = site.supervise()
    site.spoil("slow")
    kill(supervisor)
    until(lambda: supervisor.start == 1)
    waiting = threading.Thread(target=lambda: supervisor.admit(generates=True))
    waiting.start()
    with watched([supervisor.process.pid]) as handles:
        supervisor.stop()
        assert still_running(handles, timeout_s=0) == []
    waiting.join(10)
    assert not waiting.is_alive()
    assert not supervisor._thread.is_alive()
    supervisor.stop()


def test_stop_ends_a_wait_before_a_restart(site: Site) -> None:
    supervisor = site.supervise(backoff_s=1000.0, max_backoff_s=1000.0)
    kill(supervisor)
    until(lambda: supervisor._state == "down")
    supervisor.stop()
    assert not supervisor._thread.is_alive()
    assert supervisor.start == 0


def test_a_supervisor_that_nobody_has_is_not_kept_by_its_thread(site: Site) -> None:
    class Owner:
        pass

    owner, supervisor = Owner(), site.supervise()
    stop = weakref.finalize(owner, supervisor.stop)
    del owner
    gc.collect()
    assert not stop.alive
    assert not supervisor._thread.is_alive()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"limit": 0}, InputError, r"Restart\(limit=0\): expected a whole number from 1 on"),
        ({"limit": True}, InputError, "limit=True"),
        ({"limit": 1.5}, InputError, r"limit=1\.5"),
        ({"window_s": -1}, InputError, r"Restart\(window_s=-1\): expected seconds, from 0 on"),
        ({"backoff_s": float("nan")}, InputError, "backoff_s=nan"),
        ({"max_backoff_s": float("inf")}, InputError, "max_backoff_s=inf"),
        ({"wait_s": "long"}, InputError, "wait_s='long'"),
        ({"keep": "/no/such/place"}, InputError, r"keep='/no/such/place': no directory that can be written; pass one"),
        ({"keep": 3}, InputTypeError, r"keep=3: expected 'memory', 'nothing' or a directory"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words):
        Restart(**options)


def test_the_arguments_of_the_next_start() -> None:
    first = {
        "model_path": "m",
        "lora_paths": ["old=/o", "/plain", {"lora_name": "named", "lora_path": "/n"}, "kept=/k"],
    }
    assert resumed_arguments(first, Resumption()) is first
    dropped = frozenset({"/plain", "named"})
    resumption = Resumption("8", Path("/w"), {"old": Path("/new")}, dropped, {})
    assert resumed_arguments(first, resumption) == {
        "model_path": "m",
        "lora_paths": ["kept=/k", "old=/new"],
        "weight_version": "8",
    }
    # Whoever else asks this server can see in the version that it does not have what was pushed.
    lost = resumed_arguments(
        {"model_path": "m", "lora_paths": "a=/a"}, Resumption("9", lost={BASE: "gone", "a": "gone"})
    )
    assert lost == {"model_path": "m", "lora_paths": None, "weight_version": "9-incomplete"}


def write(directory: Path, data: bytes) -> Path:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(data)
    return directory
