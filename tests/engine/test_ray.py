"""`RayLLMCollector`: two workers in processes of their own, one server. The policy pickles and reconnects in each.

A `RayLLMCollector` is one worker; two workers are two of them. What of torchrl 0.14.1 a user has to know:

- after ``total_dialog_turns`` it goes on, yielding None for ever: stop at None, or count the batches;
- ``num_cpus=``, ``num_gpus=`` and ``sync_iter=False`` raise AttributeError without a ``remote_config={}`` beside them;
- its ``total_dialog_turns`` and ``dialog_turns_per_batch`` raise AttributeError: keep the numbers yourself;
- a shared `RayReplayBuffer` goes to it as ``replay_buffer.client()``: the buffer itself does not pickle;
- without an accelerator nothing else is needed; ``num_cpus: 0`` places more workers than there are cores.

The modules of the environment's factory must be importable in the workers: here by ``PYTHONPATH``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.policy_checks import make_policy
from helpers.torchrl_pipelines import AnswerReward, Direct, chat_env, chat_of, flat
from torchrl.collectors.llm import RayLLMCollector
from torchrl.data import LazyStackStorage, RayReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer

TURNS = 2
QUESTIONS = (["Hi", "2+2="], ["What is the capital of France?", "Is the earth flat?"])


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def policy(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> SGLangHiddenWrapper:
    return make_policy(smol, tokenizer, "history", max_new_tokens=4)


@pytest.fixture
def workers(policy: SGLangHiddenWrapper) -> Iterator[Any]:
    """Makes two workers, each with questions of its own."""
    made: list[RayLLMCollector] = []

    def make(**options: Any) -> list[RayLLMCollector]:
        for questions in QUESTIONS:
            env = functools.partial(chat_env, questions, batch_size=2, turns=TURNS, transforms=[AnswerReward()])
            options = {"dialog_turns_per_batch": 4, "remote_config": {"num_cpus": 0}, **options}
            made.append(RayLLMCollector(env, policy=policy, **options))
        return made

    yield make
    for one in made:
        one.shutdown()


def assert_turns(rows: list[Any], direct: Direct, questions: list[str], each: int) -> None:
    """Both turns of every question's chat, ``each`` times, as the policy gives them."""
    direct.assert_equal(rows)
    turns = sorted((row["query"], len(chat_of(row["history"].prompt))) for row in rows)
    assert turns == sorted((question, length) for question in questions for length in (1, 3) for _ in range(each))
    for row in rows:
        assert chat_of(row["history"].prompt)[0]["content"] == row["query"]
        assert row["next", "reward"].tolist() == [len(row["text"].response)]


def test_two_workers_yield_their_rows(workers: Any, policy: SGLangHiddenWrapper) -> None:
    both = workers(total_dialog_turns=8)
    with ThreadPoolExecutor(len(both)) as pool:
        found = list(pool.map(lambda worker: list(itertools.takewhile(lambda batch: batch is not None, worker)), both))
    direct = Direct(policy)
    for batches, questions in zip(found, QUESTIONS, strict=True):
        assert [tuple(batch.batch_size) for batch in batches] == [(2, 2), (2, 2)]
        assert_turns([row for batch in batches for row in flat(batch)], direct, questions, each=2)


def test_two_workers_fill_one_buffer(workers: Any, policy: SGLangHiddenWrapper) -> None:
    rows = RayReplayBuffer(
        storage=functools.partial(LazyStackStorage, 64),
        sampler=SamplerWithoutReplacement,
        batch_size=8,
        remote_config={"num_cpus": 0},
    )
    try:
        both = workers(replay_buffer=rows.client())
        with ThreadPoolExecutor(len(both)) as pool:
            assert list(pool.map(RayLLMCollector.next, both)) == [None, None]
        assert len(rows) == 8
        sample = rows.sample()
        assert_turns(flat(sample), Direct(policy), QUESTIONS[0] + QUESTIONS[1], each=1)
        assert sample["hidden_states"].prompt.shape == (8, 576)
        assert all(reason in ("stop", "length") for reason in sample["finish_reason"])
        assert set(sample["weight_version"]) == {policy.model.info.weight_version}
    finally:
        rows.close()
