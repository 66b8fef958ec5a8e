"""`HiddenStateTransform` on a real server: every vector is Hugging Face's, for every environment, step and reset."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.policy_checks import STATE_RTOL, make_policy, relative_error
from helpers.word_env import WordEnv
from tensordict import TensorDictBase
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import ParallelEnv, TransformedEnv, check_env_specs
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    CapabilityError,
    HiddenSpec,
    HiddenStateTransform,
    Request,
    SGLangHiddenWrapper,
    SGLangOffline,
    SGLangServer,
)

Policy = Callable[..., SGLangHiddenWrapper]
LENGTHS = [2, 5, 100]
STEPS = 7
PROMPT = "You see the number {observation}."
READS: dict[str, Any] = {"mode": "text", "segments": ("prompt",), "max_new_tokens": 0}


class Counted:
    """A prompt function that a pickle keeps, and that counts its calls in this process."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, row: TensorDictBase) -> str:
        self.count += 1
        return PROMPT.format(observation=int(row["observation"]))


@pytest.fixture(scope="module")
def truth(smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[int], torch.Tensor]:
    """Return a function that gives what the prompt of an observation pools to, ``[D]``."""

    def pooled(observation: int) -> torch.Tensor:
        ids = tokenizer(PROMPT.format(observation=observation))["input_ids"]
        return hf_oracle.teacher_force(smol_dir, ids, [0]).pooled("prompt", "mean")

    return pooled


def assert_vectors(found: torch.Tensor, observations: torch.Tensor, truth: Callable[[int], torch.Tensor]) -> None:
    """Check vectors ``[*, D]`` against those of observations ``[*]``."""
    rows = found.reshape(-1, found.shape[-1])
    assert len(rows) == observations.numel() > 0
    for row, observation in zip(rows, observations.flatten().tolist(), strict=True):
        assert relative_error(row, truth(int(observation))) < STATE_RTOL, observation


@pytest.mark.parametrize("late", [False, True])
def test_every_environment_step_and_reset(policy: Policy, truth: Callable[[int], torch.Tensor], late: bool) -> None:
    made = HiddenStateTransform(policy(**READS), PROMPT, in_keys=["observation"], late=late)
    env = TransformedEnv(WordEnv(LENGTHS), made)
    check_env_specs(env, seed=0)
    out = env.rollout(STEPS, break_when_any_done=False)
    seen = out["observation"][..., 0]
    if late:
        age = out["hidden_state_age"][..., 0]
        assert set(age.flatten().tolist()) == {0, 1}
        seen = seen - age
    assert_vectors(out["hidden_state"], seen, truth)
    env.close()


def test_every_third_asks_for_a_third(policy: Policy, truth: Callable[[int], torch.Tensor]) -> None:
    prompt = Counted()
    made = HiddenStateTransform(policy(**READS), prompt, in_keys=["observation"], every=3)
    out = TransformedEnv(WordEnv([100, 100]), made).rollout(9)
    assert prompt.count == 2 * (9 // 3 + 1), "the reset, and the steps 3, 6 and 9"
    assert_vectors(out["hidden_state"], out["observation"][..., 0] - out["hidden_state_age"][..., 0], truth)


def test_after_generating_with_layers_and_text(
    policy: Policy, smol_dir: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = policy(mode="text", segments=("response",), max_new_tokens=4)
    layered = base.get_new_version(hidden=HiddenSpec(("response",), layers=(10, -1)))
    made = HiddenStateTransform(layered, PROMPT, in_keys=["observation"], text_key="said")
    out = TransformedEnv(WordEnv([100, 100]), made).rollout(2)
    for index in range(2):
        row = out[index, 1]
        ids = tokenizer(PROMPT.format(observation=int(row["observation"])))["input_ids"]
        sampled: list[int] = []
        while len(sampled) < 4:
            # The last token is not fed: any will do.
            sampled.append(hf_oracle.teacher_force(smol_dir, ids, [*sampled, 0]).argmax_T[-1])
        assert row["said"] == tokenizer.decode(sampled, skip_special_tokens=True)
        expected = hf_oracle.teacher_force(smol_dir, ids, sampled, layers=(10,))
        for place, layer in enumerate((10, -1)):
            assert relative_error(row["hidden_state"][place], expected.pooled("response", "mean", layer)) < STATE_RTOL


def test_labels_of_data(policy: Policy, truth: Callable[[int], torch.Tensor]) -> None:
    data = WordEnv(LENGTHS).rollout(STEPS, break_when_any_done=False)
    made = HiddenStateTransform(policy(**READS), PROMPT, in_keys=["observation"])
    made(data)
    assert_vectors(data["hidden_state"], data["observation"][..., 0], truth)
    assert_vectors(data["next", "hidden_state"], data["next", "observation"][..., 0], truth)


def make_env(made: HiddenStateTransform, length: int, start: int) -> TransformedEnv:
    return TransformedEnv(WordEnv(length, start), made.clone())


def make_parallel(made: HiddenStateTransform) -> TransformedEnv:
    return TransformedEnv(ParallelEnv(2, [partial(WordEnv, 2), partial(WordEnv, 5, 20)]), made.clone())


def test_collectors_share_the_server(smol: SGLangServer, policy: Policy, truth: Callable[[int], torch.Tensor]) -> None:
    """Two workers: one with the transform around a `ParallelEnv`, one with it inside."""
    made = HiddenStateTransform(policy(**READS), PROMPT, in_keys=["observation"], every=2, cache_size=100)
    inside = partial(ParallelEnv, 2, [partial(make_env, made, 2, 0), partial(make_env, made, 5, 20)])
    collector = MultiSyncCollector(
        [partial(make_parallel, made), inside], frames_per_batch=16, total_frames=32, cat_results="stack"
    )
    try:
        batches = list(collector)
    finally:
        collector.shutdown()
    assert len(batches) == 2
    for batch in batches:
        seen = batch["observation"][..., 0] - batch["hidden_state_age"][..., 0]
        assert set(batch["hidden_state_age"].flatten().tolist()) == {0, 1}
        assert_vectors(batch["hidden_state"], seen, truth)


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    def test_an_engine_of_this_process_is_for_it_alone(
        self, in_process: SGLangOffline, tokenizer: PreTrainedTokenizerBase, truth: Callable[[int], torch.Tensor]
    ) -> None:
        reads = make_policy(in_process, tokenizer, **READS)
        made = HiddenStateTransform(reads, PROMPT, in_keys=["observation"])
        with pytest.raises(
            CapabilityError, match=r"the process that made it alone \(pid \d+\).*around the ParallelEnv"
        ):
            ParallelEnv(1, partial(make_env, made, 5, 0)).reset()
        env = TransformedEnv(ParallelEnv(1, partial(WordEnv, 5)), made)
        out = env.rollout(2)
        env.close()
        assert_vectors(out["hidden_state"], out["observation"][..., 0], truth)

    def test_a_deep_copy_has_the_same_engine(self, in_process: SGLangOffline) -> None:
        copied = copy.deepcopy(in_process)
        assert copied is not in_process
        assert copied.engine is in_process.engine
        copied.close()
        assert len(in_process.generate([Request((5, 6), {"max_new_tokens": 1})])) == 1


def test_in_process(in_process_log: str) -> None:
    assert "test_hidden_state_transform.py::InProcess::test_an_engine_of_this_process_is_for_it_alone PASSED" in (
        in_process_log
    )
