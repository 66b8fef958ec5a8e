"""Running values of many requests in one matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.reducers import reducer_of
from torchrl_sglang_hidden.server.slots import DISCARDED, Slots
from torchrl_sglang_hidden.spec.hidden import POOLINGS

D = 3


def slots_for(pooling: Any = "sum", num_layers: int = 2) -> Slots:
    return Slots(tuple(range(num_layers)), reducer_of(pooling))


@given(data=st.data(), pooling=st.sampled_from(POOLINGS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_are_folded_into_their_own_slots(data: st.DataObject, pooling: Any, dtype: torch.dtype) -> None:
    """Requests come and go, some rows are discarded, and slots are used again."""
    slots, reducer = slots_for(pooling), reducer_of(pooling)
    held: list[Any] = []
    expected: dict[int, torch.Tensor] = {}
    for step in range(data.draw(st.integers(1, 6))):
        if held and data.draw(st.booleans()):
            gone = held.pop(data.draw(st.integers(0, len(held) - 1)))
            expected.pop(gone.index, None)
            del gone
        held += [slots.take() for _ in range(data.draw(st.integers(0, 3)))]
        rows_NKD = torch.randn(len(held) + 1, 2, D, generator=torch.Generator().manual_seed(step)).to(dtype)
        indices, first = [DISCARDED], []
        for slot, row_KD in zip(held, rows_NKD[1:].float(), strict=True):
            if data.draw(st.booleans()):
                indices.append(DISCARDED)
                continue
            indices.append(slot.index)
            if slot.index not in expected:
                first.append(slot.index)
                expected[slot.index] = row_KD
            else:
                expected[slot.index] = reducer.merge(expected[slot.index], row_KD)
        slots.fold(rows_NKD, slots.mark(rows_NKD.device), indices, first)
    if expected:
        found = slots.read(list(expected)).wait()
        torch.testing.assert_close(found, torch.stack(list(expected.values())))


def test_a_slot_is_given_back_with_its_request() -> None:
    slots = slots_for()
    first, second = slots.take(), slots.take()
    assert {first.index, second.index, DISCARDED} == {0, 1, 2}
    index = first.index
    del first
    assert slots.take().index == index


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_slot_starts_empty_whoever_had_it(pooling: Any) -> None:
    slots = slots_for(pooling, num_layers=1)
    for number in (5.0, -7.0):
        slot = slots.take()
        slots.fold(torch.full((1, 1, D), number), None, [slot.index], [slot.index])
        assert slots.read([slot.index]).wait().tolist() == [[[number] * D]]
        del slot


def test_the_matrix_grows_and_keeps_what_is_in_it() -> None:
    slots = slots_for(num_layers=1)
    held = [slots.take()]
    slots.fold(torch.ones(1, 1, D), None, [held[0].index], [held[0].index])
    small = slots.device_bytes
    held += [slots.take() for _ in range(500)]
    indices = [slot.index for slot in held]
    slots.fold(torch.ones(501, 1, D), None, indices, indices[1:])
    assert slots.device_bytes > small
    assert slots.read(indices).wait()[:, 0, 0].tolist() == [2.0] + [1.0] * 500


def test_what_was_read_is_not_written_to_later() -> None:
    slots = slots_for(num_layers=1)
    slot = slots.take()
    slots.fold(torch.ones(1, 1, D), None, [slot.index], [slot.index])
    landing = slots.read([slot.index])
    slots.fold(torch.ones(1, 1, D), None, [slot.index], [])
    assert landing.wait().tolist() == [[[1.0] * D]]


def test_slots_may_be_made_before_they_are_needed() -> None:
    """So that SGLang counts their memory when it sizes its KV cache."""
    slots = slots_for(num_layers=1)
    slots.reserve(D, torch.device("cpu"), 300)
    reserved = slots.device_bytes
    assert reserved == 300 * D * 4
    held = [slots.take() for _ in range(299)]
    indices = [slot.index for slot in held]
    slots.fold(torch.ones(299, 1, D), None, indices, indices)
    assert slots.device_bytes == reserved
