"""Several servers of which one is lost, comes back, or serves other weights; over `RecordingServer`s.

1. What cannot be reached gets nothing, and its rows are answered by the others.
2. What breaks off is sent again only where it read; what was being sampled is an error of its row.
3. Who comes back takes rows again with the weights of the others, and not before.
4. A call does not mix weights unless its rows say so, and then the log does too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.fake_engine import Handler, RecordingEngine, RecordingServer, model_page

from torchrl_sglang_hidden import SGLangServer, connect
from torchrl_sglang_hidden.engines import fleet
from torchrl_sglang_hidden.errors import EngineError, EngineUnreachableError
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.server.metrics import COUNTERS
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

Make = Callable[..., RecordingServer]
WAYS = pytest.mark.parametrize("way", ["sync", "async"])


@pytest.fixture
def make_server() -> Iterator[Make]:
    servers: list[RecordingServer] = []

    def make(**options: Any) -> RecordingServer:
        servers.append(RecordingServer(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def servers(make_server: Make) -> list[RecordingServer]:
    return [make_server(), make_server()]


@pytest.fixture
def engine(servers: list[RecordingServer]) -> Iterator[SGLangServer]:
    with connect([server.url for server in servers]) as engine:
        yield engine


def requests_of(num_rows: int, **options: Any) -> list[Request]:
    return [Request((6 + row, 7), **{"hidden": HiddenSpec(), **options}) for row in range(num_rows)]


def generate(engine: SGLangServer, way: str, requests: list[Request]) -> list[Completion]:
    return engine.generate(requests) if way == "sync" else asyncio.run(engine.agenerate(requests))


def break_off(handler: Handler, payload: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def sent_to(*servers: RecordingServer) -> list[list[tuple[int, ...]]]:
    return [sorted(map(tuple, server.sent_rows)) for server in servers]


def ids_of(requests: list[Request]) -> list[tuple[int, ...]]:
    return [request.prompt_ids for request in requests]


def expected(requests: list[Request]) -> list[tuple[int, ...]]:
    return [one.response_ids for one in RecordingEngine().generate(requests)]


# --- 1. not there -----------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("lost", [0, 1])
def test_rows_of_a_server_that_is_gone_are_answered_by_the_other(
    servers: list[RecordingServer], engine: SGLangServer, way: str, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    requests, left = requests_of(6), servers[1 - lost]
    servers[lost].stop()
    for call in (1, 2):
        completions = generate(engine, way, requests)
        assert [one.prompt_ids for one in completions] == ids_of(requests)
        assert [one.response_ids for one in completions] == expected(requests)
        assert sent_to(left) == [sorted(ids_of(requests) * call)], "every row once"
    assert len(left.payloads) == 3, "the second call does not try the lost one"
    assert caplog.text.count("1 of 2 servers take the rows until it is back") == 1
    assert servers[lost].url in caplog.text


@WAYS
def test_of_three_servers_two_may_go(make_server: Make, way: str) -> None:
    servers, requests = [make_server() for _ in range(3)], requests_of(6)
    with connect([server.url for server in servers]) as engine:
        for server in servers[:2]:
            server.stop()
        assert [one.prompt_ids for one in generate(engine, way, requests)] == ids_of(requests)


@WAYS
def test_nobody_is_left(servers: list[RecordingServer], engine: SGLangServer, way: str) -> None:
    for server in servers:
        server.stop()
    for _ in range(2):
        with pytest.raises(EngineUnreachableError, match="nothing answers at"):
            generate(engine, way, requests_of(4))


def test_streams_and_sessions_open_on_the_other(servers: list[RecordingServer], engine: SGLangServer) -> None:
    rows = RecordingEngine().answer({"input_ids": [[6, 7]], "sampling_params": [{}], "return_logprob": [True]})
    for server in servers:
        server.respond = lambda handler, payload: handler.say((200, f"data: {json.dumps(rows[0])}\n\n"))
    servers[0].stop()
    for _ in range(2):
        with engine.stream(Request((6, 7))) as stream:
            assert next(stream).ids

    async def open_one() -> None:
        async with await engine.astream(Request((6, 7))) as stream:
            assert (await anext(stream)).ids

    asyncio.run(open_one())
    counted = engine.counters()
    assert (counted.requests, counted.failures) == (3, 0), "the first try of a stream that went to the other is none"
    servers[1].respond = lambda handler, payload: handler.say((200, ""))
    with engine.session(), engine.session():
        assert len(servers[1].payloads) == 5


def test_the_counters_of_those_that_are_left(
    servers: list[RecordingServer], engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    for number, server in enumerate(servers):
        status, page = server.pages["/server_info"]
        (state,) = page["internal_states"]
        server.pages["/server_info"] = (
            status,
            {**page, "internal_states": [{**state, COUNTERS: {"rows": 3 + number}}]},
        )
    assert engine.server_counters().rows == 7
    servers[0].stop()
    assert engine.server_counters().rows == 4
    assert caplog.messages[-1].startswith(f"nothing answers at {servers[0].url}")
    assert caplog.messages[-1].endswith("its counters are not in the sums of the others")
    servers[1].stop()
    with pytest.raises(EngineUnreachableError, match="nothing answers at"):
        engine.server_counters()


# --- 2. gone in the middle --------------------------------------------------------------------------------------------


@WAYS
def test_rows_that_read_are_read_by_the_other(servers: list[RecordingServer], engine: SGLangServer, way: str) -> None:
    servers[0].respond = break_off
    requests = requests_of(4, sampling={"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",)))
    assert [one.prompt_ids for one in generate(engine, way, requests)] == ids_of(requests)
    assert sent_to(servers[1]) == [ids_of(requests)]


@WAYS
def test_rows_that_were_sampled_are_errors(servers: list[RecordingServer], engine: SGLangServer, way: str) -> None:
    servers[0].respond = break_off
    with pytest.raises(EngineUnreachableError, match=r"row 0: .*went away while answering.*it was being sampled"):
        generate(engine, way, requests_of(4))
    tried = {ids for part in sent_to(servers[0]) for ids in part}
    assert tried
    assert tried.isdisjoint(sent_to(servers[1])[0]), "not sampled twice"


@WAYS
def test_the_loss_is_reported_while_the_other_works(
    servers: list[RecordingServer], engine: SGLangServer, way: str
) -> None:
    reported = threading.Event()
    servers[0].respond = break_off
    servers[1].respond = lambda handler, payload: reported.wait(30)
    with pytest.raises(EngineUnreachableError, match="went away while answering"):
        generate(engine, way, requests_of(4))
    assert not reported.is_set()
    reported.set()
    assert servers[1].abort_came.acquire(timeout=10), "and what nobody waits for any more is aborted"


@WAYS
def test_rows_that_keep_their_errors_do_not_cost_the_others(
    servers: list[RecordingServer], engine: SGLangServer, way: str
) -> None:
    servers[0].respond = break_off
    requests = requests_of(4, return_errors=True)
    completions = generate(engine, way, requests)
    tried = sent_to(servers[0])[0]
    assert 0 < len(tried) < 4
    for row, (request, one) in enumerate(zip(requests, completions, strict=True)):
        assert (one.error is not None) == (request.prompt_ids in tried)
        if one.error is not None:
            assert isinstance(one.error, EngineUnreachableError)
            assert str(one.error).startswith(f"row {row}: {servers[0].url} went away")
        else:
            assert one.response_ids == expected([request])[0]


# --- 3. back again ----------------------------------------------------------------------------------------------------


@WAYS
def test_a_server_that_is_back_takes_rows_again(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "AWAY_S", 0.0)
    port = servers[0].server_address[1]
    servers[0].stop()
    generate(engine, way, requests_of(4))
    again = make_server(port=port)
    generate(engine, way, requests_of(4))
    assert len(again.sent_rows) == 2


@WAYS
def test_a_server_that_is_back_with_other_weights_gets_none_until_an_update(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer, way: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(fleet, "AWAY_S", 0.0)
    port = servers[0].server_address[1]
    servers[0].stop()
    generate(engine, way, requests_of(4))
    again = make_server(port=port)
    again.pages["/model_info"] = (200, {**model_page("m"), "weight_version": "default"})
    assert len(generate(engine, way, requests_of(4))) == 4
    assert again.sent_rows == []
    assert "is back with weights of version 'default', and the others serve 'v7'" in caplog.text
    again.pages["/model_info"] = servers[1].pages["/model_info"]
    engine._all_updated("v7", [None, None])
    generate(engine, way, requests_of(4))
    assert len(again.sent_rows) == 2


def test_an_update_brings_back_who_answers(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer
) -> None:
    port = servers[0].server_address[1]
    servers[0].stop()
    engine.generate(requests_of(4))
    engine._all_updated("v7", [None, None])
    assert engine._fleet.present() == [1], "it took the weights, and was gone right after"
    again = make_server(port=port)
    engine._all_updated("v7", [None, None])
    engine.generate(requests_of(4))
    assert len(again.sent_rows) == 2


def test_what_is_known_of_a_server_that_is_back_is_read_anew(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(fleet, "AWAY_S", 0.0)
    port, page = servers[0].server_address[1], servers[0].pages["/model_info"][1]
    servers[0].stop()
    engine.generate(requests_of(4))
    again = make_server(port=port)
    again.pages["/model_info"] = (200, {**page, "model_path": "another"})
    engine.generate(requests_of(4))
    assert again.sent_rows == []
    assert "is back with another model, another; it gets no rows" in caplog.text
    again.pages["/model_info"] = (200, page)
    engine.generate(requests_of(4))
    assert len(again.sent_rows) == 2
    assert engine._endpoints[0].info.model_path == engine._endpoints[1].info.model_path


@WAYS
@pytest.mark.parametrize("back", [[0], [1], [0, 1]])
def test_after_all_were_lost_those_that_are_back_take_the_rows(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer, way: str, back: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ports = [server.server_address[1] for server in servers]
    for server in servers:
        server.stop()
    with pytest.raises(EngineUnreachableError):
        generate(engine, way, requests_of(4))
    assert "no other server is left" in caplog.text
    assert "0 of 2" not in caplog.text
    again = [make_server(port=ports[number]) for number in back]
    assert len(generate(engine, way, requests_of(4))) == 4
    assert [len(server.sent_rows) for server in again] == [4 // len(back)] * len(back)


def test_after_all_were_lost_they_are_back_with_different_weights(
    make_server: Make, servers: list[RecordingServer], engine: SGLangServer
) -> None:
    ports = [server.server_address[1] for server in servers]
    for server in servers:
        server.stop()
    with pytest.raises(EngineUnreachableError):
        engine.generate(requests_of(4))
    again = [make_server(port=port) for port in ports]
    again[0].pages["/model_info"] = (200, {**model_page("m"), "weight_version": "default"})
    with pytest.raises(EngineError, match=r"different weights, .*'default'.*'v7'"):
        engine.generate(requests_of(4))
    assert [server.sent_rows for server in again] == [[], []]


def test_a_lost_server_is_asked_less_and_less_often(
    servers: list[RecordingServer], engine: SGLangServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(fleet, "monotonic", lambda: clock[0])
    asked: list[float] = []
    servers[0].stop()
    engine.generate(requests_of(2))
    lost = engine._endpoints[0]
    read = lost.read_description
    monkeypatch.setattr(lost, "read_description", lambda *once: (asked.append(clock[0] - 1000), read(*once))[1])
    for _ in range(80):
        clock[0] += 5
        engine.generate(requests_of(1))
    assert asked == [5, 15, 35, 75, 135, 195, 255, 315, 375]


# --- 4. weights -------------------------------------------------------------------------------------------------------


@WAYS
def test_servers_of_two_versions_are_not_mixed(make_server: Make, way: str) -> None:
    servers = [make_server(), make_server()]
    servers[1].pages["/model_info"] = (200, {**model_page("m"), "weight_version": "v8"})
    with connect([server.url for server in servers]) as engine:
        for call in (lambda: generate(engine, way, requests_of(1)), lambda: engine.stream(Request((6, 7)))):
            with pytest.raises(EngineError, match=r"different weights, .*'v7'.*'v8'.*update the weights again"):
                call()
        assert [server.payloads for server in servers] == [[], []]
        servers[0].pages["/model_info"] = servers[1].pages["/model_info"]
        assert len(generate(engine, way, requests_of(4))) == 4, "another's update was under way"


def test_an_update_that_reached_one_of_two_stops_the_calls(
    servers: list[RecordingServer], engine: SGLangServer
) -> None:
    servers[0].pages["/model_info"] = (200, {**model_page("m"), "weight_version": "v8"})
    failed = EngineError("refused; look there")
    with pytest.raises(EngineError, match=rf"1 of 2 servers took version 'v8', and not {servers[1].url}: refused"):
        engine._all_updated("v8", [None, failed])
    first = engine._endpoints[0]
    first.info = fleet.dataclasses.replace(first.info, weight_version="v8")  # as `Endpoint.load` does
    with pytest.raises(EngineError, match="different weights"):
        engine.generate(requests_of(2))


def test_rows_of_two_versions_are_told_of(
    servers: list[RecordingServer], engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(handler: Handler, payload: dict[str, Any]) -> None:
        rows = RecordingEngine().answer(payload)
        for row in rows:
            row["meta_info"]["weight_version"] = "v8"
        handler.say((200, rows))

    generate(engine, "sync", requests_of(4))
    assert "different weights" not in caplog.text
    servers[1].respond = answer
    with caplog.at_level(logging.WARNING):
        versions = {one.weight_version for one in engine.generate(requests_of(4))}
    assert versions == {"v7", "v8"}
    assert "the rows of one call are of different weights" in caplog.text
