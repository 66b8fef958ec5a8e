"""What is sent at once, and what waits for the finisher's thread without holding up anybody else."""

from __future__ import annotations

import pickle
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import heads_oracle
from helpers.fake_engine import HIDDEN_SIZE
from helpers.fake_scheduler import Req, Scheduler, asking, states_of

from torchrl_sglang_hidden.protocol import CHANNEL, pack_options, unpack_answer
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.server.output_stream import MessageGate, make_streamer_class
from torchrl_sglang_hidden.server.state_store import StateStore
from torchrl_sglang_hidden.spec.spans import LastTokens

TIMEOUT_S = 60


class Streamer:
    """SGLang's output streamer, as much of it as is subclassed: one message for all requests of a call."""

    def __init__(self, sender: Any, gate: MessageGate) -> None:
        self.send_to_detokenizer, self.gate = sender, gate
        self.__post_init__()

    def __post_init__(self) -> None:
        pass

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        sent = [req for req in reqs if req is not skip_req and not (req.finished() and req.finished_output)]
        for req in sent:
            req.finished_output = req.finished() or None
        info = {"theirs": [1 for _ in sent]} | self.build_additional_customized_info(sent)
        message = SimpleNamespace(rids=[req.rid for req in sent], customized_info=pickle.dumps(info))
        self.gate.send(self.send_to_detokenizer.send, message)

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return False

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        return {}


class Sender:
    """Holds what was sent, and by which thread; may make its sender wait."""

    socket = "a socket"

    def __init__(self) -> None:
        self.messages: list[tuple[list[str], dict[str, Any], str]] = []
        self.arrived = threading.Condition()

    def send(self, message: Any) -> None:
        with self.arrived:
            info = pickle.loads(message.customized_info)
            self.messages.append((message.rids, info, threading.current_thread().name))
            self.arrived.notify_all()

    def wait_for(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.messages) >= count, TIMEOUT_S)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> tuple[Scheduler, Any, Sender]:
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.managers.io_struct"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang.srt.managers.io_struct"].wrap_as_pickle = pickle.dumps
    sys.modules["sglang.srt.managers.io_struct"].unwrap_from_pickle = pickle.loads
    scheduler, sender = Scheduler(), Sender()
    gate = MessageGate(scheduler.capture)
    return scheduler, make_streamer_class(Streamer, scheduler.capture, gate)(sender, gate), sender


def named(name: str, req: Req) -> Req:
    req.rid, req.finished_output = name, None
    return req


def end(*reqs: Req) -> None:
    for req in reqs:
        req.is_finished = True


def test_a_big_answer_is_sent_behind_the_step_and_the_others_at_once(stream: Any) -> None:
    scheduler, streamer, sender = stream
    big, small, goes_on = named("big", asking(9, 8, tokens=True)), named("small", asking(7, 6)), named("on", Req([1]))
    scheduler.prefill(big, small, goes_on)
    blocked = threading.Event()
    scheduler.capture.later(lambda: blocked.wait(TIMEOUT_S) and None)
    end(big, small)
    streamer.stream_output([big, small, goes_on], False)
    ((rids, info, thread),) = sender.messages
    assert (rids, thread) == (["small", "on"], threading.current_thread().name)
    assert [len(answer) for answer in info[CHANNEL]] == [1, 0]
    blocked.set()
    sender.wait_for(2)
    rids, info, thread = sender.messages[1]
    assert (rids, thread, info["theirs"]) == (["big"], "finish-requests", [1])
    found = unpack_answer(info[CHANNEL][0], "row 0", HIDDEN_SIZE).pools
    assert found.rows is not None
    assert len(found.rows.rows_NKD) == 2


def test_a_request_is_sent_once(stream: Any) -> None:
    """With overlap scheduling SGLang streams a finished request twice."""
    scheduler, streamer, sender = stream
    big = named("big", asking(9, 8, tokens=True))
    scheduler.prefill(big)
    end(big)
    streamer.stream_output([big], False)
    sender.wait_for(1)
    streamer.stream_output([big], False)
    assert [rids for rids, _, _ in sender.messages] == [["big"], []]


def test_big_answers_come_in_the_order_in_which_requests_finish(stream: Any) -> None:
    scheduler, streamer, sender = stream
    reqs = [named(str(number), asking(9, 8, number % 3, tokens=True)) for number in range(20)]
    scheduler.prefill(*reqs)
    for req in reqs:
        end(req)
        streamer.stream_output([req], False)
    sender.wait_for(20)
    assert [rids for rids, _, _ in sender.messages] == [[str(number)] for number in range(20)]


def test_no_big_answer_waits_for_another(stream: Any) -> None:
    """Those that finish in one step have a message each."""
    scheduler, streamer, sender = stream
    reqs = [named(str(number), asking(9, 8, number, tokens=True)) for number in range(3)]
    goes_on = named("on", Req([1]))
    scheduler.prefill(*reqs, goes_on)
    end(*reqs)
    streamer.stream_output([*reqs, goes_on], False)
    sender.wait_for(4)
    assert [rids for rids, _, _ in sender.messages][:1] == [["on"]]
    assert [rids for rids, _, _ in sender.messages][1:] == [["0"], ["1"], ["2"]]
    for req, (_, info, _) in zip(reqs, sender.messages[1:], strict=True):
        found = unpack_answer(info[CHANNEL][0], "row 0", HIDDEN_SIZE).pools
        assert torch.equal(found.rows.rows_NKD, states_of(req.ids[:-1], (-1,)))


def test_an_answer_that_cannot_be_made_is_refused_and_sent(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would wake the client otherwise."""
    scheduler, streamer, sender = stream
    big = named("big", asking(9, 8, tokens=True))
    scheduler.prefill(big)
    end(big)
    monkeypatch.setattr(StateStore, "read", lambda *args: 1 // 0)
    streamer.stream_output([big], False)
    sender.wait_for(1)
    (answer,) = sender.messages[0][1][CHANNEL][0]
    assert "ZeroDivisionError" in answer["refused"]


def test_a_rank_without_a_socket_holds_and_answers_nothing(stream: Any) -> None:
    scheduler, _, sender = stream
    sender.socket = None
    gate = MessageGate(scheduler.capture)
    streamer = make_streamer_class(Streamer, scheduler.capture, gate)(sender, gate)
    assert not scheduler.capture.sends
    big = named("big", asking(9, 8, tokens=True))
    scheduler.prefill(big)
    end(big)
    streamer.stream_output([big], False)
    assert [info for _, info, _ in sender.messages] == [{"theirs": [1]}]
    assert scheduler.capture._stores == {}
    assert all(slots.device_bytes == 0 for slots in scheduler.capture._slots.values())


@pytest.mark.parametrize(("streams", "response"), [(True, True), (False, True), (True, False)])
def test_scores_come_with_the_parts_of_a_stream(
    stream: tuple[Scheduler, Any, Sender], streams: bool, response: bool
) -> None:
    """Each once, with the tokens that they are of; and the answer has them all."""
    scheduler, streamer, sender = stream
    head = heads_oracle.make_head("linear", HIDDEN_SIZE)
    scheduler.capture.heads.answer(HeadCall("h", "1", head.to_bytes()), HIDDEN_SIZE, torch.device("cpu"))
    asked = pack_options(Wanted((), None), "binary", None, WantedScores(("h",), True, response))
    scored, other = named("scored", Req([9, 8, 7], custom={CHANNEL: asked})), named("other", asking(5, 4))
    scored.stream, other.stream = streams, True
    scheduler.prefill(scored, other)
    streamer.stream_output([scored, other], False)
    scheduler.decode(scored, other)
    scheduler.decode(scored, other)
    streamer.stream_output([scored, other], False)
    scheduler.decode(scored, other)
    scored.is_finished = True
    streamer.stream_output([scored, other], False)
    parts = [info.get(CHANNEL, [[], []]) for _, info, _ in sender.messages]
    assert [len(part) for part in parts] == [2] * 3
    assert [part[1] for part in parts] == [[]] * 3
    found = unpack_answer(parts[-1][0], "row 0", HIDDEN_SIZE).scores
    assert found is not None
    if not (streams and response):
        assert [part[0] for part in parts[:2]] == [[]] * 2
        return
    assert found.response_HT is not None
    streamed = [part[0][0]["streamed"] for part in parts[:2]]
    assert [len(scores) for (scores,) in streamed] == [1, 2]
    assert [score for (scores,) in streamed for score in scores] == found.response_HT[0, :3].tolist()


def test_scores_that_are_pooled_over_a_prompt_are_made_in_the_finishers_thread(
    stream: tuple[Scheduler, Any, Sender],
) -> None:
    scheduler, streamer, sender = stream
    head = heads_oracle.make_head("linear", HIDDEN_SIZE)
    scheduler.capture.heads.answer(HeadCall("h", "1", head.to_bytes()), HIDDEN_SIZE, torch.device("cpu"))
    reqs = []
    for name, pooled in (
        ("whole", Wanted(("full",), "mean")),
        ("spans", Wanted((), "mean", spans={"end": LastTokens(1)})),
        ("response", Wanted(("response",), "mean")),
    ):
        asked = pack_options(Wanted((), None), "binary", None, WantedScores(("h",), False, False, None, pooled))
        reqs.append(named(name, Req([9, 8, 7], custom={CHANNEL: asked})))
    scheduler.prefill(*reqs)
    for req in reqs:
        req.is_finished = True
    streamer.stream_output(reqs, False)
    sender.wait_for(3)
    threads = {rid: thread for rids, _, thread in sender.messages for rid in rids}
    assert {rid for rid, thread in threads.items() if thread == "finish-requests"} == {"whole", "spans"}
    for rids, info, _ in sender.messages:
        found = unpack_answer(info[CHANNEL][0], rids[0], HIDDEN_SIZE).scores
        assert found is not None
        assert found.pools is not None
