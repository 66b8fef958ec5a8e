"""`state_drift` on sets whose distance is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchrl_sglang_hidden import InputError, InputTypeError
from torchrl_sglang_hidden.rl import state_drift


def normal(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "size"), [(200, 6), (20, 50)])
def test_a_set_has_no_distance_to_itself(rows: int, size: int) -> None:
    states = 100 + normal(rows, size)
    found = state_drift(states, states.clone())
    assert found.mean_shift == 0
    assert found.frechet == pytest.approx(0, abs=1e-8)
    assert found.p_value == 1
    assert found.num_rows == (rows, rows)


@pytest.mark.parametrize(("rows", "size"), [(200, 6), (20, 50)])
def test_a_shifted_set(rows: int, size: int) -> None:
    """The Fréchet distance of a shift is its squared length."""
    states = normal(rows, size)
    shift = torch.zeros(size)
    shift[2] = -3.0
    found = state_drift(states, states + shift)
    assert found.frechet == pytest.approx(9, rel=1e-5)
    dimension, deviations = found.most_shifted
    assert (dimension, deviations) == (2, pytest.approx(-3 / float(states[:, 2].std()), rel=1e-4))
    assert found.mean_shift == pytest.approx(abs(deviations) / size**0.5, rel=1e-4)


@pytest.mark.parametrize(("rows", "size"), [(400, 6), (20, 50)])
def test_a_wider_set(rows: int, size: int) -> None:
    """Twice as wide around the same mean: the trace of the covariance, (2 - 1)² times."""
    states = normal(rows, size)
    states = states - states.mean(0)
    found = state_drift(states, 2 * states)
    assert found.frechet == pytest.approx(float(states.var(0).sum()), rel=1e-5)
    assert found.mean_shift == pytest.approx(0, abs=1e-5)
    assert found.p_value < 0.05


def test_sets_of_one_distribution_and_of_two() -> None:
    reference, same, other = normal(300, 8), normal(300, 8, seed=1), 0.5 + normal(300, 8, seed=1)
    alike, apart = state_drift(reference, same), state_drift(reference, other)
    assert alike.p_value > 0.1
    assert abs(alike.mmd) < 0.01 < apart.mmd
    assert apart.p_value == pytest.approx(1 / 201)
    assert alike.frechet < 3 * alike.frechet_within < apart.frechet
    assert apart.mean_shift == pytest.approx(0.5, abs=0.1)


def test_the_discrepancy_is_the_unbiased_one() -> None:
    """By hand, of three and two numbers."""
    reference, live = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([[2.0], [7.0]])
    both = torch.cat([reference, live]).double()
    squares = (both - both.T).square()
    kernel = torch.exp(-squares / squares[torch.ones(6, 6, dtype=torch.bool).triu(1)].median())
    first = kernel[:4, :4][~torch.eye(4, dtype=torch.bool)].mean()
    second = kernel[4:, 4:][~torch.eye(2, dtype=torch.bool)].mean()
    expected = first + second - 2 * kernel[:4, 4:].mean()
    assert state_drift(reference, live).mmd == pytest.approx(float(expected))


def test_some_rows_of_many() -> None:
    found = state_drift(normal(500, 3), normal(30, 3, seed=1), max_rows=50, permutations=19)
    assert found.num_rows == (50, 30)
    assert found.p_value >= 1 / 20


def test_a_dimension_that_stands_still_is_left_to_frechet() -> None:
    states = normal(50, 4)
    states[:, 1] = 0
    shift = torch.tensor([0.0, 5.0, 0.0, 0.0])
    found = state_drift(states, states + shift)
    assert found.mean_shift == pytest.approx(0, abs=1e-6)
    assert found.frechet == pytest.approx(25, rel=1e-5)


@pytest.mark.parametrize(
    ("reference", "live", "options", "kind", "words"),
    [
        (normal(3, 2), normal(5, 2), {}, InputError, "reference_ND has shape .*N of at least 4"),
        (normal(5, 2), normal(1, 2), {}, InputError, "live_MD has shape .*N of at least 2"),
        (normal(5, 2), normal(5, 3), {}, InputError, "D=2 and live_MD D=3; expected one model's"),
        (torch.ones(5, 2), normal(5, 2), {}, InputError, "reference_ND: all 5 rows are equal; give"),
        (normal(5, 2), [[1.0]], {}, InputTypeError, "live_MD: a list; expected"),
        (normal(5, 2), normal(5, 2), {"max_rows": 1}, InputError, "max_rows=1: expected"),
        (normal(5, 2), normal(5, 2), {"permutations": 0}, InputError, "permutations=0: expected"),
    ],
)
def test_refuses(reference: Any, live: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        state_drift(reference, live, **options)
