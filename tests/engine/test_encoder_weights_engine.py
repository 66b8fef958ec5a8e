"""`HiddenStateTransform` while a real server's weights change: each vector is Hugging Face's on the weights then.

1. What was cached before an update is not given after it, whoever sent the update: this process or another.
2. A vector that is kept (``every``) stays what it was until the next one is due.
3. What ``late=True`` encodes beside a step is of the weights at that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import STATE_RTOL, make_policy, relative_error
from helpers.word_env import WordEnv
from tensordict import TensorDictBase
from torchrl.envs import Compose, EnvBase, ParallelEnv, TransformedEnv
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform, SGLangServer, connect

PROMPT = "You see the number {observation}."
STEPS, NEWER_AT, LAYER = 6, 3, 10
Truth = Callable[[str, int, int], torch.Tensor]


@pytest.fixture
def truth(tokenizer: PreTrainedTokenizerBase) -> Truth:
    """Return a function that gives what the prompt of an observation pools to with some weights, ``[D]``."""

    def pooled(weights: str, observation: int, layer: int = -1) -> torch.Tensor:
        ids = tokenizer(PROMPT.format(observation=observation))["input_ids"]
        return hf_oracle.teacher_force(weights, ids, [0], layers=(LAYER,)).pooled("prompt", "mean", layer)

    return pooled


def rollout(env: EnvBase, update: Callable[[], str]) -> TensorDictBase:
    """Return `STEPS` steps with partial resets; the weights are updated after the one with index `NEWER_AT`."""
    rows, row = [], env.reset()
    for step in range(STEPS):
        rows.append(row.select(*env.observation_spec.keys(True, True)).clone())
        if step == NEWER_AT:
            update()
        _, row = env.step_and_maybe_reset(env.rand_action(row))
    return torch.stack(rows, 1)


def ndenumerate(numbers: torch.Tensor) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield row, step and number of each entry ``[B, T]``."""
    yield from ((divmod(place, numbers.shape[1]), int(number)) for place, number in enumerate(numbers.flatten()))


def test_two_policies_in_three_transforms(
    trainee: SGLangServer, tokenizer: PreTrainedTokenizerBase, smol_dir: str, trained_dir: str, truth: Truth
) -> None:
    last = make_policy(trainee, tokenizer, "text", ("prompt",), max_new_tokens=0)
    inner = last.get_new_version(hidden=HiddenSpec(("prompt",), layers=LAYER))
    cached = HiddenStateTransform(last, PROMPT, in_keys=["observation"], out_key="cached", cache_size=100)
    third = HiddenStateTransform(inner, PROMPT, in_keys=["observation"], out_key="third", every=3, project=32)
    late = HiddenStateTransform(inner, PROMPT, in_keys=["observation"], out_key="late", late=True)
    env = TransformedEnv(TransformedEnv(WordEnv([2, 4, 100]), cached), Compose(third, late))
    out = rollout(env, lambda: trainee.update_weights(trained_dir))
    env.close()
    weights = [smol_dir] * (NEWER_AT + 1) + [trained_dir] * (STEPS - NEWER_AT - 1)
    for (row, step), number in ndenumerate(out["observation"][..., 0]):
        assert relative_error(out["cached"][row, step], truth(weights[step], number)) < STATE_RTOL, (row, step)
        age = int(out["third_age"][row, step])
        expected = truth(weights[step - age], number - age, LAYER) @ third.projection
        assert relative_error(out["third"][row, step], expected) < STATE_RTOL, (row, step, age)
        # It was encoded beside the step that gave it.
        expected = truth(weights[step], number - int(out["late_age"][row, step]), LAYER)
        assert relative_error(out["late"][row, step], expected) < STATE_RTOL, (row, step)
    assert out["third_age"].unique().tolist() == [0, 1, 2]
    assert out["late_age"].unique().tolist() == [0, 1]


def parity_prompt(row: TensorDictBase) -> str:
    return PROMPT.format(observation=int(row["observation"]) % 2)


def encoded_env(made: HiddenStateTransform) -> TransformedEnv:
    return TransformedEnv(WordEnv(2), made.clone())


def test_caches_that_have_every_prompt(
    trainee: SGLangServer, tokenizer: PreTrainedTokenizerBase, smol_dir: str, trained_dir: str, truth: Truth
) -> None:
    """Another client sends the weights, and nobody tells the worker, or this process."""
    policy = make_policy(trainee, tokenizer, "text", ("prompt",), max_new_tokens=0)
    inside, outside = (
        HiddenStateTransform(policy, parity_prompt, in_keys=["observation"], out_key=key, cache_size=100)
        for key in ("inside", "outside")
    )
    env = TransformedEnv(ParallelEnv(1, partial(encoded_env, inside)), outside)
    with connect(trainee.url) as other:
        out = rollout(env, lambda: other.update_weights(trained_dir))
    # Both prompts were there when the weights changed. The first one after it empties the cache.
    assert (outside.cache_info.misses, outside.cache_info.size) == (3, 2)
    env.close()
    weights = [smol_dir] * (NEWER_AT + 1) + [trained_dir] * (STEPS - NEWER_AT - 1)
    for (row, step), number in ndenumerate(out["observation"][..., 0]):
        expected = truth(weights[step], number % 2)
        for key in ("inside", "outside"):
            assert relative_error(out[key][row, step], expected) < STATE_RTOL, (key, step)
