"""Sessions over the fake engine, which keeps contexts as SGLang does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers.engine_contract import request
from helpers.fake_engine import (
    BOS_ID,
    Handler,
    RecordingEngine,
    RecordingServer,
    abort_a_row,
    lose_a_state_row,
)
from helpers.fake_images import IMAGE_ID, images_in
from helpers.session_contract import SessionContract, assert_turn, scored

from torchrl_sglang_hidden.engines import BatchingEngine
from torchrl_sglang_hidden.engines.http import SGLangServer, connect
from torchrl_sglang_hidden.errors import (
    AlignmentError,
    EngineError,
    RequestAbortedError,
    RequestRejectedError,
)


class TestRecorder(SessionContract):
    @pytest.fixture(params=["json", "binary"])
    def engine(self, request: pytest.FixtureRequest) -> RecordingEngine:
        return RecordingEngine(binary=request.param == "binary")


@pytest.fixture
def recorder() -> RecordingEngine:
    return RecordingEngine()


def sent(engine: RecordingEngine) -> list[list[int]]:
    return [payload["input_ids"][0] for payload in engine.payloads]


def test_a_turn_sends_its_own_ids_only(recorder: RecordingEngine) -> None:
    with recorder.session() as session:
        for ids in ([5, 6], [7, 8], [9]):
            session.generate(request(ids))
    assert sent(recorder) == [[5, 6], [7, 8], [9]]
    first, second, third = (payload["session_params"]["rid"] for payload in recorder.payloads)
    assert first is None
    assert [second, third] == [payload["rid"][0] for payload in recorder.payloads[:2]]
    assert second != third


def test_a_session_stays_on_one_data_parallel_rank(recorder: RecordingEngine) -> None:
    """SGLang sends a turn to any of its ranks, which know nothing of each other's turns."""
    ranks = set()
    for _ in range(20):
        recorder.payloads.clear()
        with recorder.session() as session:
            session.generate(request([5, 6]))
            session.generate(request([7]))
        first, second = (payload["routed_dp_rank"] for payload in recorder.payloads)
        assert first == second
        ranks.add(first)
    assert ranks == {0, 1}


def test_a_head_that_sglang_takes_for_a_bos_stays(recorder: RecordingEngine) -> None:
    """SGLang takes a BOS off the head of an appended turn. Which id that is shows when it happens, and is kept."""
    with recorder.session() as session:
        session.generate(request([BOS_ID, 5]))
        for turn in range(2):
            context = session.ids
            assert_turn(recorder, session.generate(scored([BOS_ID, 6 + turn])), context, (BOS_ID, 6 + turn))
    assert [ids for ids in sent(recorder) if ids[0] == BOS_ID and len(ids) < 4] == [
        [BOS_ID, 5],
        [BOS_ID, 6],
        [BOS_ID, BOS_ID, 6],
        [BOS_ID, BOS_ID, 7],
    ]
    recorder.payloads.clear()
    with recorder.session() as session:
        session.generate(request([BOS_ID, 5]))
        session.generate(request([BOS_ID, BOS_ID, 8]))
    assert sent(recorder) == [[BOS_ID, 5], [BOS_ID, BOS_ID, BOS_ID, 8]]


def test_a_placeholder_at_the_head_is_not_sent_twice() -> None:
    """Two placeholders for one image are what SGLang hangs on: rows that do not agree are an error at once."""
    recorder = RecordingEngine(takes_images=True, image_token_id=IMAGE_ID)
    with recorder.session() as session:
        session.generate(request([5, 6]))
        turn = images_in([IMAGE_ID, 7], ["data:image/png;base64,Y2F0"], rows=4)
        with pytest.raises(AlignmentError, match="the prompt's images make it"):
            session.generate(turn)
    assert sent(recorder)[1:] == [[IMAGE_ID, 7]]


def test_a_context_that_is_not_ours_is_an_alignment_error(recorder: RecordingEngine) -> None:
    def lengthen(rows: Any) -> None:
        rows[0]["meta_info"]["prompt_tokens"] += 1

    with recorder.session() as session:
        session.generate(request([5, 6]))
        context = session.ids
        recorder.fault = lengthen
        with pytest.raises(AlignmentError, match=rf"sent a prompt of {len(context) + 1} tokens"):
            session.generate(request([7]))
        recorder.fault = None
        assert session.ids == context
        assert_turn(recorder, session.generate(scored([7])), context, (7,))


@pytest.mark.parametrize(("fault", "kind"), [(abort_a_row, RequestAbortedError), (lose_a_state_row, AlignmentError)])
def test_a_turn_that_fails_is_not_part_of_the_session(recorder: RecordingEngine, fault: Any, kind: Any) -> None:
    with recorder.session() as session:
        session.generate(request([5, 6]))
        context = session.ids
        recorder.fault = fault
        with pytest.raises(kind):
            session.generate(request([7, 8]))
        recorder.fault = None
        assert session.ids == context
        assert_turn(recorder, session.generate(scored([9])), context, (9,))


def test_a_session_that_the_server_forgot_says_how_to_go_on(recorder: RecordingEngine) -> None:
    session = recorder.session()
    session.generate(request([5, 6]))
    recorder.sessions.clear()
    with pytest.raises(
        RequestRejectedError, match=r"session id; a session ends with its server.*`ids` has its context"
    ):
        session.generate(request([7]))
    with recorder.session() as other:
        assert_turn(recorder, other.generate(scored([*session.ids, 7])), session.ids, (7,))


def test_closing_tells_the_server_once(recorder: RecordingEngine) -> None:
    with recorder.session() as session:
        assert len(recorder.sessions) == 1
    assert recorder.sessions == {}
    session.close()  # a second close_session would be a KeyError in the fake engine


def test_a_batching_engine_gives_its_own(recorder: RecordingEngine) -> None:
    engine = BatchingEngine(recorder, min_batch_size=100, timeout_s=900.0)
    with engine.session() as session:
        session.generate(request([5, 6]))
        assert len(recorder.sessions) == 1
        assert len(recorder.payloads) == 1


# --- over HTTP --------------------------------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[RecordingServer]:
    """Serve sessions over HTTP as the fake engine keeps them."""
    recorder, server = RecordingEngine(), RecordingServer()

    def respond(handler: Handler, payload: dict[str, Any]) -> None:
        route = handler.path.removeprefix("/")
        if "session_params" in payload:
            handler.say((200, recorder.turn(payload)))
        elif route == "generate":
            handler.say((200, recorder.answer(payload)))
        else:
            recorder.session_call(route, payload)
            handler.say((200, json.dumps(payload["session_id"]) if route == "open_session" else ""))

    server.respond = respond
    try:
        yield server
    finally:
        server.stop()


class TestHTTP(SessionContract):
    @pytest.fixture
    def engine(self) -> Iterator[SGLangServer]:
        with serving() as server, connect(server.url) as engine:
            yield engine


def test_what_travels() -> None:
    with serving() as server:
        with connect(server.url) as engine, engine.session() as session:
            session.generate(request([5, 6]))
        opened, turn, closed = server.payloads
    assert [path for path, _ in server.seen][-3:] == ["/open_session", "/generate", "/close_session"]
    assert opened["timeout"] == 3600
    assert turn["session_params"] == {"id": opened["session_id"], "rid": None}
    assert turn["routed_dp_rank"] == 0
    assert closed == {"session_id": opened["session_id"]}


def test_a_session_stays_on_its_server() -> None:
    with serving() as one, serving() as other, connect([one.url, other.url]) as engine:
        sessions = [engine.session() for _ in range(4)]
        assert (len(one.payloads), len(other.payloads)) == (2, 2)
        for turn in range(2):
            context = sessions[1].ids
            assert sessions[1].generate(scored([5, 6 + turn])).prompt_ids == (*context, 5, 6 + turn)
        assert (len(one.payloads), len(other.payloads)) == (2, 4)


def test_a_server_that_refuses_to_open_says_why() -> None:
    with serving() as server:
        server.respond = lambda handler, payload: handler.say((400, {"error": {"message": "Failed to open it."}}))
        with connect(server.url) as engine, pytest.raises(RequestRejectedError, match="Failed to open it"):
            engine.session()


def test_closing_after_the_server_is_gone_is_no_error() -> None:
    with serving() as server, connect(server.url) as engine, engine.session() as session:
        session.generate(request([5, 6]))
        server.stop()
    with pytest.raises(EngineError, match="the session was closed"):
        session.generate([5])
