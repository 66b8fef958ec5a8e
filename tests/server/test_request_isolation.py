"""An error of one request in the scheduler ends that request, with status 400 or its reason, and no other."""

from __future__ import annotations

import logging
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_scheduler import Scheduler, asking

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL, Options, pack_options
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.server import request_isolation as isolation
from torchrl_sglang_hidden.server.capture import Capture

OPTIONS = pack_options(Wanted(("response",), layers=(-1,)), "text")


class Finish:
    """SGLang's ``FINISH_ABORT``."""

    def __init__(self, message: str, status_code: int, err_type: str) -> None:
        self.message, self.status_code = message, status_code


class Processor:
    """SGLang's ``CustomLogitProcessor``."""

    @staticmethod
    def from_str(text: str) -> None:
        if text != "good":
            raise EOFError("ran out of input")


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "sglang.srt.managers.io_struct": {"AbortReq": SimpleNamespace},
        "sglang.srt.managers.schedule_batch": {"FINISH_ABORT": Finish},
        "sglang.srt.sampling.custom_logit_processor": {"CustomLogitProcessor": Processor},
    }
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.sampling", *modules):
        module = ModuleType(name)
        module.__dict__.update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)


class SGLangScheduler:
    """SGLang's scheduler, as much of it as a request that fails comes by."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any]] = []
        self.waiting_queue = [SimpleNamespace(rid="other")]
        self.server_args = SimpleNamespace(enable_custom_logit_processor=True)
        self.nodes: dict[str, Any] = {}
        self.session_controller = SimpleNamespace(get=lambda name: SimpleNamespace(req_nodes=self.nodes))

    def send_abort_output(self, abort: Any, recv_req: Any) -> None:
        self.sent.append((abort, recv_req))


def request(custom_params: Any = None, **fields: Any) -> Any:
    sampling = SimpleNamespace(custom_params=custom_params)
    plain = {"rid": "mine", "session_params": None, "custom_logit_processor": None}
    return SimpleNamespace(sampling_params=sampling, **{**plain, **fields})


def take(scheduler: SGLangScheduler, recv_req: Any, original: Any = lambda *args: None) -> None:
    isolation.take_in(original, scheduler, recv_req, Capture())


def refusal(scheduler: SGLangScheduler, recv_req: Any) -> str:
    """Return why the request was aborted, which must be a 400 of its own and nobody else's."""
    ((abort, to),) = scheduler.sent
    assert (abort.rid, to) == (recv_req.rid, recv_req)
    assert (abort.finished_reason["type"], abort.finished_reason["status_code"]) == ("abort", 400)
    assert [req.rid for req in scheduler.waiting_queue] == ["other"]
    return str(abort.finished_reason["message"])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "options of nothing": (
        {"custom_params": {CHANNEL: {"protocol": PROTOCOL, "options": "{}"}}},
        "cannot be read: '{}'",
    ),
    "another protocol": ({"custom_params": {CHANNEL: {**OPTIONS, "protocol": 0}}}, "protocol=0"),
    "layers that are not served": (
        {"custom_params": {CHANNEL: pack_options(Wanted(("response",), layers=(9,)), "text")}},
        r"layers=\(9,\)",
    ),
    "a processor that is none": ({"custom_logit_processor": "garbage"}, "custom_logit_processor='garbage' .*EOFError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_aborted(what: str) -> None:
    fields, words = BROKEN[what]
    scheduler, recv_req = SGLangScheduler(), request(**fields)
    before = SERVER.read().refusals
    take(scheduler, recv_req, lambda *args: pytest.fail("it was taken in"))
    assert re.search(words, refusal(scheduler, recv_req))
    assert SERVER.read().refusals == before + 1


def test_options_are_read_once() -> None:
    params = {CHANNEL: dict(OPTIONS), "theirs": 1}
    seen: list[Any] = []
    take(SGLangScheduler(), request(params, custom_logit_processor="good"), lambda *args: seen.append(args))
    assert isinstance(params[CHANNEL], Options)
    assert params["theirs"] == 1
    assert len(seen) == 1


def test_a_processor_is_not_read_where_none_is_taken() -> None:
    """Reading it runs the client's code. SGLang itself refuses the request."""
    scheduler, seen = SGLangScheduler(), list[Any]()
    scheduler.server_args.enable_custom_logit_processor = False
    take(scheduler, request(custom_logit_processor="garbage"), lambda *args: seen.append(args))
    assert (len(seen), scheduler.sent) == (1, [])


@pytest.mark.parametrize("session", [False, True])
def test_an_error_while_a_request_is_taken_in(session: bool, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = SGLangScheduler()
    params = SimpleNamespace(id="a session") if session else None
    recv_req = request(session_params=params)
    req = SimpleNamespace(rid="mine", finished_reason=None)
    req.finished = lambda: req.finished_reason is not None

    queue = scheduler.waiting_queue

    def original(*args: Any) -> None:
        queue.append(req)
        scheduler.nodes["mine"] = SimpleNamespace(req=req)
        raise KeyError("no such adapter")

    take(scheduler, recv_req, original)
    assert "cannot take the request (KeyError('no such adapter'))" in refusal(scheduler, recv_req)
    assert scheduler.waiting_queue is queue, "which SGLang's other parts hold too"
    assert "no such adapter" in caplog.text, "with its traceback"
    assert req.finished() == session, "a session's next turn waits for one that has not ended"


@pytest.mark.parametrize("turn", [None, "it ended"])
def test_an_error_of_a_session_without_a_turn_that_waits(turn: str | None) -> None:
    scheduler = SGLangScheduler()
    req = SimpleNamespace(finished_reason=turn, finished=lambda: True)
    if turn is not None:
        scheduler.nodes["mine"] = SimpleNamespace(req=req)

    def original(*args: Any) -> None:
        raise KeyError("no such adapter")

    recv_req = request(session_params=SimpleNamespace(id="a session"))
    take(scheduler, recv_req, original)
    assert "no such adapter" in refusal(scheduler, recv_req)
    assert req.finished_reason == turn


def test_a_processor_that_finds_no_memory() -> None:
    """It is no fault of the processor's: SGLang has its own way out, or ends."""
    info = SimpleNamespace(custom_logit_processor={1: SimpleNamespace(rows=[0])})
    setattr(info, isolation.REQUESTS, (SimpleNamespace(to_finish=None),))

    def original(*args: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        isolation.around_processors(original, torch.zeros(1, 2), info)


def test_an_error_while_a_request_for_embeddings_is_taken_in() -> None:
    def original(*args: Any) -> None:
        raise KeyError("no such adapter")

    scheduler, recv_req = SGLangScheduler(), request()
    del recv_req.session_params
    isolation.around_embedding(original, scheduler, recv_req)
    assert "no such adapter" in refusal(scheduler, recv_req)


def test_a_processor_that_raises_costs_its_requests() -> None:
    """The others' logits are changed as they asked, whichever comes first."""
    requests = [SimpleNamespace(to_finish=None) for _ in range(3)]
    entries = {1: SimpleNamespace(rows=[0, 2], by=0.0), 2: SimpleNamespace(rows=[1], by=5.0)}
    info = SimpleNamespace(custom_logit_processor=entries)

    def original(logits: torch.Tensor, info: Any, *args: Any) -> None:
        for entry in info.custom_logit_processor.values():
            logits[entry.rows] += 1 / entry.by

    with pytest.raises(ZeroDivisionError):
        isolation.around_processors(original, torch.zeros(3, 2), info)  # a step whose requests are not known
    setattr(info, isolation.REQUESTS, tuple(requests))
    logits = torch.zeros(3, 2)
    isolation.around_processors(original, logits, info)
    assert logits[:, 0].tolist() == [0.0, pytest.approx(0.2), 0.0]
    assert requests[1].to_finish is None
    for req in (requests[0], requests[2]):
        assert req.to_finish.status_code == 400
        assert "its custom_logit_processor raised ZeroDivisionError" in req.to_finish.message
    assert info.custom_logit_processor is entries


def test_an_error_of_a_step_costs_the_requests_that_asked(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler()
    asks, waits = asking(9, 8, 7, segments=("response",)), asking(1, 2, segments=("response",))
    scheduler.prefill(asks)
    scheduler.prefill(waits)
    capture = scheduler.capture
    with isolation.isolated(capture, [asks, asking(3, segments=("response",))]):
        raise IndexError("a bug")
    assert "IndexError('a bug')" in capture.opened[asks].refused
    assert "IndexError" in capture.opened[asks].logits.refused
    assert capture.opened[waits].refused == ""
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_shortage_of_memory_is_left_to_who_can_do_without() -> None:
    """Other ranks may wait in a call that this one did not make."""
    with pytest.raises(torch.OutOfMemoryError), isolation.isolated(Capture(), []):
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("fails", ["copy_to_host", "consume"])
def test_an_error_on_the_way_to_the_host(fails: str) -> None:
    scheduler, asks = Scheduler(), asking(9, 8, 7, segments=("response",))
    scheduler.prefill(asks)

    class Output:
        def copy_to_host(self, copy: Any) -> Any:
            if fails == "copy_to_host":
                raise IndexError("a bug")
            return self

        def consume(self, batch: Any, commits: Any) -> None:
            raise IndexError("a bug")

    output = isolation.IsolatedOutput(scheduler.capture, (asks,), Output())
    output.copy_to_host(torch.clone).consume(None, [])
    assert "a bug" in scheduler.capture.opened[asks].refused
