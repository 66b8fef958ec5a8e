"""What all transforms over groups share: how rollouts are found, wait for their group, and come out.

1. A group is handled when its last rollout is there, whichever batches, dimensions and forms they came in.
2. In front of `MCAdvantage`, which takes no None, as alone.
3. An error leaves everything as it was: the same data, mended, can be written again.
4. What waits is pickled; a buffer that is shared between processes is refused by TorchRL, not split.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.group_batches import SIZE, dense, groups, ragged, return_of, rollout
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs.transforms import Compose
from torchrl.objectives.llm import MCAdvantage

from torchrl_sglang_hidden import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import CentroidReward, CrossRolloutBaseline, ExplorationBonus
from torchrl_sglang_hidden.rl.groups import GroupTransform

PARTS: list[Callable[..., GroupTransform]] = [CrossRolloutBaseline, ExplorationBonus, CentroidReward]
parts = pytest.mark.parametrize("part", PARTS)
OUT = {CrossRolloutBaseline: "baseline", ExplorationBonus: "exploration_bonus", CentroidReward: "centroid_reward"}


def written(out: TensorDictBase, part: Callable[..., GroupTransform]) -> dict[tuple[str, float], float]:
    """Return what a part wrote, by question and first number of the response's state."""
    return {
        (step["query"], float(step["hidden_states", "response"][0])): float(step[OUT[part]].sum())  # type: ignore[index]
        for step in out.unbind(0)
    }


@parts
def test_in_one_write_in_several_and_in_every_form(part: Callable[..., GroupTransform]) -> None:
    rollouts = groups(2, 3, turns=2)
    whole = part(3).inv(ragged(rollouts))
    assert isinstance(whole, LazyStackedTensorDict)
    assert whole.batch_size == (12,)
    assert len(whole.get("tokens", as_list=True)) == 12
    expected = written(whole, part)

    transform, pieces = part(3), []
    for number, steps in enumerate(rollouts):
        out = transform.inv(ragged([steps]))
        assert (out is None) == (number < 4), "the fifth rollout is the last one of the first question"
        pieces += [] if out is None else list(out.unbind(0))
        assert transform.queued_rollouts == [1, 2, 3, 4, 2, 0][number]
    assert written(lazy_stack(pieces), part) == expected

    plain = part(3).inv(dense(rollouts))
    assert not isinstance(plain, LazyStackedTensorDict)
    assert plain.batch_size == (12,)
    assert written(plain, part) == expected
    assert written(part(3).inv(dense(rollouts).reshape(3, 2, 2)), part) == expected


@parts
def test_as_an_environment_returns_rollouts_of_one_step(part: Callable[..., GroupTransform]) -> None:
    rollouts = groups(2, 3)
    steps = LazyStackedTensorDict.maybe_dense_stack([ragged(rollouts)], 1)
    rows = lazy_stack([row.to_tensordict() for row in steps.unbind(0)])
    assert not isinstance(rows[0], LazyStackedTensorDict)
    out = part(3).inv(rows)
    assert {len(tokens) for tokens in out.get("tokens", as_list=True)} == {2, 3, 4}
    assert written(out, part) == written(part(3).inv(ragged(rollouts)), part)


@parts
def test_rollouts_of_different_numbers_of_turns(part: Callable[..., GroupTransform]) -> None:
    rollouts = [rollout("a", turns=turns, seed=turns) for turns in (1, 3, 2)]
    out = part(3).inv(ragged(rollouts))
    assert out.batch_size == (6,)
    values = out[OUT[part]].flatten()  # type: ignore[index]
    assert torch.equal(values[1:4], values[1].expand(3)), "all steps of a rollout have its number"
    assert len(set(values.tolist())) == 3
    assert out[OUT[part]].shape == out["next", "reward"].shape  # type: ignore[index]


@parts
def test_the_data_that_are_given_stay_as_they_were(part: Callable[..., GroupTransform]) -> None:
    rollouts = groups(1, 3)
    for batch in (ragged(rollouts), dense(rollouts)):
        before = batch["next", "reward"].clone()
        assert part(3).inv(batch) is not None
        assert torch.equal(batch["next", "reward"], before)
        assert OUT[part] not in batch  # type: ignore[index]


def reward_shape(shape: tuple[int, ...]) -> TensorDictBase:
    return CrossRolloutBaseline(3).inv(ragged(groups(1, 3, reward_shape=shape)))


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_rewards_of_every_shape_that_losses_want(shape: tuple[int, ...]) -> None:
    assert reward_shape(shape)["advantage"].shape == (3, *shape)


@parts
@pytest.mark.parametrize("storage", [LazyStackStorage, LazyTensorStorage])
def test_as_the_transform_of_a_buffer(part: Callable[..., GroupTransform], storage: type) -> None:
    transform = part(3)
    buffer = ReplayBuffer(storage=storage(64), sampler=SamplerWithoutReplacement(), transform=transform, batch_size=6)
    rollouts = groups(2, 3)
    make = ragged if storage is LazyStackStorage else dense
    for steps in rollouts:
        buffer.extend(make([steps]))
    assert len(buffer) == 6
    sample = buffer.sample()
    first, again = written(part(3).inv(make(rollouts)), part), written(sample.reshape(-1), part)
    assert again == first
    assert transform.queued_rollouts == 0
    buffer.extend(make(rollouts[:1]))
    transform.clear_queues()
    assert transform.queued_rollouts == 0


def test_before_the_advantage_of_a_group() -> None:
    """MCAdvantage normalises what the bonus left of the rewards, whether or not a write completes a group."""
    bonus = ExplorationBonus(3, scale=0.5)
    chain = Compose(MCAdvantage(grpo_size=3), bonus)
    chain = pickle.loads(pickle.dumps(chain))
    buffer = ReplayBuffer(
        storage=LazyStackStorage(64), sampler=SamplerWithoutReplacement(), transform=chain, batch_size=6
    )
    rollouts = groups(2, 3)
    for steps in rollouts:
        buffer.extend(ragged([steps]))
    assert len(buffer) == 6
    sample = buffer.sample()
    for question in ("question 0", "question 1"):
        rows = [row for row in range(6) if sample[row]["query"] == question]
        own = [steps for steps in rollouts if steps[0]["query"] == question]
        out = bonus.inv(ragged(own))
        expected = torch.tensor([return_of(steps) for steps in own]) + 0.5 * out["exploration_bonus"].flatten()
        normalised = (expected - expected.mean()) / expected.std()
        found = {float(sample[row]["next", "reward"]): float(sample[row]["advantage"]) for row in rows}
        for reward, advantage in zip(expected.tolist(), normalised.tolist(), strict=True):
            (near,) = [found[key] for key in found if abs(key - reward) < 1e-6]
            assert near == pytest.approx(advantage, abs=1e-5)


def test_two_parts_and_an_advantage() -> None:
    chain = Compose(CrossRolloutBaseline(3), ExplorationBonus(3), CentroidReward(3))
    out = None
    for steps in groups(1, 3):
        out = chain.inv(ragged([steps]))
    assert out is not None
    rewards = out["next", "reward"]
    expected = out["centroid_reward"] + 0.1 * out["exploration_bonus"]
    torch.testing.assert_close(rewards, expected)
    others = (rewards.sum() - rewards) / 2
    torch.testing.assert_close(out["advantage"], rewards - others)


def test_groups_are_told_apart_by_tensors_too() -> None:
    batch = ragged(groups(1, 4))
    batch["group"] = torch.tensor([[7], [8], [7], [8]])
    out = CrossRolloutBaseline(2, group_key="group").inv(batch)
    assert out["group"].flatten().tolist() == [7, 7, 8, 8]


def spoil(key: tuple[str, ...] | str, value: object) -> TensorDictBase:
    batch = ragged(groups(1, 3))
    if value is None:
        del batch[key]
    else:
        batch[key] = value
    return batch


@parts
@pytest.mark.parametrize(
    ("batch", "kind", "words"),
    [
        (spoil("query", None), MissingKeyError, "no 'query' in the data.*group_key"),
        (spoil(("next", "reward"), None), MissingKeyError, r"no \('next', 'reward'\)"),
        (spoil(("next", "done"), None), MissingKeyError, r"no \('next', 'done'\)"),
        (
            spoil(("next", "done"), torch.zeros(3, 1, dtype=torch.bool)),
            InputError,
            "last one is not done",
        ),
        (spoil(("next", "reward"), torch.zeros(3, 2)), InputError, r"shape \(1, 2\) for 1 steps; expected one"),
        (spoil(("next", "reward"), torch.zeros(3, 1, dtype=torch.int64)), InputError, "int64"),
        (spoil(("next", "reward"), torch.tensor([[0.0], [torch.nan], [0.0]])), InputError, r"is \[nan\]; expected fin"),
        (spoil("hidden_states", None), MissingKeyError, "pool this segment"),
        (spoil(("hidden_states", "response"), torch.full((3, SIZE), torch.nan)), InputError, "6 of 6 numbers are not"),
        (spoil(("hidden_states", "response"), torch.ones(3, SIZE, dtype=torch.int64)), InputTypeError, "int64"),
        (TensorDict(query="a"), InputError, "without batch dimensions"),
    ],
    ids=str,
)
def test_bad_data(
    part: Callable[..., GroupTransform], batch: TensorDictBase, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        part(3).inv(batch)


@parts
def test_an_error_leaves_everything_as_it_was(part: Callable[..., GroupTransform]) -> None:
    transform, rollouts = part(3), groups(1, 3)
    transform.inv(ragged(rollouts[:1]))
    bad = ragged(rollouts[1:])
    bad["hidden_states", "response"] = torch.full((2, SIZE), torch.nan)
    with pytest.raises(InputError, match="not finite"):
        transform.inv(bad)
    assert transform.queued_rollouts == 1
    assert written(transform.inv(ragged(rollouts[1:])), part) == written(part(3).inv(ragged(rollouts)), part)


@parts
def test_states_of_another_size_are_refused(part: Callable[..., GroupTransform]) -> None:
    transform = part(3)
    transform.inv(ragged(groups(1, 3)))
    with pytest.raises(InputError, match=rf"numbers a rollout; expected \d+, .*another {type(transform).__name__}"):
        transform.inv(ragged(groups(1, 3, size=5)))
    with pytest.raises(InputError, match="numbers a rollout"):
        part(3).inv(ragged([*groups(1, 2), *groups(1, 1, size=5)]))


@parts
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"group_size": 1}, InputError, r"group_size=1: expected at least \d rollouts"),
        ({"group_size": 2.0}, InputTypeError, "group_size=2.0: expected an integer"),
        ({"group_size": 4, "ablate": "frozen"}, InputError, "ablate='frozen': expected None or one of"),
    ],
    ids=str,
)
def test_bad_arguments(
    part: Callable[..., GroupTransform], options: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        part(**options)


@parts
def test_what_waits_is_pickled(part: Callable[..., GroupTransform]) -> None:
    rollouts = groups(1, 3)
    transform = part(3)
    transform.inv(ragged(rollouts[:2]))
    copy = pickle.loads(pickle.dumps(transform))
    assert copy.queued_rollouts == 2
    assert written(copy.inv(ragged(rollouts[2:])), part) == written(transform.inv(ragged(rollouts[2:])), part)


@parts
def test_a_shared_buffer_is_refused(part: Callable[..., GroupTransform]) -> None:
    with pytest.raises(RuntimeError, match="keeps replay-buffer write state"):
        ReplayBuffer(storage=LazyTensorStorage(4), transform=part(3), shared=True)


@parts
def test_what_is_sampled_passes(part: Callable[..., GroupTransform]) -> None:
    batch = ragged(groups(1, 3))
    assert part(3)(batch) is batch
