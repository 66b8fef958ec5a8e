"""The contract of sessions over HTTP, and what only a real server shows: the numbers of a whole context, and
what becomes of a session whose turn or cache is lost. In-process: test_streams_engine.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from helpers.hf_oracle import teacher_force
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    POOLINGS,
    SEGMENTS,
    STATE_RTOL,
    prompt_of,
    relative_error,
)
from helpers.session_contract import SessionContract
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, RequestAbortedError, RequestRejectedError, SGLangServer, connect
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import Pooling

GREEDY = {"temperature": 0.0, "max_new_tokens": 12}
IDLE_WITHIN_S = 20


class TestServer(SessionContract):
    @pytest.fixture
    def engine(self, smol: SGLangServer) -> SGLangServer:
        return smol


@pytest.fixture
def http(smol: SGLangServer) -> Iterator[httpx.Client]:
    """SGLang's own interface, without this package's client."""
    with httpx.Client(base_url=smol.url, timeout=120, trust_env=False) as client:
        yield client


def open_pools(http: httpx.Client) -> int:
    return int(http.get("/server_info").json()["internal_states"][0][CHANNEL]["open_pools"])


def turn(new_ids: Any, pooling: Pooling = "mean", **sampling: Any) -> Request:
    """Return a request for all segments and the prompt's log-probs, which tell the ids that the server really had."""
    return Request(
        tuple(new_ids),
        sampling={**GREEDY, **sampling},
        hidden=HiddenSpec(segments=SEGMENTS, pooling=pooling),
        score_prompt=True,
    )


def assert_truth(found: Completion, model_dir: str, pooling: Pooling = "mean") -> None:
    truth = teacher_force(model_dir, found.prompt_ids, found.response_ids)
    torch.testing.assert_close(found.log_probs_T, truth.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    for segment in SEGMENTS:
        error = relative_error(found.hidden[segment].vector, truth.pooled(segment, pooling))
        assert error < STATE_RTOL, f"{segment} {pooling}: {error:.2e}"


@pytest.fixture
def question(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Return a later question of a chat: what follows the end of the previous answer."""

    def ids(text: str) -> list[int]:
        turn = f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return list(tokenizer(turn, add_special_tokens=False)["input_ids"])

    return ids


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_numbers_of_a_chat_are_hugging_faces(
    smol: SGLangServer,
    smol_dir: str,
    chat_ids: Callable[[str], list[int]],
    question: Callable[[str], list[int]],
    pooling: Pooling,
) -> None:
    with smol.session() as session:
        found = session.generate(turn(chat_ids("What is the capital of France?"), pooling))
        assert "Paris" in found.text
        assert_truth(found, smol_dir, pooling)
        for country, city in (("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin")):
            context, new_ids = session.ids, question(f"And of {country}?")
            found = session.generate(turn(new_ids, pooling))
            assert found.prompt_ids == (*context, *new_ids)
            assert city in found.text
            assert_truth(found, smol_dir, pooling)


@pytest.mark.parametrize(
    "sampling",
    [
        {},  # its EOS
        {"max_new_tokens": 3},
        {"stop": [" of"]},
        {"stop": [" of"], "no_stop_trim": True},
        {"stop": ["apit"]},
        {"stop_regex": ["Fr.nce"]},
        {"stop_token_ids": [282]},
        {"ignore_eos": True, "max_new_tokens": 14},
        {"temperature": 3.0, "max_new_tokens": 14},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_a_response_is_appended_as_it_was_sampled_however_it_ended(
    smol: SGLangServer,
    smol_dir: str,
    chat_ids: Callable[[str], list[int]],
    question: Callable[[str], list[int]],
    sampling: dict[str, Any],
) -> None:
    with smol.session() as session:
        first = session.generate(turn(chat_ids("What is the capital of France?"), **sampling))
        new_ids = question("And of Italy?")
        found = session.generate(turn(new_ids))
        assert found.prompt_ids == (*first.prompt_ids, *first.response_ids, *new_ids)
        assert_truth(found, smol_dir)


def test_a_turn_with_a_bos_at_its_head_keeps_it(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, question: Callable[[str], list[int]]
) -> None:
    """SGLang takes a BOS off the head of an appended turn; this model's is the ``<|im_start|>`` of its chats."""
    with connect(smol.url) as fresh, fresh.session() as session:
        session.generate(turn(prompt_of(5, seed=3)))
        for text in ("And of Italy?", "And of Spain?"):
            new_ids = question(text)[1:]
            assert new_ids[0] == tokenizer.bos_token_id
            context = session.ids
            found = session.generate(turn(new_ids))
            assert found.prompt_ids == (*context, *new_ids)
            assert_truth(found, smol_dir)


def test_long_turns_are_computed_in_chunks(smol: SGLangServer, smol_dir: str) -> None:
    with smol.session() as session:
        for seed in (11, 12):
            found = session.generate(replace(turn(prompt_of(100, seed)), score_prompt=False))
        assert len(found.prompt_ids) > 3 * CHUNKED_PREFILL_SIZE
        assert_truth(found, smol_dir)


def test_sessions_at_the_same_time(smol: SGLangServer, smol_dir: str) -> None:
    def talk(seed: int) -> Completion:
        with smol.session() as session:
            for number in range(3):
                found = session.generate(turn(prompt_of(5 + seed, seed=100 * seed + number), max_new_tokens=5))
            return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(talk, range(1, 5)):
            assert_truth(found, smol_dir)


def test_an_aborted_turn_is_not_part_of_the_session(smol: SGLangServer, smol_dir: str, http: httpx.Client) -> None:
    endless = turn(prompt_of(4, seed=21), max_new_tokens=4000, min_new_tokens=4000)
    with smol.session() as session, ThreadPoolExecutor(1) as pool:
        session.generate(turn(prompt_of(5, seed=20)))
        context = session.ids
        running = pool.submit(session.generate, endless)
        while not open_pools(http):
            assert not running.done()
        http.post("/abort_request", json={"abort_all": True}).raise_for_status()
        with pytest.raises(RequestAbortedError):
            running.result()
        assert open_pools(http) == 0
        assert session.ids == context
        found = session.generate(turn(prompt_of(3, seed=22)))
        assert found.prompt_ids[: len(context)] == context
        assert_truth(found, smol_dir)


def test_an_emptied_cache_loses_nothing(smol: SGLangServer, smol_dir: str, http: httpx.Client) -> None:
    with smol.session() as session:
        session.generate(turn(prompt_of(5, seed=23)))
        limit = time.monotonic() + IDLE_WITHIN_S
        while not http.post("/flush_cache").is_success:  # refused while a request is still on its way out
            assert time.monotonic() < limit
        assert_truth(session.generate(turn(prompt_of(4, seed=24))), smol_dir)


def test_a_session_that_the_server_closed_says_how_to_go_on(
    smol: SGLangServer, smol_dir: str, http: httpx.Client
) -> None:
    """As after its time without a turn."""
    with smol.session() as session:
        session.generate(turn(prompt_of(5, seed=25)))
        http.post("/close_session", json={"session_id": session._id}).raise_for_status()
        with pytest.raises(RequestRejectedError, match=r"does not exist; .*; a session ends with .*`ids` has"):
            session.generate(turn(prompt_of(4, seed=26)))
        with smol.session() as other:
            found = other.generate(turn([*session.ids, *prompt_of(4, seed=26)]))
            assert_truth(found, smol_dir)


def test_nothing_is_left_in_the_server(smol: SGLangServer, http: httpx.Client) -> None:
    with smol.session() as session:
        session.generate(turn(prompt_of(5, seed=27)))
        name = session._id
    payload = {"input_ids": [5, 6], "session_params": {"id": name}, "sampling_params": {"max_new_tokens": 1}}
    answer = http.post("/generate", json=payload)
    assert answer.status_code == 400
    assert "does not exist" in answer.text
    assert open_pools(http) == 0
