"""Many sets of rows reduced at once, against each of them reduced alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce import bags as bags_module
from torchrl_sglang_hidden.reduce.bags import Bags, separate
from torchrl_sglang_hidden.reduce.reducers import reduce_rows, reducer_of
from torchrl_sglang_hidden.spec.hidden import POOLINGS

N, D = 40, 3


@st.composite
def sets_of_rows(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Draw what requests may want: running values up to some cuts, and spans of several ranges."""
    wanted: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        places = sorted(draw(st.sets(st.integers(0, N), min_size=2, max_size=6)))
        if draw(st.booleans()):
            wanted.append(("running", tuple(places)))
        else:
            places = places[: len(places) // 2 * 2]
            wanted.append(("ranges", tuple(zip(places[::2], places[1::2], strict=True))))
    return wanted


@given(
    wanted=sets_of_rows(),
    pooling=st.sampled_from(POOLINGS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([1, 7, 16, 2048]),
)
def test_all_sets_at_once_are_each_of_them_alone(
    wanted: list[tuple[str, Any]], pooling: Any, dtype: torch.dtype, window: int
) -> None:
    states = [torch.randn(N, D, generator=torch.Generator().manual_seed(layer)).to(dtype) for layer in range(2)]
    copies, reducer = [state_ND.clone() for state_ND in states], reducer_of(pooling)
    bags, expected = Bags(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags_module, "WINDOW", window)
        for kind, places in wanted:
            if kind == "running":
                # Positions of a request whose first row is 0: an offset moves both.
                bags.add_running([place - 5 for place in places], 5)
                expected += [((places[0], stop),) for stop in places[1:]]
            else:
                bags.add(tuple((start - 5, stop - 5) for start, stop in places), 5)
                expected.append(places)
        values_GKD = bags.reduce(states, reducer)
    assert (len(bags), values_GKD.dtype, values_GKD.shape) == (len(expected), torch.float32, (len(expected), 2, D))
    for value_KD, ranges in zip(values_GKD, expected, strict=True):
        alone = [reduce_rows(state_ND, ranges, reducer) for state_ND in states]
        torch.testing.assert_close(value_KD, torch.stack(alone), rtol=1e-6, atol=1e-5)
    assert all(torch.equal(state_ND, copy) for state_ND, copy in zip(states, copies, strict=True))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_result_does_not_alias_the_states(pooling: Any) -> None:
    """They may be a CUDA graph's buffers, which the next step overwrites."""
    state_ND, bags = torch.ones(4, D), Bags()
    bags.add(((1, 2),), 0)
    value_GKD = bags.reduce([state_ND], reducer_of(pooling))
    state_ND.fill_(7)
    assert value_GKD.tolist() == [[[1.0] * D]]


def test_a_nan_wins_every_maximum() -> None:
    state_ND, bags = torch.ones(6, D), Bags()
    state_ND[2, 1] = torch.nan
    bags.add_running((0, 2, 3, 6), 0)
    values_GKD = bags.reduce([state_ND], reducer_of("max"))
    assert values_GKD[:, 0].isnan().tolist() == [[False] * 3, [False, True, False], [False, True, False]]


def test_rows_are_added_in_their_order_with_the_same_bits_every_time() -> None:
    state_ND, bags = torch.randn(1000, D) * 1e4, Bags()
    bags.add_running((0, 64, 500, 1000), 0)
    found = [bags.reduce([state_ND], reducer_of("sum")) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_separate_values_keep_no_other_alive() -> None:
    values = separate(torch.arange(24.0).reshape(4, 2, 3))
    assert [value.tolist() for value in values] == torch.arange(24.0).reshape(4, 2, 3).tolist()
    assert {value.untyped_storage().nbytes() for value in values} == {6 * 4}
