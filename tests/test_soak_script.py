"""The soak tells right answers from wrong ones, and what grew from what did not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import soak
import torch
from helpers.fake_engine import RecordingEngine, RecordingServer, tiny_tokenizer
from soak_checks import Holding, Score, growth, make_requests

from torchrl_sglang_hidden import connect
from torchrl_sglang_hidden.records import Completion, Pooled, Request

MIB = 2**20


def test_it_finds_nothing_wrong_with_a_good_server() -> None:
    server = RecordingServer()
    try:
        with connect(server.url) as engine:
            requests = make_requests(engine.info, 48, 0, most_prompt=24, most_new=4)
            run = soak.Soak(engine, os.getpid(), requests, tokenizer=tiny_tokenizer())
            run.acts = (run.call, run.call_policy, run.join_queue)
            run.ask_alone()
            run.threads(8, run.call, times=2)
            run.one_call(64)
            for _ in range(2):
                run.everything(8)
                run.rest()
    finally:
        server.stop()
    record, held = soak.summarize(run, {"left_over": {}}, most_bytes=64 * MIB, most_count=8)
    assert (record["wrong"], record["ties"], held) == ([], 0, True)
    assert record["right"] > 16 + 64
    assert not soak.summarize(run, {"left_over": {"open_pools": 1}}, most_bytes=64 * MIB, most_count=8)[1]
    run.score.fail("a row")
    assert not soak.summarize(run, {"left_over": {}}, most_bytes=64 * MIB, most_count=8)[1]


def _of_kind(kind: int) -> tuple[Request, Completion]:
    engine = RecordingEngine()
    request = make_requests(engine.info, 8, 0, most_prompt=24, most_new=4)[kind]
    return request, engine.generate([request])[0]


def _other_token(one: Completion) -> Completion:
    return replace(one, response_ids=(*one.response_ids[:-1], one.response_ids[-1] + 1))


def _moved(one: Completion) -> Completion:
    return replace(one, hidden={n: Pooled(p.vector + 1e-2, p.count) for n, p in one.hidden.items()})


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (1, _moved),
        (1, lambda one: replace(one, hidden={n: Pooled(p.vector, p.count + 1) for n, p in one.hidden.items()})),
        (1, lambda one: replace(one, hidden={})),
        (1, lambda one: replace(one, prompt_ids=(*one.prompt_ids, 1))),
        (0, lambda one: replace(one, log_probs_T=one.log_probs_T + 1e-2)),
        (0, lambda one: replace(one, log_probs_T=None)),
        (0, lambda one: replace(_other_token(one), log_probs_T=one.log_probs_T - 1)),
        (0, lambda one: replace(one, response_ids=one.response_ids[:-1], log_probs_T=one.log_probs_T[:-1])),
        (2, lambda one: replace(one, token_rows=None)),
        (2, lambda one: replace(one, token_rows=replace(one.token_rows, rows_ND=one.token_rows.rows_ND * torch.nan))),
        (3, lambda one: replace(one, logits=None)),
        (3, lambda one: replace(one, logits=replace(one.logits, values_NC=one.logits.values_NC + 1))),
        (7, lambda one: replace(one, prompt_log_probs_P=one.prompt_log_probs_P * 2)),
    ],
)
def test_a_wrong_answer_is_wrong(kind: int, spoil: Callable[[Completion], Completion]) -> None:
    request, alone = _of_kind(kind)
    score = Score()
    score.compare("here", request, alone, alone)
    assert (score.right, score.wrong) == (1, [])
    score.compare("here", request, spoil(alone), alone)
    assert (score.right, score.ties) == (1, 0)
    assert score.wrong[0].startswith("here: P=")


def test_tokens_that_are_equally_likely_are_a_tie() -> None:
    request, alone = _of_kind(0)
    score = Score()
    score.compare("here", request, _other_token(alone), alone)
    assert (score.right, score.ties, score.wrong) == (0, 1, [])


def test_what_grows_is_told_from_what_does_not() -> None:
    flat = [Holding(100 * MIB, 90 * MIB, 20 + turn % 3, 9, 4) for turn in range(30)]
    assert not any(row["grew"] for row in growth(flat, most_bytes=8 * MIB, most_count=2).values())
    leaks = [replace(one, pss_bytes=one.pss_bytes + turn * MIB, threads=9 + turn) for turn, one in enumerate(flat)]
    table = growth(leaks, most_bytes=8 * MIB, most_count=2)
    assert [name for name, row in table.items() if row["grew"]] == ["pss_bytes", "threads"]
