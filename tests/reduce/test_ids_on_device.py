"""The ids that a user's constraint reads: copied to the device once, and appended to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce import ids_on_device
from torchrl_sglang_hidden.reduce.ids_on_device import IdsOnDevice

CPU = torch.device("cpu")


def last(ids: list[int], index: int) -> torch.Tensor:
    """Return the input id of the step that samples token ``index``; int32, as SGLang's are."""
    return torch.tensor(ids[index - 1 : index] or [99], dtype=torch.int32)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of ids of each copy from the host."""
    sizes: list[int] = []
    plain = ids_on_device.on_device

    def on_device(values: list[int], *more: object) -> torch.Tensor:
        sizes.append(len(values))
        return plain(values, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ids_on_device, "on_device", on_device)
    return sizes


@pytest.mark.parametrize("lag", [0, 1])
def test_a_response_is_appended_to_and_not_copied_again(lag: int, copied: list[int]) -> None:
    ids, kept = list(range(10, 310)), IdsOnDevice()
    for index in range(300):
        found = kept.of_response(index, ids[: index - lag] if index else [], last(ids, index))
        assert found.dtype == torch.int64
        assert found.tolist() == ids[:index]
    assert len(copied) == 4, "where it begins, and where the memory grows: 64, 130, 262"
    assert sum(copied) < 2 * 300


def test_ids_that_were_sampled_again_replace_those_that_were_dropped() -> None:
    """After a retraction SGLang computes a request again, and may sample other tokens behind those that it kept."""
    kept = IdsOnDevice()
    for index in range(6):
        kept.of_response(index, [1, 2, 3, 4, 5, 6][:index], last([1, 2, 3, 4, 5, 6], index))
    other = [1, 2, 3, 9, 8]
    assert kept.of_response(4, other[:4], last(other, 4)).tolist() == [1, 2, 3, 9]
    assert kept.of_response(5, other[:4], last(other, 5)).tolist() == other


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_steps_see_the_ids_as_they_stand(data: st.DataObject) -> None:
    """A step may be run again at the same or an earlier token, with other ids from there on."""
    kept, ids, index = IdsOnDevice(), [0], 0
    for number in range(1, 60):
        known = len(ids[:index]) - data.draw(st.integers(0, 1)) if index else 0
        assert kept.of_response(index, ids[:known], last(ids, index)).tolist() == ids[:index]
        if data.draw(st.integers(0, 5)) == 0:
            index = data.draw(st.integers(max(index - 1, 0), index))
            ids = ids[:index]
        ids = [*ids[:index], number]
        index += 1


def test_ids_that_the_host_alone_has() -> None:
    kept = IdsOnDevice()
    assert kept.of_response(2, [7, 8, 9], None).tolist() == [7, 8]
    assert kept.of_response(0, [], None).tolist() == []


def test_a_scored_sequence_is_copied_once(copied: list[int]) -> None:
    kept, ids = IdsOnDevice(), tuple(range(500))
    for stop in range(100, 500):
        assert kept.of_sequence(ids, 100, stop, CPU).tolist() == list(ids[100:stop])
    assert copied == [500]
