"""Pooling against plain torch in float64, over every way in which an engine may cut a request into pieces."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.fake_heads import feed
from helpers.reference_pooling import (
    DTYPES,
    SUBSETS,
    Case,
    assert_pools,
    assert_value,
    decode,
    expected_count,
    token_places,
    wanted_of,
)
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.host_pools import HostPools
from torchrl_sglang_hidden.reduce.pooling import Pools
from torchrl_sglang_hidden.reduce.reducers import Sum, reduce_rows
from torchrl_sglang_hidden.reduce.wanted import BLOCK, PromptStep, Wanted
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, ResolvedSpan

D = 4


def hidden_of(num_rows: int, num_layers: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_rows, num_layers, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pools_for(case: Case) -> HostPools:
    return HostPools(case.wanted, case.num_prompt)


def finish(case: Case, pools: HostPools) -> Pools:
    return pools.results(case.response_ids, decode)


def running(wanted: Wanted, rows_NKD: torch.Tensor) -> torch.Tensor:
    """What is kept of the beginning of a prompt."""
    if wanted.pooling == "max" and len(rows_NKD):
        return rows_NKD.max(0).values
    return rows_NKD.sum(0)


def prefill(pools: HostPools, hidden_NKD: torch.Tensor, start: int, stop: int, base: bool = False) -> Any:
    """Run one forward step over the positions ``start … stop-1``, without rows of other requests."""
    step = pools.plan_prompt(start, stop, running(pools.wanted, hidden_NKD[:start].float()) if base else None)
    if step is not None:
        computed = torch.full_like(hidden_NKD, torch.nan)
        computed[start:stop] = hidden_NKD[start:stop]
        add(pools, step, computed)
    return step


def add(pools: HostPools, step: PromptStep, rows_NKD: torch.Tensor) -> None:
    pools.add_rows(step, rows_NKD)


def produce(pools: HostPools, hidden_NKD: torch.Tensor, index: int) -> None:
    pools.add_produced(hidden_NKD[pools.num_prompt - 1 + index].float(), index)


def assert_complete(case: Case, pools: HostPools) -> None:
    assert_pools(case, finish(case, pools))
    assert_sums(case, pools)


def assert_sums(case: Case, pools: HostPools) -> None:
    for length, sum_KD in pools.sums:
        expected_KD = running(case.wanted, case.hidden_NKD[:length].double())
        torch.testing.assert_close(sum_KD.double(), expected_KD, rtol=1e-5, atol=1e-4)


@st.composite
def cuts(draw: st.DrawFn, start: int, stop: int) -> list[tuple[int, int]]:
    """Draw a split of ``start … stop`` into pieces."""
    inner = draw(st.sets(st.integers(start + 1, stop - 1), max_size=8)) if stop - start > 1 else set()
    return list(pairwise([start, *sorted(inner), stop]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_prompt = draw(st.integers(1, 12) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]))
    response_ids = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
    wanted = draw(wanted_of(num_prompt))
    num_rows = num_prompt + len(response_ids) - 1
    states = hidden_of(num_rows, len(wanted.layers), draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES)))
    return Case(wanted, num_prompt, response_ids, states)


def case_of(
    segments: Any = SEGMENTS, pooling: Any = "mean", num_prompt: int = 6, text: str = "abab", **more: Any
) -> Case:
    wanted = Wanted(segments, pooling, **more)
    ids = tuple(map("ab|".index, text))
    return Case(wanted, num_prompt, ids, hidden_of(num_prompt + len(ids) - 1, len(wanted.layers), 3))


# --- pieces -----------------------------------------------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_any_chunking_of_the_prompt(case: Case, data: st.DataObject) -> None:
    pools = pools_for(case)
    for start, stop in data.draw(cuts(0, case.num_prompt)):
        prefill(pools, case.hidden_NKD, start, stop)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@given(case=cases(), data=st.data())
def test_chunks_may_be_planned_before_the_last_ones_have_arrived(case: Case, data: st.DataObject) -> None:
    """Overlap scheduling launches a step before the results of the one before it are read."""
    pools = pools_for(case)
    steps = [pools.plan_prompt(start, stop) for start, stop in data.draw(cuts(0, case.num_prompt))]
    for step in steps:
        if step is not None:
            add(pools, step, case.hidden_NKD)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@given(case=cases(), data=st.data())
def test_a_restart_in_the_middle_of_the_prompt(case: Case, data: st.DataObject) -> None:
    """The request computes it again from 0, or from any position that the cache still has of its own rows."""
    pools = pools_for(case)
    chunks = data.draw(cuts(0, case.num_prompt))
    done = 0
    for start, stop in chunks[: data.draw(st.integers(0, len(chunks) - 1))]:
        prefill(pools, case.hidden_NKD, start, stop)
        done = stop
    if data.draw(st.booleans()):
        pools.plan_prompt(done, case.num_prompt)  # planned, and never run
    pools.restart()
    for start, stop in data.draw(cuts(data.draw(st.integers(0, done)), case.num_prompt)):
        prefill(pools, case.hidden_NKD, start, stop)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@given(case=cases(), data=st.data())
def test_a_repetition_after_a_retraction(case: Case, data: st.DataObject) -> None:
    """After k tokens the request is computed again from 0, or from any position that the cache still has."""
    pools = pools_for(case)
    prefill(pools, case.hidden_NKD, 0, case.num_prompt)
    done = data.draw(st.integers(1, case.num_response))
    for index in range(done):
        produce(pools, case.hidden_NKD, index)
    if done < case.num_response:
        pools.restart()
        length = case.num_prompt + done
        for start, stop in data.draw(cuts(data.draw(st.integers(0, length - 1)), length)):
            prefill(pools, case.hidden_NKD, start, stop)
        for index in range(done, case.num_response):
            produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@given(case=cases(), data=st.data())
def test_whatever_comes_a_full_count_has_the_right_value(case: Case, data: st.DataObject) -> None:
    """Chunks are lost, doubled, out of order and after prefix hits; sums are there or not; produced rows are lost."""
    pools = pools_for(case)
    for _ in range(data.draw(st.integers(0, 6))):
        if data.draw(st.booleans()):
            pools.restart()
        start = data.draw(st.integers(0, case.num_prompt - 1))
        stop = data.draw(st.integers(start + 1, case.num_prompt))
        step = pools.plan_prompt(
            start, stop, running(case.wanted, case.hidden_NKD[:start].float()) if data.draw(st.booleans()) else None
        )
        if step is not None and data.draw(st.integers(0, 3)):
            add(pools, step, case.hidden_NKD)
    for index in data.draw(st.lists(st.integers(0, case.num_response - 1), max_size=8)):
        produce(pools, case.hidden_NKD, index)
    found = finish(case, pools)
    for what, (value, count) in {**found.segments, **found.spans}.items():
        # No value is refused whatever its count.
        if value is not None:
            assert count <= expected_count(case, what), what
            if count == expected_count(case, what):
                assert_value(case, what, value)
    if found.rows is not None:
        first, stop = found.rows.first, found.rows.first + len(found.rows.rows_NKD)
        if (first, stop) == token_places(case):
            assert torch.equal(found.rows.rows_NKD, case.hidden_NKD[first:stop].to(case.wanted.row_dtype))
    assert_sums(case, pools)


@given(case=cases(), data=st.data())
def test_a_gap_in_the_prompt_leaves_the_count_short(case: Case, data: st.DataObject) -> None:
    """A skipped chunk, the first of them when the prefix cache had it: what needs its rows comes back short.

    So it does where the chunk was planned, and its rows were not what they should have been.
    """
    pools = pools_for(case)
    chunks = data.draw(cuts(0, case.num_prompt))
    skipped = data.draw(st.sampled_from(chunks))
    planned = data.draw(st.booleans())
    for start, stop in chunks:
        if (start, stop) != skipped:
            prefill(pools, case.hidden_NKD, start, stop)
        elif planned:
            pools.plan_prompt(start, stop)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    found, lost = finish(case, pools), set(range(*skipped))
    if case.wanted.pools_prefix:
        for segment in {"prompt", "full"} & set(case.wanted.segments):
            assert found.segments[segment][1] < expected_count(case, segment)
    for name, span in case.wanted.spans.items():
        if isinstance(span, PromptSpan):
            places = {place for start, stop in span.intervals for place in range(start, stop)}
            needed = {max(places)} if case.wanted.pooling == "last" else places
            if needed & lost:
                assert found.spans[name][1] < span.count
    if case.wanted.prompt_rows:
        rows = 0 if found.rows is None else len(found.rows.rows_NKD)
        assert rows < token_places(case)[1]


def test_a_piece_that_comes_twice_does_not_fill_a_gap() -> None:
    """The count would be right and the mean wrong."""
    case = case_of(("prompt", "full"), tokens=True)
    pools = pools_for(case)
    for start, stop in ((0, 2), (4, 6), (4, 6)):
        prefill(pools, case.hidden_NKD, start, stop)
    found = pools.results(())
    assert found.segments == {"prompt": (None, 2), "full": (found.segments["full"][0], 2)}
    assert len(found.rows.rows_NKD) == 2


@given(case=cases(), data=st.data())
def test_a_lost_produced_row_leaves_the_count_short(case: Case, data: st.DataObject) -> None:
    pools = pools_for(case)
    lost = data.draw(st.integers(0, case.num_response - 1))
    prefill(pools, case.hidden_NKD, 0, case.num_prompt)
    for index in range(case.num_response):
        if index != lost:
            produce(pools, case.hidden_NKD, index)
    found = finish(case, pools)
    short = {what: count < expected_count(case, what) for what, (_, count) in {**found.segments, **found.spans}.items()}
    for what, is_short in short.items():
        if what == "full" and case.wanted.pools_prefix:
            # Token 0's row is the prompt's last, which came with the prompt. Those behind a lost row do not count.
            assert is_short is (case.num_response > 1)
        elif what in ("response", "full"):
            assert is_short
        elif what == "prompt" or isinstance(case.wanted.spans.get(what), PromptSpan):
            assert not is_short
        else:
            assert found.spans[what] == (None, lost)
    if case.wanted.response_rows:
        rows = 0 if found.rows is None else len(found.rows.rows_NKD)
        first, stop = token_places(case)
        # Token 0's row is the prompt's last where both are wanted; behind it the rows must go on without a hole.
        assert rows < stop - first or (case.wanted.prompt_rows and case.num_response == 1)


@given(case=cases())
def test_a_row_that_comes_twice_counts_once(case: Case) -> None:
    pools = pools_for(case)
    for _ in range(2):
        prefill(pools, case.hidden_NKD, 0, case.num_prompt)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@pytest.mark.parametrize("segments", SUBSETS, ids="+".join)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens", [False, True])
def test_segments_do_not_change_one_another(segments: Any, pooling: Any, tokens: bool) -> None:
    case = case_of(segments, pooling, tokens=tokens, layers=(0, -1))
    pools = pools_for(case)
    feed(pools, case.hidden_NKD)
    assert_complete(case, pools)


@pytest.mark.parametrize("segments", SUBSETS, ids="+".join)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_row_is_no_vector(segments: Any, pooling: Any) -> None:
    spans = {"p": PromptSpan(((1, 3),)), "r": LastTokens(1)}
    found = pools_for(case_of(segments, pooling, spans=spans, tokens=True)).finish((1, 2))
    assert found == Pools(dict.fromkeys(segments, (None, 0)), dict.fromkeys(spans, (None, 0)), {}, None)


@given(case=cases())
def test_results_may_be_read_at_any_time(case: Case) -> None:
    pools = pools_for(case)
    pools.results(())
    prefill(pools, case.hidden_NKD, 0, case.num_prompt)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
        so_far = Case(
            case.wanted,
            case.num_prompt,
            case.response_ids[: index + 1],
            case.hidden_NKD[: case.num_prompt + index],
        )
        assert_complete(so_far, pools)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    """4096 ones and a half each: a sum in a half dtype stops growing at 256 (bfloat16) or 2048 (float16)."""
    rows_ND = torch.full((4096, D), 1.5, dtype=dtype)
    for ranges in (((0, 4096),), ((0, 1000), (1000, 4096))):
        total_D = reduce_rows(rows_ND, ranges, Sum())
        assert total_D.dtype == torch.float32
        assert total_D.tolist() == [6144.0] * D
    pools = HostPools(Wanted(("response",)), 1)
    for index in range(4096):
        produce(pools, rows_ND[:, None], index)
    value_KD, count = pools.results([0] * 4096).segments["response"]
    assert (count, value_KD.tolist()) == (4096, [[1.5] * D])


@pytest.mark.parametrize("ranges", [((0, 1),), ((2, 3),), ((1, 4),), ((0, 4),), ((0, 1), (3, 4)), ((0, 2), (3, 4))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_does_not_alias_its_input(ranges: Any, dtype: torch.dtype) -> None:
    """The input may be a CUDA graph's static buffer, which the next step overwrites."""
    rows_ND = hidden_of(4, seed=5, dtype=dtype)[:, 0]
    expected_D = sum(rows_ND[start:stop].double().sum(0) for start, stop in ranges)
    row_D = reduce_rows(rows_ND, ranges, Sum())
    rows_ND.fill_(7)
    torch.testing.assert_close(row_D.double(), expected_D, rtol=1e-5, atol=1e-6)


def test_kept_sums_are_not_written_to_later() -> None:
    """Other requests use them while this one adds to its own sum."""
    case = case_of(("prompt", "full"), num_prompt=BLOCK + 2)
    pools = pools_for(case)
    prefill(pools, case.hidden_NKD, 0, BLOCK)
    kept = [(length, sum_KD, sum_KD.clone()) for length, sum_KD in pools.sums]
    assert [length for length, _, _ in kept] == [BLOCK]
    prefill(pools, case.hidden_NKD, BLOCK, BLOCK + 2)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    finish(case, pools)
    assert all(torch.equal(sum_KD, before) for _, sum_KD, before in kept)


# --- a step's plan ----------------------------------------------------------------------------------------------------

MASK = PromptSpan(((1, 3), (4, 5)))


@pytest.mark.parametrize(
    ("wanted", "step", "groups", "rows"),
    [
        (Wanted(("prompt",)), (0, 4), [((0, 4),)], None),
        (Wanted(("prompt",)), (0, 9), [((0, 5),), ((0, 6),)], None),  # equal prompts meet before the last token
        (Wanted(("full",)), (0, 6), [((0, 5),), ((0, 6),)], None),
        (Wanted(("prompt",), "last"), (0, 6), [((5, 6),)], None),
        (Wanted(("prompt",), "last"), (0, 5), [], None),
        (Wanted(("prompt",), "max"), (0, 9), [((0, 5),), ((0, 6),)], None),
        (Wanted((), "max", spans={"m": MASK}), (0, 6), [((1, 3), (4, 5))], None),
        (Wanted((), "mean", spans={"m": MASK}), (0, 6), [((1, 3), (4, 5))], None),
        (Wanted((), "mean", spans={"m": MASK}), (0, 2), [((1, 2),)], None),
        (Wanted((), "last", spans={"m": MASK}), (0, 6), [((4, 5),)], None),
        (Wanted(("prompt",), "mean", spans={"m": MASK}), (0, 3), [((0, 3),), ((1, 3),)], None),
        (Wanted(("prompt",), None, tokens=True), (0, 4), [], (0, 4)),
        (Wanted(("full",), "last", tokens=True), (0, 9), [], (0, 6)),
    ],
)
def test_what_is_reduced_of_a_step(wanted: Wanted, step: Any, groups: Any, rows: Any) -> None:
    planned = HostPools(wanted, 6).plan_prompt(*step)
    assert (planned.groups, planned.rows) == (groups, rows)


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(("response",)),
        Wanted(("full",), "last"),
        Wanted(("response",), None, tokens=True),
        Wanted((), spans={"a": LastTokens(2), "b": Between("|", None)}),
    ],
)
def test_nothing_of_the_prompt_is_waited_for_where_nothing_of_it_is_wanted(wanted: Wanted) -> None:
    pools = HostPools(wanted, 6)
    assert (pools.reads_prompt, pools.done) == (False, 6)
    assert pools.plan_prompt(0, 6) is None


def test_a_step_behind_the_prompt_wants_nothing_of_it() -> None:
    pools = HostPools(Wanted(("prompt",)), 6)
    assert pools.plan_prompt(6, 9, torch.zeros(1, D)) is None
    assert pools.plan_prompt(0, 6) is not None
    assert pools.plan_prompt(0, 6) is None, "nothing is new"


# --- prefix hits ------------------------------------------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_a_prefix_hit_up_to_what_is_needed_loses_nothing_where_a_sum_is_kept(case: Case, data: st.DataObject) -> None:
    """At the start, or after a restart with some of it done; the sum may be of another request."""
    pools, done = pools_for(case), 0
    if data.draw(st.booleans()):
        done = data.draw(st.integers(0, case.num_prompt - 1))
        if done:
            prefill(pools, case.hidden_NKD, 0, done)
        pools.restart()
    hit = data.draw(st.integers(0, min(max(pools.first_needed(), done), case.num_prompt - 1)))
    for number, (start, stop) in enumerate(data.draw(cuts(hit, case.num_prompt))):
        prefill(pools, case.hidden_NKD, start, stop, base=number == 0)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_kept_sum_stands_for_what_was_done_too(pooling: Any) -> None:
    """Two positions were computed, the request went back into the queue, and hit another's prefix of four."""
    case = case_of(pooling=pooling, spans={"m": PromptSpan(((0, 1), (4, 6)))}, layers=(0, -1))
    pools = pools_for(case)
    prefill(pools, case.hidden_NKD, 0, 2)
    pools.restart()
    prefill(pools, case.hidden_NKD, 4, 6, base=True)
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert_complete(case, pools)


@given(case=cases(), data=st.data())
def test_a_prefix_hit_beyond_what_is_needed_is_not_planned(case: Case, data: st.DataObject) -> None:
    pools = pools_for(case)
    needed = pools.first_needed()
    if needed < case.num_prompt - 1:
        hit = data.draw(st.integers(needed + 1, case.num_prompt - 1))
        assert pools.plan_prompt(hit, case.num_prompt, torch.zeros(1, D)) is None
        assert pools.done == 0


@pytest.mark.parametrize(
    ("wanted", "needed"),
    [
        (Wanted(("prompt",)), [6, 6, 6]),
        (Wanted(("prompt",), "last"), [5, 5, 6]),
        (Wanted(("prompt",), "max"), [6, 6, 6]),
        (Wanted(("response",)), [6, 6, 6]),
        (Wanted(("prompt",), spans={"m": MASK}), [1, 2, 6]),
        (Wanted((), "last", spans={"m": MASK}), [4, 4, 6]),
        (Wanted(("prompt",), tokens=True), [0, 2, 6]),
        (Wanted(("response",), tokens=True), [6, 6, 6]),
    ],
)
def test_the_first_position_that_must_be_computed(wanted: Wanted, needed: list[int]) -> None:
    """Checked at the start, with two positions done, and with the whole prompt done."""
    pools, hidden_NKD = HostPools(wanted, 6), hidden_of(6)
    found = [pools.first_needed()]
    for start, stop in ((0, 2), (2, 6)):
        prefill(pools, hidden_NKD, start, stop)
        found.append(pools.first_needed())
    assert found == needed


@pytest.mark.parametrize("segments", [("prompt",), ("full",), ("prompt", "full")])
@pytest.mark.parametrize("pooling", ["mean", "max", "sum"])
def test_a_prefix_hit_without_a_sum_leaves_the_count_short(segments: Any, pooling: Any) -> None:
    case = case_of(segments, pooling)
    pools = pools_for(case)
    assert prefill(pools, case.hidden_NKD, 2, 6) is None
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    assert finish(case, pools).segments == dict.fromkeys(segments, (None, 0))
    assert pools.sums == []


# --- sums that are kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prompt", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("chunk", [1000, BLOCK, 50])
@pytest.mark.parametrize("segment", ["prompt", "full"])
@pytest.mark.parametrize("pooling", ["mean", "max", "sum"])
def test_sums_are_kept_at_blocks_before_the_last_token_and_at_the_ends(
    num_prompt: int, chunk: int, segment: Any, pooling: Any
) -> None:
    case = case_of((segment,), pooling, num_prompt=num_prompt, text="ab" * BLOCK)
    pools = pools_for(case)
    for start in range(0, num_prompt, chunk):
        prefill(pools, case.hidden_NKD, start, min(start + chunk, num_prompt))
    for index in range(case.num_response):
        produce(pools, case.hidden_NKD, index)
    finish(case, pools)
    assert_sums(case, pools)
    expected = {*range(BLOCK, num_prompt, BLOCK), num_prompt - 1, num_prompt, *range(chunk, num_prompt, chunk)} - {0}
    if segment == "full":
        end = num_prompt + case.num_response - 1
        expected |= {*range((num_prompt // BLOCK + 1) * BLOCK, end, BLOCK), end}
    assert {length for length, _ in pools.sums} == expected


def test_no_sums_are_kept_where_none_is_made() -> None:
    spans = {"m": MASK, "r": LastTokens(2)}
    for wanted in (Wanted(SEGMENTS, "last"), Wanted(("response",), spans=spans), Wanted(("full",), None, tokens=True)):
        case = Case(wanted, 6, (0, 1, 0), hidden_of(8))
        pools = pools_for(case)
        feed(pools, case.hidden_NKD)
        finish(case, pools)
        assert pools.sums == []


# --- spans of the response --------------------------------------------------------------------------------------------


def test_only_as_many_rows_are_held_as_a_span_may_mean() -> None:
    def held(**spans: ResolvedSpan) -> set[int]:
        pools, rows_KD = HostPools(Wanted(("response",), spans=spans), 4), torch.zeros(1, D)
        sizes = set()
        for index in range(50):
            pools.add_produced(rows_KD, index)
            sizes.add(len(pools._response_rows))
        return sizes

    assert held() == {0}
    assert held(m=MASK) == {0}
    assert held(a=LastTokens(3), b=LastTokens(5, allow_fewer=True)) == {1, 2, 3, 4, 5}
    assert held(a=LastTokens(3), b=Between("|", None)) == set(range(1, 51))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    ("span", "words"),
    [
        (LastTokens(5), r"LastTokens\(5\): the response has 4 tokens; raise min_new_tokens, or pass allow_fewer=True"),
        (Between("c", None), r"the marker 'c' is not in the response, 'ab\|a'"),
        (Between("b", "b"), r"the marker 'b' is not in the response behind 'b', .*max_new_tokens, or .*unclosed='end'"),
        (Between("b", "|"), r"nothing stands between 'b' and '\|' in the response, 'ab\|a'"),
    ],
)
def test_a_span_that_is_not_there_is_a_fault(span: ResolvedSpan, words: str, pooling: Any) -> None:
    """Not an exception: it would end the server. What else was asked for is there."""
    case = case_of(("response",), pooling, text="ab|a", spans={"gone": span, "there": LastTokens(2)})
    pools = pools_for(case)
    feed(pools, case.hidden_NKD)
    found = finish(case, pools)
    assert list(found.spans) == ["there"]
    assert_value(case, "there", found.spans["there"][0])
    assert re.search(words, found.faults["gone"])


def test_markers_without_a_tokenizer_are_a_fault() -> None:
    case = case_of((), spans={"b": Between("a", None)})
    pools = pools_for(case)
    feed(pools, case.hidden_NKD)
    assert pools.results(case.response_ids).faults["b"].endswith("the server has no tokenizer to find the markers with")


@pytest.mark.parametrize("span", [LastTokens(2), LastTokens(2, allow_fewer=True), Between(None, "|", unclosed="end")])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_request_that_ended_before_its_first_token(span: ResolvedSpan, pooling: Any) -> None:
    """An abort in the middle of the prompt. It is answered like any other, and must not end the server."""
    pools = HostPools(Wanted((), pooling, spans={"r": span}), 6)
    assert pools.results((), decode).spans.get("r", (None, 0)) == (None, 0)
