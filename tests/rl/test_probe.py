"""`linear_probe` and `layer_sweep`: what is there is read, what is not there is not, and test rows stay unseen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden import InputError, InputTypeError
from torchrl_sglang_hidden.rl import effective_rank, layer_sweep, linear_probe, pairwise_cosine, state_variance
from torchrl_sglang_hidden.rl.ridge import Ridge


def normal(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def separable(rows: int = 120, size: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors and three classes, each a cluster."""
    classes = torch.arange(rows) % 3
    return normal(rows, size) + 8 * torch.eye(size)[classes], classes


# --- classes ----------------------------------------------------------------------------------------------------------


def test_separable_classes_beat_the_controls() -> None:
    states, classes = separable()
    found = linear_probe(states, classes)
    assert (found.task, found.score, found.num_train, found.num_test) == ("classification", 1.0, 90, 30)
    assert found.zero_score < 0.5
    assert len(found.shuffle_scores) == 20
    assert max(found.shuffle_scores) < 0.7
    assert found.p_value == pytest.approx(1 / 21)
    assert found.beats_controls


@pytest.mark.parametrize("rows", [200, 40])
def test_classes_that_are_not_there_do_not(rows: int) -> None:
    """With fewer rows than dimensions everything can be learnt by heart."""
    found = linear_probe(normal(rows, 100), torch.arange(rows) % 2)
    assert found.score < 0.75
    assert not found.beats_controls


@pytest.mark.parametrize("kind", [list, torch.Tensor.bool, lambda classes: [f"class {int(one)}" for one in classes]])
def test_classes_of_every_kind(kind: Any) -> None:
    states, classes = separable()
    targets = kind((classes > 0).long()) if kind is not list else (classes > 0).tolist()
    found = linear_probe(states, targets)
    assert (found.task, found.score) == ("classification", 1.0)
    assert found.zero_score == pytest.approx(2 / 3, abs=0.15), "the most frequent class"


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [300, 40])
def test_a_linear_target_is_read(rows: int) -> None:
    states = normal(rows, 60)
    targets = 5 + states[:, :2].sum(-1)
    found = linear_probe(states, targets)
    assert found.task == "regression"
    assert found.score > (0.999 if rows > 60 else 0.1)
    assert found.zero_score == pytest.approx(0, abs=1e-6)
    assert found.beats_controls
    assert linear_probe(states, torch.stack([targets, -targets], -1)).score == pytest.approx(found.score, abs=1e-4)


def test_noise_is_not() -> None:
    found = linear_probe(normal(100, 60), normal(100, 1, seed=5)[:, 0].tolist())
    assert found.score < 0.1
    assert not found.beats_controls


def test_the_ridge_is_the_textbooks() -> None:
    """The prediction solves (XᵀX + α) w = Xᵀy, and the strength is the one whose left-out rows are predicted best."""
    train, test, targets = normal(30, 5), normal(7, 5, seed=1), normal(30, 2, seed=2).double()
    fit = Ridge(train.double()).fit(targets)
    strength, found = fit.strength, fit.predict(test.double())
    mean, deviation = train.double().mean(0), train.double().std(0)
    features, others = (train - mean) / deviation, (test - mean) / deviation
    unit = torch.linalg.svdvals(features).square().mean()

    def predict(features: torch.Tensor, targets: torch.Tensor, others: torch.Tensor, alpha: Any) -> torch.Tensor:
        centre = features.mean(0)
        gram = (features - centre).T @ (features - centre) + alpha * torch.eye(5)
        weights = torch.linalg.solve(gram, (features - centre).T @ (targets - targets.mean(0)))
        return targets.mean(0) + (others - centre) @ weights

    torch.testing.assert_close(found, predict(features, targets, others, strength * unit))
    errors = {}
    for power in range(-6, 4):
        rows = []
        for row in range(30):
            kept = torch.arange(30) != row
            rows.append(targets[row] - predict(features[kept], targets[kept], features[row], 10.0**power * unit))
        errors[10.0**power] = float(torch.stack(rows).square().sum())
    assert strength == min(errors, key=lambda key: errors[key])


# --- the split --------------------------------------------------------------------------------------------------------


def test_rows_of_a_group_stay_together() -> None:
    """Twenty episodes, each with a name of its own that says the target: across them nothing is there to learn."""
    groups = torch.arange(200) // 10
    targets = normal(20, 1, seed=3)[groups, 0]
    states = normal(20, 30, seed=4)[groups] + 0.01 * normal(200, 30)
    assert linear_probe(states, targets).score > 0.95, "neighbours were looked up"
    apart = linear_probe(states, targets, groups=groups)
    assert apart.score < 0.3
    assert (apart.num_train, apart.num_test) == (150, 50)
    assert linear_probe(states, targets, groups=[f"episode {int(one)}" for one in groups]).score == apart.score


def test_the_seed_and_the_part_for_the_test() -> None:
    states, classes = separable()
    found = linear_probe(states, classes, test_fraction=0.5, shuffles=3, seed=1)
    assert (found.num_train, found.num_test, len(found.shuffle_scores)) == (60, 60, 3)
    assert linear_probe(states, classes, test_fraction=0.5, shuffles=3, seed=1) == found
    assert linear_probe(states, classes, test_fraction=0.5, shuffles=3, seed=2).shuffle_scores != found.shuffle_scores


def test_dimensions_that_stand_still_are_no_fault() -> None:
    states, classes = separable()
    still = torch.cat([states, torch.full((120, 5), 3.0)], -1)
    assert linear_probe(still, classes).score == 1.0
    equal = linear_probe(torch.ones(40, 3), torch.arange(40) % 2)
    assert equal.score == equal.zero_score
    assert not equal.beats_controls


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_side_by_side() -> None:
    states, classes = separable()
    stack = torch.stack([normal(120, 10, seed=9), states], 1)
    noise, clear = layer_sweep(stack, (3, -1), classes, shuffles=19)
    assert (noise.layer, clear.layer) == (3, -1)
    assert noise.probe is not None
    assert clear.probe == linear_probe(states, classes, shuffles=19)
    assert clear.probe.score > noise.probe.score
    assert clear.effective_rank == effective_rank(states)
    assert clear.variance == state_variance(states).total
    assert clear.num_active == state_variance(states).num_active
    assert clear.mean_cosine == pairwise_cosine(states).mean
    assert [layer.probe for layer in layer_sweep(stack, (3, -1))] == [None, None]


@pytest.mark.parametrize(
    ("states", "layers", "options", "kind", "words"),
    [
        ([[1.0]], (1,), {}, InputTypeError, "states_NKD: a list; expected"),
        (normal(9, 2), (1,), {}, InputError, r"shape \(9, 2\) and there are 1 layers; expected \[N, K, D\]"),
        (normal(9, 6).reshape(9, 2, 3), (1,), {}, InputError, "there are 1 layers; expected"),
        (normal(9, 6).reshape(9, 2, 3), (1, 2), {"seed": 1}, InputError, r"\['seed'\] without targets: .*pass targets"),
    ],
)
def test_layers_refuse(
    states: Any, layers: tuple[int, ...], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        layer_sweep(states, layers, **options)


# --- errors -----------------------------------------------------------------------------------------------------------

TEN = torch.arange(10)


@pytest.mark.parametrize(
    ("targets", "options", "kind", "words"),
    [
        (TEN[:9], {}, InputError, "9 targets for 10 vectors; pass one for each"),
        (TEN.reshape(5, 2), {}, InputError, r"targets has shape \(5, 2\); expected \[N\], or \[N, M\] of floats"),
        ("abcdefghij", {}, InputTypeError, "targets: a str; expected a tensor, or a list"),
        ([1, "a"] * 5, {}, InputTypeError, r"targets of \['int', 'str'\]; expected bools"),
        ([None] * 10, {}, InputTypeError, r"targets of \['NoneType'\]; expected"),
        ([4] * 10, {}, InputError, r"targets: all are 4; give at least 2 classes"),
        ([1.5] * 10, {}, InputError, r"targets: all are \[1.5\]; give targets that differ"),
        ([1.0] * 9 + [math.nan], {}, InputError, "targets: 1 are not finite; leave their rows out"),
        (TEN % 2, {"groups": [1, 2]}, InputError, "2 groups for 10 vectors; pass one for each"),
        (TEN % 2, {"groups": [7] * 10}, InputError, "all 10 rows are in one group; give at least 2"),
        (TEN % 2, {"test_fraction": 1.0}, InputError, "test_fraction=1.0: expected a number between 0 and 1"),
        (TEN % 2, {"shuffles": 0}, InputError, "shuffles=0: expected an integer"),
    ],
)
def test_refuses(targets: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        linear_probe(normal(10, 3), targets, **options)


def test_refuses_a_training_part_of_one_row() -> None:
    """Which of two groups is the test's depends on the seed."""
    found = set()
    for seed in range(8):
        try:
            found.add(linear_probe(normal(10, 3), TEN % 2, groups=[0, *[1] * 9], seed=seed).num_train)
        except InputError as error:
            found.add(str(error))
    assert found == {9, "groups leave 1 rows for training; needs at least 2: lower test_fraction"}


def test_refuses_few_rows() -> None:
    with pytest.raises(InputError, match=r"states_ND has shape .*N of at least 8"):
        linear_probe(normal(7, 3), torch.arange(7) % 2)
