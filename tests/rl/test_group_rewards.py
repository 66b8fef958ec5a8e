"""`ExplorationBonus` and `CentroidReward` against plain references in float64, and what becomes of their numbers."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from helpers.group_batches import dense, groups, ragged, return_of, rollout
from helpers.group_references import bonuses, closeness
from tensordict import TensorDictBase

from torchrl_sglang_hidden import InputError, InputTypeError
from torchrl_sglang_hidden.rl import CentroidReward, ExplorationBonus
from torchrl_sglang_hidden.rl.projection import make_sparse_projection

BONUS, CENTROID = "exploration_bonus", "centroid_reward"
Rollouts = list[list[TensorDictBase]]


# --- references -------------------------------------------------------------------------------------------------------


def mean_state(steps: list[TensorDictBase]) -> torch.Tensor:
    """The mean over all tokens of all turns."""
    rows = [
        step["hidden_states", "response"].double().expand(int(step["hidden_states", "response_count"]), -1)
        for step in steps
    ]
    return torch.cat(rows).mean(0)


def numbers(out: TensorDictBase, key: str, write: Rollouts) -> list[float]:
    """What was written for each rollout, in the order of the write."""
    found = {str(step["hidden_states", "response"].tolist()): float(step[key].sum()) for step in out.unbind(0)}
    return [found[str(steps[-1]["hidden_states", "response"].tolist())] for steps in write]


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_bonuses_are_the_references(size: int, ridge: float) -> None:
    write = [rollout("a", turns=1 + seed % 3, seed=seed) for seed in range(size)]
    states = torch.stack([mean_state(steps) for steps in write])
    out = ExplorationBonus(size, project=None, ridge=ridge).inv(ragged(write))
    assert numbers(out, BONUS, write) == pytest.approx(bonuses(states, ridge), rel=1e-5)
    projection = make_sparse_projection(states.shape[1], 4, 0.5)
    assert projection is not None
    out = ExplorationBonus(size, project=4, density=0.5, ridge=ridge).inv(ragged(write))
    assert numbers(out, BONUS, write) == pytest.approx(bonuses(states @ projection.double(), ridge), rel=1e-5)


def test_without_counts_turns_count_alike() -> None:
    write = [rollout("a", turns=2, seed=seed) for seed in range(3)]
    batch = ragged(write)
    del batch["hidden_states", "response_count"]
    states = torch.stack(
        [torch.stack([step["hidden_states", "response"] for step in steps]).double().mean(0) for steps in write]
    )
    found = ExplorationBonus(3, project=None).inv(batch)
    assert numbers(found, BONUS, write) == pytest.approx(bonuses(states, 0.1), rel=1e-5)


def test_counts_of_every_shape_and_of_nothing() -> None:
    write = [rollout("a", turns=2, seed=seed) for seed in range(3)]
    batch = ragged(write)
    expected = ExplorationBonus(3).inv(batch.clone())[BONUS]
    batch["hidden_states", "response_count"] = batch["hidden_states", "response_count"].unsqueeze(-1)
    assert torch.equal(ExplorationBonus(3).inv(batch.clone())[BONUS], expected)
    batch["hidden_states", "response_count"] = 0 * batch["hidden_states", "response_count"]
    with pytest.raises(InputError, match=r"of 'a': counts of \[0.0, 0.0\] states, whose mean is none; leave"):
        ExplorationBonus(3).inv(batch)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(("part", "key"), [(ExplorationBonus, BONUS), (CentroidReward, CENTROID)])
def test_the_length_of_a_models_states_does_not_matter(part: Any, key: str, scale: float) -> None:
    write = groups(1, 5)
    longer = [[step.clone() for step in steps] for steps in write]
    for steps in longer:
        steps[0]["hidden_states", "response"] *= scale
    found = numbers(part(5).inv(ragged(longer)), key, longer)
    assert found == pytest.approx(numbers(part(5).inv(ragged(write)), key, write), rel=1e-4)


@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_centroid_rewards_are_the_references(size: int, iterations: int) -> None:
    # Several turns: the last state counts alone.
    write = [rollout("a", turns=1 + seed % 3, seed=seed) for seed in range(size)]
    states = torch.stack([steps[-1]["hidden_states", "response"] for steps in write])
    out = CentroidReward(size, iterations=iterations, bandwidth=0.7).inv(ragged(write))
    assert numbers(out, CENTROID, write) == pytest.approx(closeness(states, iterations, 0.7), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_every_dtype(dtype: torch.dtype) -> None:
    write = groups(1, 5, dtype=dtype)
    states = torch.stack([steps[0]["hidden_states", "response"] for steps in write])
    bonus = ExplorationBonus(5, project=None).inv(dense(write))
    assert bonus[BONUS].dtype == torch.float32
    assert numbers(bonus, BONUS, write) == pytest.approx(bonuses(states, 0.1), rel=1e-5)
    reward = CentroidReward(5).inv(dense(write))
    assert numbers(reward, CENTROID, write) == pytest.approx(closeness(states, 10, 1.0), rel=1e-4)


# --- what they mean ---------------------------------------------------------------------------------------------------


def planted(outliers: int, seed: int) -> Rollouts:
    """Seven rollouts that end alike, but for some that end elsewhere, each somewhere else."""
    write = groups(1, 7, seed=seed)
    for number, steps in enumerate(write):
        noise = torch.randn(6) * 0.1
        state = 3 * torch.eye(6)[1 + number % 5] if number < outliers else 3 * torch.eye(6)[0]
        steps[0]["hidden_states", "response"] = state + noise
    return write


def test_the_outlier_has_the_largest_bonus_and_the_least_reward() -> None:
    for seed in range(5):
        write = planted(1, seed)
        bonus = numbers(ExplorationBonus(7).inv(ragged(write)), BONUS, write)
        assert bonus[0] == max(bonus)
        reward = numbers(CentroidReward(7).inv(ragged(write)), CENTROID, write)
        assert reward[0] == min(reward) < 0.01


def test_iterations_make_the_centroid_robust() -> None:
    """With three of seven elsewhere, the distances within the majority shrink against those of the others."""
    for seed in range(5):
        write = planted(3, seed)
        plain, robust = (
            numbers(CentroidReward(7, iterations=count).inv(ragged(write)), CENTROID, write) for count in (0, 10)
        )
        assert min(plain[3:]) / max(plain[:3]) < min(robust[3:]) / max(max(robust[:3]), 1e-12)


def test_equal_states_are_told_apart_by_nothing() -> None:
    write = [rollout("a", seed=0) for _ in range(4)]
    noise = [torch.randn(6) * 1e-6 for _ in range(4)]
    for steps, little in zip(write, noise, strict=True):
        steps[0]["hidden_states", "response"] += little
    assert numbers(CentroidReward(4).inv(ragged(write)), CENTROID, write) == pytest.approx([1] * 4, abs=1e-3)
    bonus = numbers(ExplorationBonus(4).inv(ragged(write)), BONUS, write)
    same = [rollout("a", seed=0) for _ in range(4)]
    assert numbers(ExplorationBonus(4).inv(ragged(same)), BONUS, same) == [0] * 4
    assert max(bonus) < 0.05


def test_a_tiny_ridge_says_nothing() -> None:
    """What the docstring warns of: with more dimensions than rollouts every bonus nears sqrt(G - 1)."""
    write = groups(1, 5)
    found = numbers(ExplorationBonus(5, project=None, ridge=1e-9).inv(ragged(write)), BONUS, write)
    assert found == pytest.approx([2] * 5, rel=1e-3)


def test_the_projection_keeps_lengths_and_has_its_density() -> None:
    for density, expected in ((None, 0.05), (1 / 3, 1 / 3)):
        matrix = make_sparse_projection(400, 200, density)
        assert matrix is not None
        assert float((matrix != 0).double().mean()) == pytest.approx(expected, rel=0.1)
        assert len(matrix.unique()) == 3
        vector = torch.randn(400)
        assert float((vector @ matrix).norm() / vector.norm()) == pytest.approx(1, abs=0.2)
        assert torch.equal(matrix, make_sparse_projection(400, 200, density))  # type: ignore[arg-type]


# --- what becomes of the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "key"), [(ExplorationBonus, BONUS), (CentroidReward, CENTROID)])
@pytest.mark.parametrize("combine", ["add", "replace", None])
def test_rewards(part: Any, key: str, combine: Any) -> None:
    write = [rollout("a", turns=2, seed=seed) for seed in range(3)]
    out = part(3, combine=combine, scale=2.0).inv(ragged(write))
    rewards, scores = out["next", "reward"].reshape(3, 2), out[key].reshape(3, 2)
    before = torch.tensor([[float(step["next", "reward"]) for step in steps] for steps in write])
    assert torch.equal(scores[:, 0], scores[:, 1])
    last = {"add": before[:, 1] + 2 * scores[:, 1], "replace": 2 * scores[:, 1], None: before[:, 1]}[combine]
    first = torch.zeros(3) if combine == "replace" else before[:, 0]
    torch.testing.assert_close(rewards, torch.stack([first, last], 1))


@pytest.mark.parametrize(("part", "key"), [(ExplorationBonus, BONUS), (CentroidReward, CENTROID)])
def test_ablations(part: Any, key: str) -> None:
    write = groups(1, 5)
    own = numbers(part(5).inv(ragged(write)), key, write)
    assert numbers(part(5, ablate="zero").inv(ragged(write)), key, write) == [0] * 5
    shuffle = part(5, ablate="shuffle")
    orders = set()
    for _ in range(20):
        found = numbers(pickle.loads(pickle.dumps(shuffle)).inv(ragged(write)), key, write)
        assert found == numbers(shuffle.inv(ragged(write)), key, write), "pickled with its generator"
        assert sorted(found) == sorted(own)
        assert all(one != other for one, other in zip(found, own, strict=True))
        orders.add(tuple(found))
    assert len(orders) == 4


def test_returns_are_of_the_rewards_that_are_there() -> None:
    write = [rollout("a", turns=2, seed=seed) for seed in range(3)]
    out = ExplorationBonus(3, scale=0.5).inv(ragged(write))
    summed = out["next", "reward"].reshape(3, 2).sum(-1).tolist()
    bonus = numbers(out, BONUS, write)
    expected = [return_of(steps) + 0.5 * one for steps, one in zip(write, bonus, strict=True)]
    assert summed == pytest.approx(expected)


def test_a_state_of_zeros_has_no_direction() -> None:
    batch = ragged(groups(1, 3))
    batch[1]["hidden_states", "response"].zero_()
    with pytest.raises(InputError, match="all zeros, and has no direction; leave"):
        CentroidReward(3).inv(batch)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: ExplorationBonus(2), InputError, "group_size=2: expected at least 3.*opposites"),
        (lambda: CentroidReward(2), InputError, "group_size=2: expected at least 3.*equally near"),
        (lambda: ExplorationBonus(4, ridge=0), InputError, "ridge=0: expected a finite number above 0"),
        (lambda: ExplorationBonus(4, scale="1"), InputTypeError, "scale='1': expected a number"),  # type: ignore[arg-type]
        (lambda: ExplorationBonus(4, project=0), InputError, "project=0: expected an integer of at least 1"),
        (lambda: ExplorationBonus(4, project=2.0), InputTypeError, "project=2.0"),  # type: ignore[arg-type]
        (lambda: ExplorationBonus(4, density=1.5), InputError, "density=1.5: expected a number above 0 and at most 1"),
        (lambda: ExplorationBonus(4, density="a"), InputTypeError, "density='a'"),  # type: ignore[arg-type]
        (lambda: CentroidReward(4, combine="mix"), InputError, "combine='mix': expected None or one of"),  # type: ignore[arg-type]
        (lambda: CentroidReward(4, iterations=-1), InputError, "iterations=-1: expected an integer of at least 0"),
        (lambda: CentroidReward(4, iterations=1.5), InputTypeError, "iterations=1.5"),  # type: ignore[arg-type]
        (lambda: CentroidReward(4, bandwidth=math.inf), InputError, "bandwidth=inf: expected a finite number"),
    ],
)
def test_bad_arguments(make: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()
