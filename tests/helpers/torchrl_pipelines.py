"""What TorchRL puts around a policy, for the tests: a chat environment with questions and a user who asks on, a
collector, and a buffer.

    env = chat_env(QUESTIONS[:4], batch_size=2, turns=3, follow_ups=FOLLOW_UPS)
    for batch in collector(env, policy, turns_per_batch=6, total_turns=12):
        ...

Everything here pickles, so that collectors in other processes can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.llm import History
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase, StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory

from helpers.policy_checks import LOG_PROB_ATOL, SEGMENTS, STATE_RTOL, Row, relative_error
from torchrl_sglang_hidden import SGLangHiddenWrapper

FOLLOW_UPS = ("Why?", "Say that in fewer words, please.")


class UserAsksOn(Transform):
    """Appends the user's next message after each answer, the way torchrl's tool transforms append a tool's.

    Args:
        messages: the message after the first answer, after the second and so on; from the start again after the last.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__()
        self.messages = tuple(messages)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # Stacked lazily: the chats of a batch differ in length. `set`, since `update` may merge into the chat that is
        # there, and drop the message without a word.
        chats = [self._ask(chat.prompt) for chat in next_tensordict["history"].unbind(0)]
        return next_tensordict.set("history", lazy_stack([ChatHistory(prompt=chat, batch_size=()) for chat in chats]))

    def _ask(self, chat: History) -> History:
        answers = sum(role == "assistant" for role in chat.role)
        content = self.messages[(answers - 1) % len(self.messages)]
        return chat.append(History(role="user", content=content, batch_size=()), inplace=False)


class AnswerReward(Transform):
    """Gives each turn a reward, float32 ``[B, 1]``, of the answer's text.

    Args:
        score: the reward of a text; by default its length.
    """

    def __init__(self, score: Callable[[str], float] = len) -> None:
        super().__init__()
        self.score = score

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        rewards = [[float(self.score(text))] for text in tensordict["text"].response]
        return next_tensordict.set("reward", torch.tensor(rewards))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1))
        return reward_spec


def chat_env(
    questions: Sequence[str],
    *,
    batch_size: int = 1,
    turns: int = 1,
    follow_ups: Sequence[str] = FOLLOW_UPS,
    repeats: int | None = None,
    transforms: Iterable[Transform] = (),
    **options: Any,
) -> EnvBase:
    """Return a ``ChatEnv`` that takes its questions in order, for ever.

    Args:
        questions: what the chats begin with.

    Keyword Args:
        batch_size: chats at a time, B.
        turns: answers per chat; the last one truncates it.
        follow_ups: what the user says between them; see `UserAsksOn`. Not in tokens or text mode: there is no chat.
        repeats: how often each question is asked before the next, for rewards compared within a group.
        transforms: appended last.
        **options: of ``ChatEnv.from_dataloader``, such as ``tokenizer``, ``system_prompt`` or ``input_mode``.
    """
    loader = DataLoader([{"query": question} for question in questions], batch_size=1)
    env = ChatEnv.from_dataloader(loader, batch_size=(batch_size,), repeats=repeats, **options)
    if turns > 1 and options.get("input_mode", "history") == "history":
        env = env.append_transform(UserAsksOn(follow_ups))
    env = env.append_transform(StepCounter(max_steps=turns))
    for transform in transforms:
        env = env.append_transform(transform)
    return env


def collector(
    env: EnvBase | Callable[[], EnvBase],
    policy: SGLangHiddenWrapper,
    *,
    turns_per_batch: int | None = None,
    total_turns: int = -1,
    **options: Any,
) -> LLMCollector:
    """Return an ``LLMCollector``; ``options`` are its own. Shut it down when done."""
    return LLMCollector(
        env, policy=policy, dialog_turns_per_batch=turns_per_batch, total_dialog_turns=total_turns, **options
    )


def buffer(batch_size: int, max_size: int = 64) -> ReplayBuffer:
    """Return a buffer that gives back what it was given, each row once per round, in random order."""
    return ReplayBuffer(storage=LazyStackStorage(max_size), sampler=SamplerWithoutReplacement(), batch_size=batch_size)


def flat(td: TensorDictBase) -> list[TensorDictBase]:
    """Return the rows in row-major order."""
    return [row for part in td.unbind(0) for row in flat(part)] if td.ndim else [td]


def chat_of(chat: History) -> list[dict[str, str]]:
    """Return the messages of one chat, ``[turns]``."""
    return [{"role": role, "content": content} for role, content in zip(chat.role, chat.content, strict=True)]


def unpadded(row: TensorDictBase) -> Row:
    """Return one row of an output with all segments, padded or not, as `policy_checks.assert_row` takes it."""
    mask, assistant = row["masks"].all_attention_mask, row["masks"].all_assistant_mask
    ids = row["tokens"].full
    return Row(
        prompt_ids=ids[mask & ~assistant].tolist(),
        response_ids=ids[assistant].tolist(),
        full_ids=ids[mask].tolist(),
        text=row["text"].response,
        log_probs_T=row["log_probs"].full[assistant],
        finish_reason=row["finish_reason"],
        weight_version=row["weight_version"],
        vectors={segment: getattr(row["hidden_states"], segment) for segment in SEGMENTS},
        counts={segment: int(getattr(row["hidden_states"], f"{segment}_count")) for segment in SEGMENTS},
    )


class Direct:
    """What a policy in history mode gives when it is called itself, to compare the rows of a collector with.

    Args:
        policy: a greedy policy; called unpadded, once for all chats that it has not seen.
    """

    def __init__(self, policy: SGLangHiddenWrapper) -> None:
        self.policy = policy.get_new_version(pad_output=False)
        self._rows: dict[str, TensorDictBase] = {}

    def assert_equal(self, rows: Sequence[TensorDictBase]) -> None:
        """Check that every row, padded or not, has every field that the policy gives for its ``history.prompt``."""
        chats = {str(chat_of(row["history"].prompt)): row["history"].prompt for row in rows}
        new = {name: chat for name, chat in chats.items() if name not in self._rows}
        if new:
            inputs = [TensorDict(history=ChatHistory(prompt=chat, batch_size=())) for chat in new.values()]
            self._rows.update(zip(new, flat(self.policy(lazy_stack(inputs))), strict=True))
        for row in rows:
            _assert_row_equal(row, self._rows[str(chat_of(row["history"].prompt))])


def _assert_row_equal(row: TensorDictBase, direct: TensorDictBase) -> None:
    """Compare a row, padded or not, with a row that is not padded."""
    mask = row["masks"].all_attention_mask
    num_prompt, num_response = len(direct["tokens"].prompt), len(direct["tokens"].response)
    for name, ids in (("full", row["tokens"].full[mask]), ("prompt", row["tokens"].prompt[-num_prompt:]),
                      ("response", row["tokens"].response[:num_response])):  # fmt: skip
        assert ids.dtype == torch.int64
        assert ids.tolist() == getattr(direct["tokens"], name).tolist(), name
    assert row["masks"].all_assistant_mask[mask].tolist() == direct["masks"].all_assistant_mask.tolist()
    for found, expected in (
        (row["log_probs"].full[mask], direct["log_probs"].full),
        (row["log_probs"].response[:num_response], direct["log_probs"].response),
    ):
        torch.testing.assert_close(found, expected, atol=LOG_PROB_ATOL, rtol=0, equal_nan=True)
    for name in SEGMENTS:
        assert getattr(row["text"], name) == getattr(direct["text"], name)
        found_D, expected_D = (getattr(one["hidden_states"], name) for one in (row, direct))
        assert found_D.dtype == torch.float32
        assert relative_error(found_D, expected_D) < STATE_RTOL
        assert getattr(row["hidden_states"], f"{name}_count") == getattr(direct["hidden_states"], f"{name}_count")
    assert chat_of(row["history"].response) == chat_of(direct["history"].response)
    assert chat_of(row["history"].full) == chat_of(direct["history"].full)
    for name in ("finish_reason", "weight_version"):
        assert row[name] == direct[name]
