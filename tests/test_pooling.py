"""Pooling against plain torch, over every way in which an engine may cut a request into pieces."""

from __future__ import annotations

from itertools import chain, combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorder import feed, pooled_D

from torchrl_sglang_hidden.pooling import RequestPools, reduce_rows
from torchrl_sglang_hidden.specs import POOLINGS, SEGMENTS, Pooling, Segment, rows_expected

D = 4
SUBSETS = [*chain.from_iterable(combinations(SEGMENTS, size) for size in (1, 2, 3))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hidden_of(num_rows: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prefill(pools: RequestPools, hidden_ND: torch.Tensor, start: int, stop: int) -> None:
    """One forward step over the positions ``start … stop-1``, as the server half sees it."""
    span = pools.prompt_span(start, stop)
    if span is not None:
        pools.add_prompt(reduce_rows(hidden_ND[start:stop], span[0] - start, span[1] - start, pools.pooling), *span)


def produce(pools: RequestPools, hidden_ND: torch.Tensor, index: int) -> None:
    position = pools.num_prompt - 1 + index
    pools.add_produced(reduce_rows(hidden_ND, position, position + 1, pools.pooling), index)


def assert_pooled(pools: RequestPools, hidden_ND: torch.Tensor, num_response: int) -> None:
    results = pools.results()
    assert tuple(results) == pools.segments
    for segment, (vector_D, count) in results.items():
        assert count == rows_expected(segment, pools.num_prompt, num_response), segment
        assert vector_D is not None
        assert vector_D.dtype == torch.float32
        expected_D = pooled_D(hidden_ND, segment, pools.pooling, pools.num_prompt)
        torch.testing.assert_close(vector_D.double(), expected_D, rtol=1e-5, atol=1e-6)


def counts(pools: RequestPools) -> dict[Segment, int]:
    return {segment: count for segment, (_, count) in pools.results().items()}


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Any split of ``0 … length`` into pieces."""
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    return list(pairwise([0, *sorted(inner), length]))


@st.composite
def requests(draw: st.DrawFn) -> tuple[RequestPools, torch.Tensor, int]:
    """Pools, the states of a request, and T."""
    num_prompt, num_response = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    pools = RequestPools(draw(st.sampled_from(SUBSETS)), draw(st.sampled_from(POOLINGS)), num_prompt)
    rows = num_prompt + num_response - 1
    hidden_ND = hidden_of(rows, draw(st.integers(0, 99)), draw(st.sampled_from(DTYPES)))
    return pools, hidden_ND, num_response


@given(case=requests(), data=st.data())
def test_any_chunking_of_the_prompt(case: Any, data: st.DataObject) -> None:
    pools, hidden_ND, num_response = case
    for start, stop in data.draw(cuts(pools.num_prompt)):
        prefill(pools, hidden_ND, start, stop)
    for index in range(num_response):
        produce(pools, hidden_ND, index)
    assert_pooled(pools, hidden_ND, num_response)


@given(case=requests(), data=st.data())
def test_a_restart_in_the_middle_of_the_prompt(case: Any, data: st.DataObject) -> None:
    pools, hidden_ND, num_response = case
    chunks = data.draw(cuts(pools.num_prompt))
    for start, stop in chunks[: data.draw(st.integers(0, len(chunks) - 1))]:
        prefill(pools, hidden_ND, start, stop)
    for start, stop in data.draw(cuts(pools.num_prompt)):
        prefill(pools, hidden_ND, start, stop)
    for index in range(num_response):
        produce(pools, hidden_ND, index)
    assert_pooled(pools, hidden_ND, num_response)


@given(case=requests(), data=st.data())
def test_a_repetition_after_a_retraction(case: Any, data: st.DataObject) -> None:
    """After k tokens the request is computed again from 0, or from any position that the cache still has."""
    pools, hidden_ND, num_response = case
    prefill(pools, hidden_ND, 0, pools.num_prompt)
    done = data.draw(st.integers(1, num_response))
    for index in range(done):
        produce(pools, hidden_ND, index)
    if done < num_response:
        length = pools.num_prompt + done
        cached = data.draw(st.integers(0, length - 1))
        for start, stop in data.draw(cuts(length)):
            if stop > cached:
                prefill(pools, hidden_ND, max(start, cached), stop)
        for index in range(done, num_response):
            produce(pools, hidden_ND, index)
    assert_pooled(pools, hidden_ND, num_response)


@given(num_prompt=st.integers(2, 12), num_response=st.integers(1, 4), segments=st.sampled_from(SUBSETS), data=st.data())
def test_a_gap_in_the_prompt_leaves_the_count_short(
    num_prompt: int, num_response: int, segments: Any, data: st.DataObject
) -> None:
    """A skipped chunk, the first of them when the prefix cache had it."""
    pools, hidden_ND = RequestPools(segments, "mean", num_prompt), hidden_of(num_prompt + num_response - 1, 0)
    chunks = data.draw(cuts(num_prompt).filter(lambda chunks: len(chunks) > 1))
    skipped = data.draw(st.integers(0, len(chunks) - 1))
    for number, (start, stop) in enumerate(chunks):
        if number != skipped:
            prefill(pools, hidden_ND, start, stop)
    for index in range(num_response):
        produce(pools, hidden_ND, index)
    for segment, count in counts(pools).items():
        expected = rows_expected(segment, num_prompt, num_response)
        assert count == expected if segment == "response" else count < expected


def test_a_piece_that_comes_twice_does_not_fill_a_gap() -> None:
    """The count would be right and the mean wrong."""
    pools, hidden_ND = RequestPools(("prompt", "full"), "mean", 6), hidden_of(6, 0)
    for start, stop in ((0, 2), (4, 6), (4, 6)):
        prefill(pools, hidden_ND, start, stop)
    assert counts(pools) == {"prompt": 2, "full": 2}


@given(case=requests(), data=st.data())
def test_a_lost_decode_row_leaves_the_count_short(case: Any, data: st.DataObject) -> None:
    pools, hidden_ND, num_response = case
    lost = data.draw(st.integers(0, num_response - 1))
    prefill(pools, hidden_ND, 0, pools.num_prompt)
    for index in range(num_response):
        if index != lost:
            produce(pools, hidden_ND, index)
    found = counts(pools)
    if "response" in found:
        assert found["response"] < num_response
    # The mean holds token 0's row as the prompt's last; "last" needs no row but the last.
    needed = range(1, num_response) if pools.pooling == "mean" else [num_response - 1]
    if "full" in found:
        assert (found["full"] < rows_expected("full", pools.num_prompt, num_response)) is (lost in needed)


@given(case=requests())
def test_a_row_that_comes_twice_counts_once(case: Any) -> None:
    pools, hidden_ND, num_response = case
    prefill(pools, hidden_ND, 0, pools.num_prompt)
    for index in range(num_response):
        produce(pools, hidden_ND, index)
        produce(pools, hidden_ND, index)
    assert_pooled(pools, hidden_ND, num_response)


@pytest.mark.parametrize("segments", SUBSETS, ids="+".join)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_segments_do_not_change_one_another(segments: Any, pooling: Pooling) -> None:
    hidden_ND = hidden_of(9, 3)
    pools = RequestPools(segments, pooling, 6)
    feed(pools, hidden_ND)
    assert_pooled(pools, hidden_ND, 4)


@pytest.mark.parametrize("segments", SUBSETS, ids="+".join)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_row_is_no_vector(segments: Any, pooling: Pooling) -> None:
    assert RequestPools(segments, pooling, 5).results() == dict.fromkeys(segments, (None, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    """4096 ones and a half each: a sum in a half dtype stops growing at 256 (bfloat16) or 2048 (float16)."""
    hidden_ND = torch.full((4096, D), 1.5, dtype=dtype)
    total_D = reduce_rows(hidden_ND, 0, 4096, "mean")
    assert total_D.dtype == torch.float32
    assert total_D.tolist() == [6144.0] * D
    pools = RequestPools(("response",), "mean", 1)
    for index in range(4096):
        produce(pools, hidden_ND, index)
    vector_D, count = pools.results()["response"]
    assert (count, vector_D.tolist()) == (4096, [1.5] * D)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 3), (1, 4), (0, 4)])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reduced_row_does_not_alias_its_input(start: int, stop: int, pooling: Pooling, dtype: torch.dtype) -> None:
    """The input may be a CUDA graph's static buffer, which the next step overwrites."""
    hidden_ND = hidden_of(4, 5, dtype)
    part_ND = hidden_ND[start:stop].double()
    expected_D = part_ND[-1] if pooling == "last" else part_ND.sum(0)
    row_D = reduce_rows(hidden_ND, start, stop, pooling)
    hidden_ND.fill_(7)
    torch.testing.assert_close(row_D.double(), expected_D, rtol=1e-5, atol=1e-6)


@given(case=requests())
def test_results_may_be_read_at_any_time(case: Any) -> None:
    pools, hidden_ND, num_response = case
    pools.results()
    prefill(pools, hidden_ND, 0, pools.num_prompt)
    for index in range(num_response):
        produce(pools, hidden_ND, index)
        assert_pooled(pools, hidden_ND[: pools.num_prompt + index], index + 1)
        earlier = {segment: vector_D.clone() for segment, (vector_D, _) in pools.results().items()}
        for segment, (vector_D, _) in pools.results().items():
            assert torch.equal(vector_D, earlier[segment])


@pytest.mark.parametrize(
    ("segments", "pooling", "whole_prompt"),
    [
        (("response",), "mean", False),
        (("prompt",), "mean", True),
        (("full",), "mean", True),
        (SEGMENTS, "mean", True),
        (SEGMENTS, "last", False),
    ],
)
def test_a_prefix_cache_hit_matters_until_the_prompt_is_in(segments: Any, pooling: Any, whole_prompt: bool) -> None:
    pools, hidden_ND = RequestPools(segments, pooling, 6), hidden_of(6, 0)
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        assert pools.needs_uncached_prompt is whole_prompt
        prefill(pools, hidden_ND, start, stop)
    assert not pools.needs_uncached_prompt


@pytest.mark.parametrize(
    ("segments", "pooling", "step", "span"),
    [
        (("prompt",), "mean", (0, 4), (0, 4)),
        (("prompt",), "mean", (2, 9), (2, 6)),
        (("prompt",), "mean", (6, 9), None),
        (("prompt",), "last", (0, 4), None),
        (("prompt",), "last", (4, 9), (5, 6)),
        (("full",), "last", (0, 6), None),
        (("response",), "mean", (0, 6), None),
    ],
)
def test_which_rows_of_a_step_are_prompt_rows(segments: Any, pooling: Any, step: Any, span: Any) -> None:
    assert RequestPools(segments, pooling, 6).prompt_span(*step) == span
