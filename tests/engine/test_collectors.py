"""`ChatEnv` in torchrl's `LLMCollector`, in each of its modes: every row is the one that the policy gives when called.

The chats of a batch differ in length, so every unpadded batch is ragged. A collector resets its environment once more
than it starts chats, so no test relies on which question comes first.
"""

from __future__ import annotations

import functools
import itertools
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.policy_checks import SEGMENTS, assert_row, make_policy
from helpers.torchrl_pipelines import (
    FOLLOW_UPS,
    AnswerReward,
    Direct,
    buffer,
    chat_env,
    chat_of,
    collector,
    flat,
    unpadded,
)
from tensordict import TensorDictBase
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import AsyncEnvPool
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer

QUESTIONS = ["Hi", "What is the capital of France?", "2+2="]
TURNS = 2
POLICY_KEYS = {"text", "tokens", "masks", "log_probs", "history", "hidden_states", "weight_version", "finish_reason"}
NEXT_KEYS = {"history", "reward", "done", "terminated", "truncated"}

pad_or_not = pytest.mark.parametrize("padded", [False, True], ids=["ragged", "padded"])


@pytest.fixture(scope="module")
def direct(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Direct:
    return Direct(make_policy(smol, tokenizer, "history", max_new_tokens=4))


@pytest.fixture
def make(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Callable[[bool], SGLangHiddenWrapper]:
    return lambda padded: make_policy(smol, tokenizer, "history", pad_output=padded, max_new_tokens=4)


def env(questions: list[str] = QUESTIONS, batch_size: int = 2) -> Any:
    return chat_env(questions, batch_size=batch_size, turns=TURNS, transforms=[AnswerReward()])


@pytest.fixture
def collect() -> Iterator[Callable[..., LLMCollector]]:
    """Return `torchrl_pipelines.collector`, shut down at the end of the test."""
    made: list[LLMCollector] = []

    def make_one(*args: Any, **options: Any) -> LLMCollector:
        made.append(collector(*args, **options))
        return made[-1]

    yield make_one
    for one in made:
        one.shutdown()


def assert_steps(rows: list[TensorDictBase], direct: Direct) -> None:
    """Check that each row is a whole step of a chat, with the same values as the policy gives when it is called."""
    direct.assert_equal(rows)
    for row in rows:
        assert set(row.keys()) >= POLICY_KEYS
        assert set(row["next"].keys()) >= NEXT_KEYS
        before, after = chat_of(row["history"].full), chat_of(row["next", "history"].prompt)
        answers = sum(message["role"] == "assistant" for message in before)
        assert before[0] == {"role": "user", "content": row["query"]}
        assert after == [*before, {"role": "user", "content": FOLLOW_UPS[answers - 1]}]
        assert row["next", "reward"].tolist() == [len(row["text"].response)]
        assert bool(row["next", "done"]) == bool(row["next", "truncated"]) == (answers == TURNS)
        for key in ("reward", "done"):
            assert row["next", key].shape == (1,)


def assert_chats(rows: list[TensorDictBase]) -> None:
    """Check that consecutive rows are the turns of one chat, from its question to its end."""
    for first, second in itertools.pairwise(rows):
        if not first["next", "done"]:
            assert chat_of(second["history"].prompt) == chat_of(first["next", "history"].prompt)
        else:
            assert len(chat_of(second["history"].prompt)) == 1
    assert len(chat_of(rows[0]["history"].prompt)) == 1
    assert rows[-1]["next", "done"]


# --- what a collector yields ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "padded"),
    [
        ({}, (2, 2), False),
        ({}, (2, 2), True),
        ({"flatten_data": True}, (4,), False),
        ({"reset_at_each_iter": True}, (2, 2), True),
        ({"yield_completed_trajectories": True}, (4,), False),
        ({"yield_completed_trajectories": True}, (4,), True),
    ],
)
def test_every_turn(
    make: Any, collect: Any, direct: Direct, options: dict[str, Any], shape: tuple[int, ...], padded: bool
) -> None:
    batches = list(collect(env(), make(padded), turns_per_batch=4, total_turns=8, **options))
    assert [tuple(batch.batch_size) for batch in batches] == [shape, shape]
    for batch in batches:
        rows = flat(batch)
        assert_steps(rows, direct)
        assert_chats(rows)
        assert batch["hidden_states"].response.shape == (*batch.batch_size, 576)
        assert batch["next", "reward"].shape == (*batch.batch_size, 1)


@pad_or_not
def test_the_last_turn_of_every_chat(make: Any, collect: Any, direct: Direct, padded: bool) -> None:
    # Turns that are not yielded count towards the total: 4 chats of 2 turns.
    batches = list(collect(env(), make(padded), turns_per_batch=2, total_turns=8, yield_only_last_steps=True))
    assert [tuple(batch.batch_size) for batch in batches] == [(2,), (2,)]
    for batch in batches:
        assert_steps(flat(batch), direct)
        assert [len(chat_of(row["history"].prompt)) for row in flat(batch)] == [3, 3]
        assert batch["next", "done"].all()


def test_rows_against_hugging_face(make: Any, collect: Any, smol_dir: str) -> None:
    batch = next(iter(collect(env(), make(True), turns_per_batch=4, total_turns=4)))
    for row in flat(batch):
        assert_row(unpadded(row), smol_dir)


@pad_or_not
def test_chats_that_end_at_different_turns(make: Any, collect: Any, direct: Direct, padded: bool) -> None:
    # A chat that ends is reset alone: its neighbour's step is a second turn while its own is a first.
    questions = env(batch_size=2).append_transform(ShortChats())
    batch = next(iter(collect(questions, make(padded), turns_per_batch=6, total_turns=6)))
    direct.assert_equal(flat(batch))
    turns = [[len(chat_of(row["history"].prompt)) for row in part.unbind(0)] for part in batch.unbind(-1)]
    assert [1, 3] in turns or [3, 1] in turns


class ShortChats(AnswerReward):
    """Ends a chat that began with a short question after its first answer."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        short = torch.tensor(
            [[len(chat_of(chat.prompt)[0]["content"]) < 5] for chat in tensordict["history"].unbind(0)]
        )
        for key in ("terminated", "done"):
            next_tensordict.set(key, next_tensordict[key] | short)
        return next_tensordict


def test_one_chat_in_tokens_mode(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase, collect: Any) -> None:
    policy = make_policy(smol, tokenizer, "tokens", max_new_tokens=4)
    chats = chat_env(QUESTIONS, turns=TURNS, input_mode="tokens", tokenizer=tokenizer)
    rows = [row for batch in collect(chats, policy, turns_per_batch=2, total_turns=6) for row in flat(batch)]
    assert len(rows) == 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second["tokens"].prompt.tolist() == first["tokens"].full.tolist()
        assert second["hidden_states"].prompt_count == first["tokens"].full.shape[0]


# --- where it puts it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "padded"),
    [({}, False), ({}, True), ({"yield_completed_trajectories": True}, False)],
    ids=["ragged", "padded", "trajectories"],
)
def test_through_a_replay_buffer(
    make: Any, collect: Any, direct: Direct, options: dict[str, Any], padded: bool
) -> None:
    rows = buffer(batch_size=4)
    yielded = list(collect(env(), make(padded), turns_per_batch=4, total_turns=8, replay_buffer=rows, **options))
    assert yielded == [None, None]
    assert len(rows) == 8
    samples = [rows.sample() for _ in range(2)]
    for sample in samples:
        assert sample.batch_size == (4,)
        assert_steps(flat(sample), direct)
        # A critic's input: one dense tensor, although the rows are of several calls and lengths.
        for segment in SEGMENTS:
            assert getattr(sample["hidden_states"], segment).shape == (4, 576)
            assert getattr(sample["hidden_states"], f"{segment}_count").dtype == torch.int64
        assert all(reason in ("stop", "length") for reason in sample["finish_reason"])
        assert list(sample["weight_version"]) == [flat(sample)[0]["weight_version"]] * 4
        full = sample.get(("tokens", "full"), as_padded_tensor=True, padding_value=0)
        assert full.shape == (4, max(len(row["tokens"].full) for row in flat(sample)))
    turns = [len(chat_of(row["history"].prompt)) for sample in samples for row in flat(sample)]
    assert sorted(turns) == [1] * 4 + [3] * 4, "each row once"


def test_through_a_queue(make: Any, collect: Any, direct: Direct) -> None:
    rows: queue.Queue[TensorDictBase] = queue.Queue()
    yielded = list(collect(env(), make(False), turns_per_batch=4, total_turns=8, queue=rows))
    assert yielded == [None, None]
    found = [rows.get_nowait() for _ in range(8)]
    assert rows.empty()
    assert_steps(found, direct)
    for chat in (found[0:2], found[2:4], found[4:6], found[6:8]):
        assert_chats(chat)


# --- environments that do not wait for each other ---------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[AsyncEnvPool]:
    makers = [functools.partial(env, [question], 1) for question in QUESTIONS]
    one = AsyncEnvPool(makers, backend="threading", stack="lazy")
    yield one
    one.close()


@pytest.mark.parametrize(("last_only", "padded"), [(False, False), (True, True)], ids=["trajectories", "last-steps"])
def test_asynchronous_environments(
    make: Any, collect: Any, direct: Direct, pool: AsyncEnvPool, last_only: bool, padded: bool
) -> None:
    # Without a total: torchrl's collector waits for nothing, and raises, where a total ends between two chats.
    # Its other mode, without whole chats, cannot step environments with a batch size of their own.
    options = {"yield_only_last_steps": True} if last_only else {"yield_completed_trajectories": True}
    batches = list(itertools.islice(collect(pool, make(padded), turns_per_batch=TURNS, **options), 4))
    for batch in batches:
        rows = flat(batch)
        assert_steps(rows, direct)
        assert len(rows) == (1 if last_only else TURNS)
        if not last_only:
            assert_chats(rows)
    assert {flat(batch)[0]["query"] for batch in batches} <= set(QUESTIONS)
