"""What a client counts of its calls, and the log's lines about them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_engine import RecordingEngine, RecordingServer, lose_a_state_row

from torchrl_sglang_hidden import (
    AlignmentError,
    CapabilityError,
    EngineUnreachableError,
    HiddenSpec,
    InputError,
    Request,
    RequestRejectedError,
    SGLangServer,
    connect,
)
from torchrl_sglang_hidden.counters import Counters, ServerCounters
from torchrl_sglang_hidden.engines.batching import BatchingEngine
from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.engines.sessions import Session
from torchrl_sglang_hidden.engines.streams import Stream
from torchrl_sglang_hidden.errors import BatchCancelledError, EngineError, RequestAbortedError
from torchrl_sglang_hidden.server.metrics import COUNTERS

REQUEST = Request((6, 7, 8), {"max_new_tokens": 2}, hidden=HiddenSpec(segments=("prompt", "response")))


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with RecordingServer() as server:
        yield server


@pytest.fixture
def engine(server: RecordingServer) -> Iterator[SGLangServer]:
    with connect(server.url) as engine:
        yield engine


def test_a_new_client_has_counted_nothing(engine: SGLangServer) -> None:
    assert engine.counters() == Counters()


def test_a_batch(engine: SGLangServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchrl_sglang_hidden"):
        engine.generate([REQUEST, REQUEST])
        asyncio.run(engine.agenerate([REQUEST]))
    found = engine.counters()
    assert (found.requests, found.completions, found.prompt_tokens, found.response_tokens) == (3, 3, 9, 6)
    assert found.rows == 3 * (3 + 2)
    assert found.sent_bytes > 100
    assert found.received_bytes > 100
    assert (found.gaps, found.refusals, found.failures, found.retries) == (0, 0, 0, 0)
    assert caplog.records == [], "a call that goes well is nothing to an operator"


def test_a_stream_and_a_session() -> None:
    meter, fake = Meter("it", list), RecordingEngine()
    with Stream(fake._growing(REQUEST), REQUEST, fake.info, meter) as stream:
        assert meter.tally.read() == Counters(requests=1)
        list(stream)
    assert (meter.tally.read().completions, meter.tally.read().rows) == (1, 5)
    with Session(fake._host, fake._check, meter) as session:
        session.generate(REQUEST)
    found = meter.tally.read()
    assert (found.requests, found.completions, found.rows) == (2, 2, 10)


def spoil(server: RecordingServer) -> None:
    def respond(handler: Any, payload: Any) -> None:
        rows = RecordingEngine().answer(payload)
        lose_a_state_row(rows)
        handler.say((200, rows))

    server.respond = respond


def test_a_gap_is_counted_and_logged(
    server: RecordingServer, engine: SGLangServer, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(server)
    with pytest.raises(AlignmentError):
        engine.generate([REQUEST])
    assert (engine.counters().gaps, engine.counters().completions, engine.counters().rows) == (1, 0, 0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.name == "torchrl_sglang_hidden.engines.meter"
    assert server.url in record.getMessage()


@pytest.mark.parametrize(
    ("status", "error", "counted"), [(400, RequestRejectedError, "refusals"), (500, EngineError, "failures")]
)
def test_a_refusal_and_a_failure(
    server: RecordingServer, engine: SGLangServer, status: int, error: type[Exception], counted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    server.respond = lambda handler, payload: handler.say((status, {"error": {"message": "no\nlast words"}}))
    with pytest.raises(error):
        engine.generate([REQUEST])
    expected = {"refusals": 0, "failures": 0, "gaps": 0} | {counted: 1}
    assert {name: getattr(engine.counters(), name) for name in expected} == expected
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(": no"), "a line per event; the error has the others"


def test_a_server_that_is_gone(server: RecordingServer, engine: SGLangServer) -> None:
    server.stop()
    with pytest.raises(EngineUnreachableError):
        engine.generate([REQUEST])
    with pytest.raises(EngineUnreachableError):
        engine.stream(REQUEST)
    assert (engine.counters().requests, engine.counters().failures) == (2, 2)


def test_what_was_not_sent_is_not_counted(engine: SGLangServer) -> None:
    with pytest.raises(InputError):
        engine.generate([Request((), {})])
    assert engine.counters() == Counters()


@pytest.mark.parametrize(
    "error", [BatchCancelledError("x"), RequestAbortedError("x"), InputError("x"), KeyboardInterrupt()]
)
def test_what_is_nothing_to_an_operator(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter("it", list)
    meter.failed(error)
    assert meter.tally.read() == Counters()
    assert caplog.records == []


def test_an_update_of_weights(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter("it", list)
    with caplog.at_level(logging.INFO), meter.updating() as updated:
        assert updated("7") == "7"
    assert meter.tally.read().weight_updates == 1
    assert meter.tally.read().weight_seconds > 0
    assert caplog.messages == ["it has the weights of version 7, after 0.00 s"]
    with pytest.raises(EngineError), meter.updating():
        raise EngineError("it died")
    assert meter.tally.read().weight_updates == 1
    assert caplog.records[-1].levelno == logging.ERROR


def test_batching_counts_with_its_engine(engine: SGLangServer) -> None:
    with BatchingEngine(engine, min_batch_size=1) as batching:
        batching.generate([REQUEST])
        assert batching.counters() == engine.counters() != Counters()


def test_an_engine_of_another_class_counts_nothing() -> None:
    for read in (RecordingEngine().counters, RecordingEngine().server_counters):
        with pytest.raises(CapabilityError, match="use SGLangServer"):
            read()


def test_the_servers_counters_are_summed() -> None:
    states = [{COUNTERS: {"rows": 3}}, {COUNTERS: {"rows": 4, "steps": 1}}, {}, {COUNTERS: 1}, None]
    assert Meter("it", lambda: states).server() == ServerCounters(rows=7, steps=1)
