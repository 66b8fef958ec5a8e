"""Streams over the fake engine. What travels over HTTP is played by a server that says what a test wants."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import fake_engine, fake_heads
from helpers.engine_contract import assert_same, request
from helpers.fake_engine import (
    Fault,
    Handler,
    RecordingEngine,
    RecordingServer,
    abort_a_row,
    lose_a_state_row,
    response_of,
)
from helpers.stream_contract import StreamContract, assert_adds_up, collect

from torchrl_sglang_hidden.engines import BatchingEngine, Engine
from torchrl_sglang_hidden.engines.http import SGLangServer, connect
from torchrl_sglang_hidden.engines.streams import AsyncStream, StreamChunk
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    AuthenticationError,
    CapabilityError,
    EngineError,
    EngineUnreachableError,
    ProtocolError,
    RequestAbortedError,
    RequestRejectedError,
)
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.head_scores import HeadSpec


class TestRecorder(StreamContract):
    @pytest.fixture(params=["json", "binary"])
    def engine(self, request: pytest.FixtureRequest) -> RecordingEngine:
        return RecordingEngine(binary=request.param == "binary")


def test_states_need_the_server_half() -> None:
    engine = RecordingEngine(pools_in_server=False)
    with pytest.raises(CapabilityError, match=r"no torchrl_sglang_hidden server half.*hidden=None"):
        engine.stream(request([5, 6, 7]))
    assert engine.payloads == []
    stream = engine.stream(request([5, 6, 7], hidden=None))
    assert_adds_up(list(stream), stream.completion)


@pytest.mark.parametrize(("fault", "kind"), [(lose_a_state_row, AlignmentError), (abort_a_row, RequestAbortedError)])
def test_the_last_part_is_checked_as_every_answer(fault: Fault, kind: type[Exception]) -> None:
    stream = RecordingEngine(fault=fault).stream(request(ids_of_length(4)))
    for _ in range(3):
        assert len(next(stream).ids) == 1
    with pytest.raises(kind):
        next(stream)
    assert next(stream, None) is None
    with pytest.raises(EngineError, match=f"the stream failed with {kind.__name__}"):
        stream.completion  # noqa: B018


def ids_of_length(num_response: int) -> list[int]:
    """Return a prompt to which the fake engine answers with so many tokens."""
    return next([5, 6, last] for last in range(3, 90) if len(response_of([5, 6, last])) == num_response)


def test_a_batching_engine_streams_with_its_own() -> None:
    inner = RecordingEngine()
    engine = BatchingEngine(inner, min_batch_size=100, timeout_s=900.0)
    one = request(ids_of_length(4))
    stream = engine.stream(one)
    assert_adds_up(list(stream), stream.completion)
    assert asyncio.run(collect_from(engine, one)) == 4
    assert len(inner.payloads) == 2


async def collect_from(engine: Engine, one: Request) -> int:
    return len(await collect(await engine.astream(one)))


# --- over HTTP --------------------------------------------------------------------------------------------------------

PROMPT = ids_of_length(4)


def events(handler: Handler, *lines: str) -> None:
    """Answer with these lines, and close the connection."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    for line in lines:
        handler.wfile.write(f"{line}\n\n".encode())
    handler.close_connection = True


def event(row: Any) -> str:
    return f"data: {json.dumps(row)}"


def parts(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what SGLang would send for each token."""
    recorder = RecordingEngine()
    row = recorder.answer(payload)[0]
    return [*(recorder.so_far(row, count) for count in range(1, len(row["output_ids"]))), row]


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    def respond(handler: Handler, payload: dict[str, Any]) -> None:
        if payload.get("stream"):
            events(handler, *map(event, parts(payload)), "data: [DONE]")
        else:
            handler.say((200, RecordingEngine().answer(payload)))

    server = RecordingServer()
    server.respond = respond
    yield server
    server.stop()


@pytest.fixture
def engine(server: RecordingServer) -> Iterator[SGLangServer]:
    with connect(server.url) as engine:
        yield engine


class TestHTTP(StreamContract):
    """The fixture `engine` is the module's."""


def read(engine: Engine, way: str, **changes: Any) -> tuple[list[StreamChunk], Completion]:
    one = replace(request(PROMPT), **changes)

    async def aread() -> tuple[list[StreamChunk], Completion]:
        stream = await engine.astream(one)
        return await collect(stream), stream.completion

    if way == "async":
        return asyncio.run(aread())
    stream = engine.stream(one)
    return list(stream), stream.completion


WAYS = pytest.mark.parametrize("way", ["sync", "async"])


@WAYS
def test_it_travels_as_events(server: RecordingServer, engine: SGLangServer, way: str) -> None:
    chunks, completion = read(engine, way)
    assert [len(chunk.ids) for chunk in chunks] == [1, 1, 1, 1]
    assert_adds_up(chunks, completion)
    assert_same(completion, RecordingEngine().generate([request(PROMPT)])[0])
    assert [payload["stream"] for payload in server.payloads] == [True]


@WAYS
def test_what_came_in_between_is_one_chunk(server: RecordingServer, engine: SGLangServer, way: str) -> None:
    server.respond = lambda handler, payload: events(handler, event(parts(payload)[2]), event(parts(payload)[-1]))
    chunks, completion = read(engine, way)
    assert [len(chunk.ids) for chunk in chunks] == [3, 1]
    assert_adds_up(chunks, completion)


REFUSED = {"error": {"message": "too long", "type": "invalid_request_error", "code": 400}}
FAILED = {"error": {"message": "no memory", "code": 503}}


@WAYS
@pytest.mark.parametrize(
    ("respond", "kind", "message"),
    [
        (lambda h, p: h.say((401, "no")), AuthenticationError, "wants an API key"),
        (lambda h, p: h.say((400, {"error": {"message": "no such thing"}})), RequestRejectedError, "no such thing"),
        (lambda h, p: h.say((500, "broken")), EngineError, "answered 500: broken"),
        (lambda h, p: events(h, event(REFUSED), "data: [DONE]"), RequestRejectedError, "answered 400: too long"),
        (lambda h, p: events(h, event(parts(p)[0]), event(FAILED)), EngineError, "answered 503: no memory"),
        (lambda h, p: h.say((200, RecordingEngine().answer(p))), ProtocolError, "no event.*is that an SGLang server"),
        (lambda h, p: events(h, "data: {half"), ProtocolError, "streamed 'data: {half'"),
        (lambda h, p: events(h, event({"text": "x"})), ProtocolError, "lacks 'output_ids'"),
        (lambda h, p: events(h, event(parts(p)[0]), "data: [DONE]"), ProtocolError, "after 1 tokens without a finish"),
        (lambda h, p: events(h, event(parts(p)[1]), event(parts(p)[0])), AlignmentError, "takes back what it said"),
        (lambda h, p: events(h, event(spoilt(parts(p)[1], swap))), AlignmentError, "2 log-probs for 2 output tokens"),
        (lambda h, p: events(h, event(spoilt(parts(p)[1], lose))), AlignmentError, "1 log-probs for 2 output tokens"),
        (lambda h, p: events(h, event(spoilt(parts(p)[1], garble))), ProtocolError, "log-probs cannot be read"),
        (lambda h, p: events(h, event(spoilt(parts(p)[3], lose))), AlignmentError, "3 log-probs for 4 output tokens"),
        # What a fuzzer found.
        (lambda h, p: events(h, "data: " + "[" * 5000), ProtocolError, r"streamed 'data: \[\["),
        (lambda h, p: events(h, event({**parts(p)[0], "output_ids": [math.inf]})), ProtocolError, "list of integers"),
        (lambda h, p: events(h, event({**parts(p)[0], "output_ids": [7.5]})), ProtocolError, "list of integers"),
        (lambda h, p: events(h, event({**parts(p)[0], "output_ids": [96]})), ProtocolError, r"has 96, .* 0\.\.95"),
        (lambda h, p: events(h, event(named(parts(p)[0], 7))), ProtocolError, "it answers 7"),
        (
            lambda h, p: events(h, event(parts(p)[0]), event(named(parts(p)[1], "x"))),
            ProtocolError,
            "answers 'x', a",
        ),
        (lambda h, p: events(h, event(unmeasured(parts(p)[0]))), ProtocolError, "its log-probs are null"),
    ],
)
def test_what_goes_wrong_is_an_error_of_this_package(
    server: RecordingServer, engine: SGLangServer, way: str, respond: Any, kind: type[Exception], message: str
) -> None:
    good, server.respond = server.respond, respond
    with pytest.raises(kind, match=message) as raised:
        read(engine, way)
    assert type(raised.value) is kind
    server.respond = good
    assert_adds_up(*read(engine, way))


def spoilt(row: dict[str, Any], spoil: Callable[[list[Any]], None]) -> dict[str, Any]:
    spoil(row["meta_info"]["output_token_logprobs"])
    return row


def named(row: dict[str, Any], rid: Any) -> dict[str, Any]:
    return {**row, "meta_info": {**row["meta_info"], "id": rid}}


def unmeasured(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "meta_info": {**row["meta_info"], "output_token_logprobs": None}}


def swap(entries: list[Any]) -> None:
    entries[0][1] += 1


def lose(entries: list[Any]) -> None:
    del entries[-1]


def garble(entries: list[Any]) -> None:
    entries[0][0] = "much"


@WAYS
def test_a_server_that_goes_away_in_the_middle_is_unreachable(
    server: RecordingServer, engine: SGLangServer, way: str
) -> None:
    def cut(handler: Handler, payload: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        line = f"{event(parts(payload)[0])}\n\n".encode()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        handler.close_connection = True

    server.respond = cut
    with pytest.raises(EngineUnreachableError, match="went away while answering"):
        read(engine, way)


class Held:
    """A server that sends one part, and then waits for the client to hang up."""

    def __init__(self, server: RecordingServer) -> None:
        self.hung_up = threading.Event()
        server.respond = self.respond

    def respond(self, handler: Handler, payload: dict[str, Any]) -> None:
        events(handler, event(parts(payload)[0]))
        handler.connection.settimeout(20)
        try:
            hung_up = handler.connection.recv(1) == b""
        except ConnectionResetError:  # what a client sends that hangs up before it has read everything
            hung_up = True
        if hung_up:
            self.hung_up.set()

    def wait(self) -> None:
        """Wait until the client has hung up."""
        assert self.hung_up.wait(timeout=20)


@pytest.mark.parametrize("way", ["close", "with", "error in with", "let go", "let go unread"])
def test_letting_go_hangs_up(server: RecordingServer, engine: SGLangServer, way: str) -> None:
    held = Held(server)
    stream = engine.stream(request(PROMPT))
    if way != "let go unread":
        assert len(next(stream).ids) == 1
    if way == "close":
        stream.close()
    elif way == "with":
        with stream:
            pass
    elif way == "error in with":
        with pytest.raises(ZeroDivisionError), stream:
            1 / 0  # noqa: B018
    else:
        del stream
        gc.collect()
    held.wait()


@pytest.mark.parametrize("way", ["close", "cancel", "let go", "end of the loop"])
def test_letting_go_of_an_awaited_one_hangs_up(server: RecordingServer, engine: SGLangServer, way: str) -> None:
    held = Held(server)

    async def run() -> AsyncStream | None:
        stream = await engine.astream(request(PROMPT))
        await anext(stream)
        if way == "close":
            await stream.aclose()
        elif way == "cancel":
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.wait([reading], timeout=0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        elif way == "let go":
            del stream
            gc.collect()
            await asyncio.to_thread(held.wait)
        else:
            return stream
        return None

    stream = asyncio.run(run())
    held.wait()
    del stream


@WAYS
def test_an_engine_that_streams_increments_is_refused_before_anything_is_sent(
    server: RecordingServer, way: str
) -> None:
    status, info = server.pages["/server_info"]
    server.pages["/server_info"] = (status, {**info, "incremental_streaming_output": True})
    with connect(server.url) as engine:
        with pytest.raises(CapabilityError, match="--incremental-streaming-output"):
            read(engine, way)
        assert server.payloads == []


def test_several_servers_take_turns(server: RecordingServer) -> None:
    other = RecordingServer()
    other.respond = server.respond
    try:
        with connect([server.url, other.url]) as engine:
            for _ in range(4):
                assert_adds_up(*read(engine, "sync"))
        assert (len(server.payloads), len(other.payloads)) == (2, 2)
    finally:
        other.stop()


def test_a_closed_engine_says_so(engine: SGLangServer) -> None:
    engine.close()
    with pytest.raises(EngineError, match="closed by close"):
        engine.stream(request(PROMPT))


# --- scores of heads --------------------------------------------------------------------------------------------------


def scored_stream(spec: HeadSpec, fault: Fault | None = None) -> tuple[list[StreamChunk], Completion]:
    one = replace(request(ids_of_length(4), hidden=None), heads=spec)
    stream = RecordingEngine(fault=fault).stream(one)
    return list(stream), stream.completion


def test_scores_come_with_the_tokens() -> None:
    chunks, completion = scored_stream(HeadSpec(("d0", "d3"), ("prompt", "response")))
    assert [len(chunk.ids) for chunk in chunks] == [1] * 4
    for name, scores in completion.scores.items():
        assert torch.equal(torch.cat([chunk.scores[name] for chunk in chunks]), scores.response_T)
        assert chunks[0].scores[name].dtype == torch.float32


def test_pooled_scores_come_at_the_end_alone() -> None:
    rule = "d0 > 9"
    for spec in (
        HeadSpec(("d0",), pooling="mean"),
        HeadSpec(("d0",), pooling="mean", stop_when=rule),
        HeadSpec(("d0",), ("prompt",)),
    ):
        chunks, completion = scored_stream(spec)
        assert [chunk.scores for chunk in chunks] == [{}] * 4
        assert completion.scores.keys() == {"d0"}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda parts: parts[1].update(streamed=[["1"]]), ProtocolError, "'1' stands where a score is expected"),
        (lambda parts: parts[1].update(streamed=[[True]]), ProtocolError, "True stands where a score"),
        (
            lambda parts: parts[1].update(streamed=[[1.0], [1.0]]),
            ProtocolError,
            "scores of a part of a stream are wrong",
        ),
        (lambda parts: parts[1].update(streamed=3), ProtocolError, "scores of a part of a stream are wrong"),
        (lambda parts: parts[1].update(streamed=[[]]), AlignmentError, "1 scores of head 'd0' for the 2 tokens so far"),
        (
            lambda parts: parts[1].update(streamed=[[9.0]]),
            AlignmentError,
            "the scores of head 'd0' in the stream are not",
        ),
        (lambda parts: parts[1].update(streamed=[[None]]), AlignmentError, "the scores of head 'd0' in the stream are"),
    ],
)
def test_parts_whose_scores_are_wrong(
    monkeypatch: pytest.MonkeyPatch, change: Any, error: type[Exception], said: str
) -> None:
    original = fake_engine.streamed_parts

    def spoilt(*args: Any) -> list[Any]:
        parts = original(*args)
        change(parts)
        return parts

    monkeypatch.setattr(fake_engine, "streamed_parts", spoilt)
    with pytest.raises(error, match=said):
        scored_stream(HeadSpec(("d0",)))


@pytest.mark.parametrize(("score", "said"), [(math.inf, ""), (math.nan, "the scores have NaN")])
def test_scores_that_json_does_not_have(monkeypatch: pytest.MonkeyPatch, score: float, said: str) -> None:
    """They come as null while the response goes on, and as they are with its end."""
    monkeypatch.setattr(fake_heads, "scores_of", lambda states_ND, name: torch.full((len(states_ND),), score))
    original = fake_engine.streamed_parts
    monkeypatch.setattr(fake_engine, "streamed_parts", lambda *args: [{"streamed": [[None]]} for _ in original(*args)])
    for keeps_errors in (False, True):
        one = replace(request(ids_of_length(4), hidden=None), heads=HeadSpec(("d0",)), return_errors=keeps_errors)
        stream, chunks = RecordingEngine().stream(one), []
        with pytest.raises(EngineError, match=said) if said and not keeps_errors else nullcontext():
            chunks += list(stream)
            last = chunks[-1].scores["d0"]
            assert torch.equal(last, stream.completion.scores["d0"].response_T[-1:]) or said
            assert (stream.completion.error is not None) is bool(said)
        assert all(chunk.scores["d0"].isnan() for chunk in chunks[:-1])


def test_an_abort_in_a_scored_stream() -> None:
    with pytest.raises(RequestAbortedError):
        scored_stream(HeadSpec(("d0",)), fault=abort_a_row)
