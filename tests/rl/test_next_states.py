"""`add_next_states`: which states are taken from the step after, which are asked for, and what GAE makes of them.

1. Inside an episode the state after a step is the state before the next one: nothing is asked.
2. After a cut it is not: that is the next episode's. The encoder is asked for it, in one call.
3. After a terminal end there is none: the step's own state stands there, whose value GAE multiplies with 0.
4. GAE on these is GAE on the states of an environment that encodes every observation itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine
from helpers.policy_batches import batch_of, make
from helpers.word_env import PROMPT, WordEnv, vectors_of
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.postprocs import MultiStep
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.transforms import Compose
from torchrl.objectives.value import GAE

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import add_next_states, make_value_head

STATE = "state"


def encoder() -> tuple[HiddenStateTransform, RecordingEngine]:
    policy, engine = make("text", hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    return HiddenStateTransform(policy, PROMPT, in_keys=["observation"], out_key=STATE), engine


def rollout(lengths: list[int], steps: int, cut: int | None = None) -> TensorDictBase:
    """Return a rollout whose root has the states, as a policy writes them: terminal ends, and cuts after some steps."""
    env = TransformedEnv(WordEnv(lengths), Compose(*([] if cut is None else [StepCounter(cut)])))
    batch = env.rollout(steps, break_when_any_done=False)
    return batch.set(STATE, vectors_of(batch["observation"]))


def truth_of(batch: TensorDictBase) -> torch.Tensor:
    return vectors_of(batch["next", "observation"])


def test_inside_an_episode_nothing_is_asked() -> None:
    batch = rollout([2, 4], 4)
    batch["next", "terminated"][:, -1] = batch["next", "done"][:, -1] = True
    found = add_next_states(batch, state_key=STATE)
    assert found is batch
    ended = batch["next", "terminated"][..., 0]
    torch.testing.assert_close(batch["next", STATE][~ended], truth_of(batch)[~ended])
    assert torch.equal(batch["next", STATE][ended], batch[STATE][ended])
    assert ended.sum() >= 2


def test_cuts_and_the_batchs_end_are_asked_in_one_call() -> None:
    made, engine = encoder()
    batch = rollout([100, 2], 7, cut=2)
    cut = batch["next", "truncated"][..., 0] & ~batch["next", "terminated"][..., 0]
    assert cut[:, :-1].any(), "a cut inside the batch"
    # What a shift alone would give there is the state of the next episode's first observation.
    wrong = torch.cat([batch[STATE][:, 1:], batch[STATE][:, -1:]], 1)
    assert not torch.allclose(wrong[cut], truth_of(batch)[cut])

    add_next_states(batch, state_key=STATE, encoder=made)

    ended = batch["next", "terminated"][..., 0]
    torch.testing.assert_close(batch["next", STATE][~ended], truth_of(batch)[~ended])
    unknown = cut.clone()
    unknown[:, -1] |= ~ended[:, -1]
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [int(unknown.sum())]


@pytest.mark.parametrize("shifted", [False, True])
def test_gae_is_that_of_an_environment_that_encodes_everything(shifted: bool) -> None:
    made, _ = encoder()
    critic = make_value_head(made)
    batch = rollout([100, 2, 4], 7, cut=2)
    batch["next", "reward"] = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(0))
    full = batch.clone()
    full["next", STATE] = truth_of(full)
    gae = GAE(gamma=0.9, lmbda=0.8, value_network=critic, shifted=shifted, **({"shifted_budget": 7} if shifted else {}))

    gae(add_next_states(batch, state_key=STATE, encoder=made))

    gae(full)
    assert batch["advantage"].isfinite().all()
    torch.testing.assert_close(batch["advantage"], full["advantage"])
    torch.testing.assert_close(batch["value_target"], full["value_target"])
    torch.testing.assert_close(batch["state_value"], full["state_value"])
    assert ("next", "state_value") in batch.keys(True)


def test_gae_without_these_states_is_another_at_a_cut() -> None:
    """Why: TorchRL takes V(s) for V(s') where "next" has no state."""
    made, _ = encoder()
    critic = make_value_head(made)
    batch = rollout([100], 4, cut=2)
    bare = batch.clone()
    GAE(gamma=0.9, lmbda=0.8, value_network=critic, shifted=True, shifted_budget=4)(bare)
    GAE(gamma=0.9, lmbda=0.8, value_network=critic)(add_next_states(batch, state_key=STATE, encoder=made))
    cut = batch["next", "truncated"]
    assert not torch.allclose(bare["advantage"][cut], batch["advantage"][cut])


def test_a_policy_as_the_encoder_and_nested_keys() -> None:
    policy, engine = make("text", hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    steps = []
    for number in range(3):
        row = policy(batch_of("text", [f"w{number} w2", f"w{number} w5"]))
        done = torch.zeros(2, 1, dtype=torch.bool)
        after = batch_of("text", [f"w{number + 1} w2", f"w{number + 1} w5"])
        row.set("next", after.update({"done": done, "terminated": done.clone()}))
        steps.append(row)
    batch = lazy_stack(steps, 1)
    batch.names = [None, "time"]
    engine.payloads.clear()
    key = ("hidden_states", "prompt")

    add_next_states(batch, encoder=policy)

    torch.testing.assert_close(batch["next", *key][:, :-1], batch[key][:, 1:])
    torch.testing.assert_close(batch["next", *key][:, -1], policy(batch_of("text", ["w3 w2", "w3 w5"]))[key])
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2, 2]
    assert batch.get(("next", *key)).isfinite().all()


def test_trajectories_that_a_collector_puts_behind_each_other() -> None:
    batch = rollout([100], 6)
    batch["collector"] = TensorDict(traj_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]), batch_size=(1, 6))
    with pytest.raises(
        InputError, match=r"2 of 6 steps end their episode without terminating it, the first at \(0, 2\)"
    ):
        add_next_states(batch, state_key=STATE)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda td: td.del_(STATE), MissingKeyError, "no 'state' in the batch: name the states"),
        (
            lambda td: td.set(STATE, td["observation"]),
            InputTypeError,
            "'state' is a Tensor; expected a floating tensor",
        ),
        (lambda td: td.exclude(("next", "done")), MissingKeyError, r"no \('next', 'done'\)"),
        (lambda td: td.transpose(0, 1), InputError, r"\['time', None\]: expected time to be the last one"),
        (lambda td: td[:, :0], InputError, r"size \(2, 0\) has no steps; expected at least 1"),
        (lambda td: td[0, 0], InputError, r"size \(\) with the dimensions \[\]: expected time to be the last"),
        (lambda td: td.set(("next", STATE), td[STATE]), InputError, "is there already; leave this call out"),
        (lambda td: td, InputError, r"2 of 6 steps end .*the first at \(0, 2\): .*pass encoder="),
    ],
)
def test_refuses(change: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        add_next_states(change(rollout([100, 2], 3)), state_key=STATE)


def test_refuses_steps_of_several() -> None:
    batch = MultiStep(gamma=0.9, n_steps=2)(rollout([100, 100], 4))
    with pytest.raises(InputError, match="'next' is up to 2 steps away, as MultiStep makes it; expected 1"):
        add_next_states(batch, state_key=STATE)


def test_refuses_an_encoder_of_another_size() -> None:
    batch = rollout([100, 100], 3)
    with pytest.raises(InputError, match=r"encoder wrote 'state' of shape None; expected \(2, 8\)"):
        add_next_states(batch, state_key=STATE, encoder=lambda rows: rows)
    with pytest.raises(InputError, match=r"of shape \(2, 5\); expected \(2, 8\): use one that pools as the policy"):
        add_next_states(batch, state_key=STATE, encoder=lambda rows: rows.set(STATE, torch.zeros(2, 5)))
    assert batch.get(("next", STATE)) is None, "nothing half-written"
