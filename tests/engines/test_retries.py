"""Calls that are made again, and calls that are not: against a local server that fails for a while.

1. Nothing that may have been sampled is asked for twice.
2. What was refused or never arrived is, as often as the client says, with growing waits.
3. Each retry is a line in the log, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import tenacity
from helpers.fake_engine import RecordingServer, Respond

from torchrl_sglang_hidden import SGLangServer
from torchrl_sglang_hidden.engines import retries as retries_module
from torchrl_sglang_hidden.engines.retries import Retries
from torchrl_sglang_hidden.errors import EngineError, EngineUnreachableError, InputError, ProtocolError
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload

SAMPLED = [Request((6, 7), {"max_new_tokens": 2}), Request((7, 7), {"max_new_tokens": 2})]
READ = [Request((6, 7), {"max_new_tokens": 0}), Request((7, 7), {"max_new_tokens": 0})]
FULL = (503, {"error": {"message": "The request queue is full.", "code": 503}})
TOO_LONG = (503, {"error": {"message": "Request running timeout reached.", "code": 503}})
WAYS = ("sync", "async", "stream", "astream")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries_module, "_WAIT", tenacity.wait_none())


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    server = RecordingServer()
    yield server
    server.stop()


def failing(server: RecordingServer, times: int, fail: Respond) -> None:
    """Have the next calls fail, and those after them succeed."""
    good, left = server.respond, [times]

    def respond(handler: Any, payload: dict[str, Any]) -> None:
        left[0] -= 1
        (fail if left[0] >= 0 else good)(handler, payload)

    server.respond = respond


def cut(handler: Any, payload: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def say(answer: tuple[int, Any]) -> Respond:
    return lambda handler, payload: handler.say(answer)


def call(engine: SGLangServer, way: str, requests: list[Request]) -> list[Completion]:
    match way:
        case "sync":
            return engine.generate(requests)
        case "async":
            return asyncio.run(engine.agenerate(requests))
        case "stream":
            return [_read(engine, request) for request in requests[:1]]
        case _:
            return asyncio.run(_aread(engine, requests[0]))


def _read(engine: SGLangServer, request: Request) -> Completion:
    stream = engine.stream(request)
    for _ in stream:
        pass
    return stream.completion


async def _aread(engine: SGLangServer, request: Request) -> list[Completion]:
    stream = await engine.astream(request)
    async for _ in stream:
        pass
    return [stream.completion]


def refuse_connections(engine: SGLangServer, times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the next connections of a client be refused; return the list that names every attempt."""
    seen: list[str] = []

    def count(request: httpx.Request) -> None:
        seen.append(request.url.path)
        if len(seen) <= times:
            raise httpx.ConnectError("[Errno 111] Connection refused")

    send, asend = httpx.Client.send, httpx.AsyncClient.send

    def sending(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        count(request)
        return send(client, request, **options)

    async def asending(client: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        count(request)
        return await asend(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", sending)
    monkeypatch.setattr(httpx.AsyncClient, "send", asending)
    return seen


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_full_queue_is_asked_again(server: RecordingServer, way: str, times: int) -> None:
    with SGLangServer(server.url) as engine:
        failing(server, times, say(FULL))
        assert [one.prompt_ids for one in call(engine, way, SAMPLED)] == [(6, 7), (7, 7)]
        assert engine.retried == times
    # What was accepted of the batch before is aborted, and a name that SGLang may still know is not used again.
    rids = [payload["rid"] for payload in server.payloads]
    assert len({rid for names in rids for rid in names}) == 2 * (times + 1)
    assert set(server.aborted) == set(rids[0])
    assert all(later.startswith(first) for names in rids for first, later in zip(rids[0], names, strict=True))


@pytest.mark.parametrize("way", ["sync", "async"])
def test_an_answer_must_name_the_attempt_that_it_answers(server: RecordingServer, way: str) -> None:
    good = server.respond

    def respond(handler: Any, payload: dict[str, Any]) -> None:
        # An answer to the names that were sent first.
        good(handler, {**payload, "rid": [rid.removesuffix("-2") for rid in payload["rid"]]})

    server.respond = respond
    with SGLangServer(server.url) as engine:
        failing(server, 1, say(FULL))
        with pytest.raises(ProtocolError, match="-2"):
            call(engine, way, SAMPLED)
        assert engine.counters().retries == engine.retried == 1


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_queue_that_stays_full_is_an_error_after_the_last_retry(server: RecordingServer, way: str) -> None:
    with SGLangServer(server.url, retries=2) as engine:
        failing(server, 9, say(FULL))
        with pytest.raises(EngineError, match=r"answered 503: The request queue is full"):
            call(engine, way, SAMPLED)
        assert (len(server.payloads), engine.retried) == (3, 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("answer", [TOO_LONG, (500, "broken"), (500, "the queue is full"), (429, "slower")])
def test_what_may_have_been_sampled_is_not_asked_again(server: RecordingServer, way: str, answer: Any) -> None:
    with SGLangServer(server.url) as engine:
        failing(server, 9, say(answer))
        with pytest.raises(EngineError, match=f"answered {answer[0]}"):
            call(engine, way, SAMPLED)
        assert (len(server.payloads), engine.retried) == (1, 0)


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_that_broke_off_is_not_asked_for_again(server: RecordingServer, way: str) -> None:
    with SGLangServer(server.url) as engine:
        failing(server, 9, cut)
        with pytest.raises(EngineUnreachableError, match="went away while answering"):
            call(engine, way, SAMPLED)
        assert (len(server.payloads), engine.retried) == (1, 0)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_an_answer_that_only_reads_is(server: RecordingServer, way: str) -> None:
    with SGLangServer(server.url) as engine:
        failing(server, 2, cut)
        assert [one.prompt_ids for one in call(engine, way, READ)] == [(6, 7), (7, 7)]
        assert engine.retried == 2
        failing(server, 9, cut)
        with pytest.raises(EngineUnreachableError):
            call(engine, way, [READ[0], SAMPLED[0]])
        assert engine.retried == 2, "one row of the two is sampled"


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_connection_is_tried_again(
    server: RecordingServer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SGLangServer(server.url) as engine:
        seen = refuse_connections(engine, 2, monkeypatch)
        # This server answers no streams: that the request arrives is what counts.
        with suppress(ProtocolError):
            assert call(engine, way, SAMPLED)[0].prompt_ids == (6, 7)
        assert seen == ["/generate"] * 3
        assert (len(server.payloads), engine.retried) == (1, 2)


@pytest.mark.parametrize("way", WAYS)
def test_no_call_is_made_again_when_that_is_switched_off(
    server: RecordingServer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SGLangServer(server.url, retries=0) as engine:
        failing(server, 1, say(FULL))
        with pytest.raises(EngineError, match="answered 503"):
            call(engine, way, SAMPLED)
        failing(server, 1, cut)
        with pytest.raises(EngineUnreachableError):
            engine.generate(READ)
        refuse_connections(engine, 1, monkeypatch)
        with pytest.raises(EngineUnreachableError, match="nothing answers"):
            call(engine, way, SAMPLED)
        assert engine.retried == 0
    assert pickle.loads(pickle.dumps(engine.__reduce__()))[1][1]["retries"] == 0


def test_a_turn_of_a_session_keeps_its_name_and_is_not_read_twice(server: RecordingServer) -> None:
    with SGLangServer(server.url) as engine:
        failing(server, 1, say(FULL))
        (endpoint,) = engine._endpoints
        payload = {**to_payload(READ[:1], engine.info, binary=False), "session_params": {"id": "s"}}
        endpoint.ask({**payload, "rid": ["turn"]})
        assert [sent["rid"] for sent in server.payloads] == [["turn"], ["turn"]]
        failing(server, 1, cut)
        with pytest.raises(EngineUnreachableError):
            endpoint.ask({**payload, "rid": ["turn"]})


def test_a_control_route_is_called_once(server: RecordingServer) -> None:
    with SGLangServer(server.url) as engine:
        (endpoint,) = engine._endpoints
        sent: list[str] = []

        def attempt() -> httpx.Response:
            sent.append("sent")
            raise httpx.ReadError("cut")

        with pytest.raises(httpx.ReadError):
            endpoint._retries.run(attempt, what="update", reads=False)
        assert sent == ["sent"]


def test_each_retry_is_logged_and_waits_longer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    waits: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", type("T", (), {"sleep": staticmethod(waits.append)}))
    counted: list[int] = []
    retries = Retries(6, lambda: counted.append(1))

    def refused() -> httpx.Response:
        raise httpx.ConnectError("refused")

    with caplog.at_level(logging.WARNING), pytest.raises(httpx.ConnectError):
        retries.run(refused, what="http://x/generate", reads=False)
    assert len(counted) == 6 == len(caplog.messages)
    assert "http://x/generate: refused; retry 1 of 6 in 0." in caplog.messages[0]
    for number, wait in enumerate(waits):
        assert 0.1 * 2**number <= wait <= min(5.0, 0.1 * 2**number + 0.1)
    assert len(set(waits)) == 6


def test_many_callers_do_not_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    waits = {retries_module._WAIT(state) for _ in range(100)}
    assert len(waits) > 90


@pytest.mark.parametrize("limit", [-1, True, 1.5, None, "3"])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(InputError, match=r"retries=.*expected a whole number, or 0"):
        Retries(limit)


def test_threads_share_one_count(server: RecordingServer) -> None:
    with SGLangServer(server.url, retries=1) as engine:
        good = server.respond

        def respond(handler: Any, payload: dict[str, Any]) -> None:
            again = payload["rid"][0].endswith("-2")
            (good if again else say(FULL))(handler, payload)

        server.respond = respond
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(engine.generate, SAMPLED) for _ in range(4)]
        assert [len(call.result()) for call in calls] == [2] * 4
        assert engine.retried == 4
