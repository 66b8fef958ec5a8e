"""A request whose answer nobody waits for any more is aborted on its server: timeouts, Ctrl-C, cancelled tasks.

Against a local server of a few lines; what a real SGLang does with an abort is tested in tests/engine/.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_engine import Handler, RecordingServer
from helpers.held_engine import LIMIT_S

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.errors import EngineError, EngineTimeoutError
from torchrl_sglang_hidden.records import Request

ROWS = [Request((6 + row, 7)) for row in range(5)]


class Hung(RecordingServer):
    """A server that signals each batch and never answers it."""

    def __init__(self) -> None:
        super().__init__()
        self.release, self.asked = threading.Event(), threading.Semaphore(0)
        self.respond = self._hang

    def _hang(self, handler: Handler, payload: dict[str, Any]) -> None:
        self.asked.release()
        self.release.wait(LIMIT_S)
        handler.close_connection = True

    def stop(self) -> None:
        self.release.set()
        super().stop()


@pytest.fixture
def hung() -> Iterator[list[Hung]]:
    servers = [Hung(), Hung()]
    yield servers
    for server in servers:
        server.stop()


def assert_aborted(servers: list[Hung]) -> None:
    """Check that every request of every batch was aborted by its own name."""
    for server in servers:
        (payload,) = server.payloads
        # A server that times out while another is reported may get a name twice, which SGLang ignores.
        while set(server.aborted) != set(payload["rid"]):
            assert server.abort_came.acquire(timeout=LIMIT_S)
        assert len(set(payload["rid"])) == len(payload["input_ids"]) > 0
    together = sorted(ids[0] for server in servers for ids in server.payloads[0]["input_ids"])
    assert together == [one.prompt_ids[0] for one in ROWS]


def urls(servers: list[Hung]) -> list[str]:
    return [server.url for server in servers]


NUMBERS = pytest.mark.parametrize("number", [1, 2], ids=["one server", "two servers"])


@NUMBERS
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_read_timeout_aborts_the_requests(hung: list[Hung], number: int, way: str) -> None:
    with SGLangServer(urls(hung[:number]), read_timeout_s=0.5) as engine:
        with pytest.raises(EngineTimeoutError):
            engine.generate(ROWS) if way == "sync" else asyncio.run(engine.agenerate(ROWS))
        assert_aborted(hung[:number])


# In a process of its own, which Ctrl-C may end. A shell that runs these tests in the background has switched it off.
START_S = 120.0
CALL = """
import signal, sys
from torchrl_sglang_hidden import connect
from torchrl_sglang_hidden.records import Request
signal.signal(signal.SIGINT, signal.default_int_handler)
with connect(sys.argv[1:]) as engine:
    engine.generate([Request((6 + row, 7)) for row in range(5)])
"""


@NUMBERS
def test_ctrl_c_aborts_the_requests(hung: list[Hung], number: int) -> None:
    command = [sys.executable, "-c", CALL, *urls(hung[:number])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as caller:
        try:
            for server in hung[:number]:
                assert server.asked.acquire(timeout=START_S)
            caller.send_signal(signal.SIGINT)
            # It does not wait for answers that never come.
            assert caller.communicate(timeout=LIMIT_S)[1].endswith("\nKeyboardInterrupt\n")
        finally:
            caller.kill()
    assert_aborted(hung[:number])


async def cancelled(call: Any, hung: list[Hung], times: int) -> None:
    task = asyncio.ensure_future(call)
    for server in hung:
        assert await asyncio.to_thread(server.asked.acquire, timeout=LIMIT_S)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


@NUMBERS
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_cancelled_task_aborts_its_requests(hung: list[Hung], number: int, times: int) -> None:
    async def run() -> None:
        await cancelled(engine.agenerate(ROWS), hung[:number], times)
        await asyncio.to_thread(assert_aborted, hung[:number])

    with connect(urls(hung[:number])) as engine:
        asyncio.run(run())


@pytest.mark.parametrize("way", ["sync", "async"])
def test_the_failure_of_one_server_aborts_what_the_other_does(hung: list[Hung], way: str) -> None:
    working, failing = hung

    def fail(handler: Handler, payload: dict[str, Any]) -> None:
        assert working.asked.acquire(timeout=LIMIT_S)
        handler.say((500, "broken"))

    failing.respond = fail
    with connect(urls(hung)) as engine:
        with pytest.raises(EngineError, match="answered 500: broken"):
            engine.generate(ROWS) if way == "sync" else asyncio.run(engine.agenerate(ROWS))
        (payload,) = working.payloads
        for _ in payload["rid"]:
            assert working.abort_came.acquire(timeout=LIMIT_S)
        assert working.aborted == payload["rid"]


def test_a_turn_of_a_session_is_aborted(hung: list[Hung]) -> None:
    server = hung[0]
    with SGLangServer(server.url, read_timeout_s=0.5) as engine:
        hang, server.respond = server.respond, lambda handler, payload: handler.say((200, '"s"'))
        session = engine.session()
        server.respond = hang
        with pytest.raises(EngineTimeoutError):
            session.generate([6, 7])
        assert server.abort_came.acquire(timeout=LIMIT_S)
        assert server.aborted == server.payloads[-1]["rid"]


def test_an_answered_batch_aborts_nothing() -> None:
    server = RecordingServer()
    with connect(server.url) as engine:
        engine.generate(ROWS)
        assert server.aborted == []
        names = [name for payload in server.payloads for name in payload["rid"]]
        assert not any(one != other and other.startswith(one) for one in names for other in names)
    server.stop()
