"""Measures of vectors, on sets whose answers are known, and in pieces as in one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden import InputError, InputTypeError
from torchrl_sglang_hidden.rl import effective_rank, measures, pairwise_cosine, singular_values, state_variance


def normal(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def cross(size: int) -> torch.Tensor:
    """Return an isotropic set around 0: both ends of each axis."""
    return torch.cat([torch.eye(size), -torch.eye(size)])


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(measures, "_BLOCK", 3)


# --- variance ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_pieces")
def test_variance_is_torchs() -> None:
    states = 1000 + normal(50, 7)
    found = state_variance(states)
    torch.testing.assert_close(found.mean_D, states.double().mean(0))
    torch.testing.assert_close(found.variance_D, states.double().var(0))
    assert found.total == pytest.approx(float(states.double().var(0).sum()))


def test_active_dimensions() -> None:
    states = torch.zeros(40, 10)
    states[:, :3] = normal(40, 3)
    states[:, 3] = 0.01 * normal(40, 1)[:, 0]
    assert state_variance(states).num_active == 3
    assert state_variance(states, threshold=1e-5).num_active == 4
    states[:, 0] *= 1000
    found = state_variance(states)
    assert (found.num_active, round(found.largest_share, 3)) == (1, 1.0)


def test_equal_vectors_have_no_active_dimension() -> None:
    found = state_variance(torch.ones(5, 3))
    assert (found.total, found.num_active, found.largest_share) == (0, 0, 0)


# --- effective rank ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("size", [1, 2, 8, 40])
def test_an_isotropic_set_has_the_rank_of_its_space(size: int) -> None:
    assert effective_rank(cross(size)) == pytest.approx(size)
    assert effective_rank(5 + cross(size)) == pytest.approx(size)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(("rows", "size"), [(50, 8), (5, 40), (3000, 64)])
def test_a_line_has_rank_one(rows: int, size: int) -> None:
    line = normal(rows, 1) * normal(1, size, seed=1)
    assert effective_rank(line, centre=False) == pytest.approx(1, abs=1e-4)
    assert effective_rank(100 + line) == pytest.approx(1, abs=1e-3)
    exact = normal(rows, 1).double() * normal(1, size, seed=1).double()
    assert singular_values(exact, centre=False).count_nonzero() == 1


def test_the_definition_of_roy_and_vetterli() -> None:
    """Of singular values 2, 1, 1: the exponential of their entropy 1.5 ln 2."""
    states = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert effective_rank(states, centre=False) == pytest.approx(2**1.5)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(("rows", "size"), [(30, 6), (6, 30)])
@pytest.mark.parametrize("centre", [True, False])
def test_singular_values_are_torchs(rows: int, size: int, centre: bool) -> None:
    states = 3 + normal(rows, size)
    matrix = states.double() - states.double().mean(0) if centre else states.double()
    torch.testing.assert_close(singular_values(states, centre=centre), torch.linalg.svdvals(matrix), atol=1e-7, rtol=0)


def test_equal_vectors_have_rank_zero() -> None:
    assert effective_rank(torch.full((5, 3), 0.1)) == 0
    assert effective_rank(torch.full((5, 3), 0.1), centre=False) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 3), centre=False) == 0


# --- cosines ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_pieces")
def test_cosines_are_those_of_all_pairs() -> None:
    states = normal(11, 4)
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    pairs = (unit @ unit.T)[torch.ones(11, 11, dtype=torch.bool).triu(1)]
    found = pairwise_cosine(states)
    assert found.mean == pytest.approx(float(pairs.mean()))
    assert found.std == pytest.approx(float(pairs.std(correction=0)))
    assert (found.lowest, found.highest) == pytest.approx((float(pairs.min()), float(pairs.max())))
    assert torch.equal(found.counts, torch.histc(pairs, 80, -1, 1).long())
    assert (int(found.counts.sum()), found.num_rows) == (55, 11)


def test_cosines_of_known_sets() -> None:
    same = pairwise_cosine(torch.tensor([[1.0, 2.0]]) * torch.tensor([[1.0], [1e-200], [1e200]], dtype=torch.float64))
    assert (same.mean, same.lowest, same.highest, same.std) == pytest.approx((1, 1, 1, 0), abs=1e-7)
    assert pairwise_cosine(torch.eye(5)).mean == pytest.approx(0)
    opposite = pairwise_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
    assert (opposite.mean, int(opposite.counts[0])) == (-1, 1)


def test_of_many_rows_the_mean_is_exact_and_the_rest_of_some() -> None:
    states = 1 + normal(3000, 5)
    whole, part = pairwise_cosine(states), pairwise_cosine(states, max_rows=200)
    assert part.mean == whole.mean
    assert (part.num_rows, int(part.counts.sum())) == (200, 200 * 199 // 2)
    assert part.std == pytest.approx(whole.std, abs=0.05)
    assert pairwise_cosine(states, max_rows=200).std == part.std, "the same rows each time"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [state_variance, effective_rank, singular_values, pairwise_cosine])
@pytest.mark.parametrize(
    ("states", "kind", "words"),
    [
        ([[1.0]], InputTypeError, "states_ND: a list; expected a floating tensor"),
        (torch.ones(3, 2, dtype=torch.int64), InputTypeError, "states_ND: a torch.int64; expected a floating tensor"),
        (torch.ones(3), InputError, r"shape \(3,\); expected \[N, D\] with N of at least 2"),
        (torch.ones(3, 2, 4), InputError, r"shape \(3, 2, 4\); expected .*choose one of several layers"),
        (torch.ones(1, 4), InputError, "N of at least 2"),
        (torch.ones(3, 0), InputError, r"shape \(3, 0\); expected"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), InputError, "2 of 3 rows are not finite; leave out"),
    ],
)
def test_refuses(measure: Any, states: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        measure(states)


def test_refuses_zeros_and_limits() -> None:
    with pytest.raises(InputError, match="1 rows are all zeros, the first is row 2; leave them out"):
        pairwise_cosine(torch.tensor([[1.0], [2.0], [0.0]]))
    with pytest.raises(InputError, match="max_rows=1: expected"):
        pairwise_cosine(torch.eye(3), max_rows=1)
    with pytest.raises(InputError, match="threshold=0: expected a number above 0"):
        state_variance(torch.eye(3), threshold=0)
