"""`first_to_end`: the samples that end first are kept, and the others given up."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
from helpers.fake_engine import Handler, RecordingEngine, RecordingServer, tiny_tokenizer
from helpers.held_engine import LIMIT_S
from tensordict import TensorDict
from torchrl.modules.llm.policies import Text

from torchrl_sglang_hidden import (
    HiddenSpec,
    InputError,
    InputTypeError,
    RequestAbortedError,
    SGLangHiddenWrapper,
    connect,
)
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.engines.races import first_to_end
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

GROUPS = [[Request((6 + group, 20 + sample)) for sample in range(5)] for group in range(3)]


class Racing(RecordingEngine):
    """An engine whose requests end when ``ends`` says so, and which notes whose wait was given up."""

    def __init__(self, ends: Callable[[Request], bool], **options: Any) -> None:
        super().__init__(**options)
        self.ends, self.given_up = ends, []

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.generate(requests)
        if not self.ends(requests[0]):
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up.append(requests[0].prompt_ids)
        return completions


def test_the_first_that_end_are_kept_in_order_and_the_others_given_up() -> None:
    ending = {(6, 24), (6, 20), (7, 21), (7, 22), (8, 20), (8, 24)}
    engine = Racing(lambda request: request.prompt_ids in ending)
    found = first_to_end(engine, GROUPS, 2)
    assert [one.prompt_ids for one in found] == sorted(ending)
    everything = {one.prompt_ids for group in GROUPS for one in group}
    assert sorted(engine.given_up) == sorted(everything - ending)


def test_a_sample_that_went_wrong_is_kept_only_where_others_lack() -> None:
    requests = [[Request((6, 20 + sample), return_errors=True) for sample in range(3)] for _ in range(2)]
    bad = [{(6, 20)}, {(6, 20), (6, 21)}]
    for group, aborted, expected in zip(requests, bad, ((21, 22), (20, 22)), strict=True):
        engine = Racing(lambda request: True)
        engine.fault = lambda rows, engine=engine, aborted=aborted: (
            rows[0]["meta_info"].update(finish_reason={"type": "abort"})
            if engine.requests[-1].prompt_ids in aborted
            else None
        )
        found = first_to_end(engine, [group], 2)
        assert [one.prompt_ids[1] for one in found] == list(expected)
    assert [str(one.error)[:6] for one in found if one.error] == ["row 0 "]


def test_an_error_gives_up_all_the_others() -> None:
    engine = Racing(lambda request: request.prompt_ids == (8, 20))
    engine.fault = lambda rows: (
        rows[0]["meta_info"].update(finish_reason={"type": "abort"})
        if engine.requests[-1].prompt_ids == (8, 20)
        else None
    )
    with pytest.raises(RequestAbortedError, match="row 2 "):
        first_to_end(engine, GROUPS, 2)
    assert len(engine.given_up) == 14


def test_samples_that_race_carry_what_their_prompt_brought() -> None:
    request = Request((6, 7), hidden=HiddenSpec(SEGMENTS))
    found = generate_samples(Racing(lambda request: True), [request, request], 2, extra=3)
    expected = RecordingEngine().generate([request])[0]
    assert len(found) == 4
    assert [list(one.hidden) for one in found] == [list(SEGMENTS)] * 4
    assert all(one.hidden["prompt"].vector.equal(expected.hidden["prompt"].vector) for one in found)


def test_the_late_are_aborted_on_their_server() -> None:
    """Of each prompt's three samples the third is never answered."""
    server, asked, answer = RecordingServer(), [], RecordingEngine().answer
    release, lock = threading.Event(), threading.Lock()

    def respond(handler: Handler, payload: dict[str, Any]) -> None:
        if payload["sampling_params"][0]["max_new_tokens"] > 1:
            with lock:
                asked.append(payload)
                late = sum(one["input_ids"] == payload["input_ids"] for one in asked) == 3
            if late:
                release.wait(LIMIT_S)
                handler.close_connection = True
                return
        handler.say((200, answer(payload)))

    server.respond = respond
    tokenizer = tiny_tokenizer()
    with connect(server.url) as engine:
        policy = SGLangHiddenWrapper(
            engine, tokenizer=tokenizer, input_mode="text", num_samples=2, extra_samples=1,
            generate_kwargs={"max_new_tokens": 4},
        )  # fmt: skip
        out = policy(TensorDict(text=Text(prompt=["w1 w2", "w3"], batch_size=2), batch_size=2))
    release.set()
    assert out.batch_size == (2, 2)
    late = [payload["rid"][0] for n, payload in enumerate(asked) if _count(asked[: n + 1], payload) == 3]
    assert sorted(server.aborted) == sorted(late)
    assert len(late) == 2
    server.stop()


def open_sockets(server: RecordingServer) -> int:
    """Return the connections that this process's clients hold to a server."""
    connections = psutil.Process().net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port == server.server_address[1] for one in connections)


def test_a_race_leaves_no_connection_open() -> None:
    server = RecordingServer()
    # Keeps the samples under way until all are, so that each has a connection.
    together, answer = threading.Barrier(15), RecordingEngine().answer

    def respond(handler: Handler, payload: dict[str, Any]) -> None:
        together.wait(LIMIT_S)
        handler.say((200, answer(payload)))

    server.respond = respond
    with connect(server.url) as engine:
        before = open_sockets(server)
        for _ in range(2):
            assert len(first_to_end(engine, GROUPS, 5)) == 15
            assert open_sockets(server) == before
    server.stop()


def test_a_race_of_more_samples_than_this_process_may_have_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RecordingServer()
    limit = len(os.listdir("/dev/fd")) + 10
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    with connect(server.url) as engine:
        with pytest.raises(InputError, match=rf"100 requests .*its limit is {limit}\); raise the limit \(ulimit -n\)"):
            generate_samples(engine, [Request((6, 7))] * 10, 4, extra=6)
        assert server.payloads == []
        assert len(generate_samples(engine, [Request((6, 7))], 1, extra=1)) == 1
    server.stop()


def _count(payloads: list[dict[str, Any]], payload: dict[str, Any]) -> int:
    return sum(one["input_ids"] == payload["input_ids"] for one in payloads)


@pytest.mark.parametrize(
    ("extra", "num_samples", "error", "words"),
    [
        (1, None, InputError, "without num_samples"),
        (-1, 2, InputError, "extra_samples=-1: expected an integer of at least 0"),
        (1.5, 2, InputTypeError, "expected an integer"),
    ],
)
def test_extra_samples_that_cannot_be(extra: Any, num_samples: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SGLangHiddenWrapper(RecordingEngine(), tokenizer=tiny_tokenizer(), extra_samples=extra, num_samples=num_samples)
