"""`EffectiveRank`: the rank of each response's token states, in every form of batch, against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.group_references import rank
from helpers.policy_batches import batch_of, make
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer

from torchrl_sglang_hidden import HiddenSpec, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import EffectiveRank

KEY = ("token_hidden_states", "response")


def rows_of(lengths: list[int], layers: int | None = None, size: int = 5) -> list[torch.Tensor]:
    shape = (size,) if layers is None else (layers, size)
    return [torch.randn(length, *shape) for length in lengths]


def ragged(rows: list[torch.Tensor]) -> TensorDictBase:
    return lazy_stack([TensorDict(token_hidden_states=TensorDict(response=row)) for row in rows])


@pytest.mark.parametrize("centre", [True, False])
def test_ragged_rows(centre: bool) -> None:
    rows = rows_of([2, 7, 4])
    batch = ragged(rows)
    out = EffectiveRank(centre=centre)(batch)
    assert out is batch
    assert out["effective_rank"].shape == (3,)
    assert out["effective_rank"].tolist() == pytest.approx([rank(row, centre) for row in rows], rel=1e-5)
    nested = lazy_stack([ragged(rows), ragged(rows[::-1])])
    assert EffectiveRank(centre=centre)(nested)["effective_rank"].shape == (2, 3)


def test_padded_rows_and_layers() -> None:
    rows = rows_of([2, 7, 4], layers=2)
    padded = torch.zeros(3, 1, 7, 2, 5)
    for index, row in enumerate(rows):
        padded[index, 0, : len(row)] = row
    batch = TensorDict(states=padded, batch_size=[3, 1])
    found = EffectiveRank("states", ("a", "rank"))(batch)["a", "rank"]
    assert found.shape == (3, 1, 2)
    expected = [[rank(row[:, layer]) for layer in range(2)] for row in rows]
    torch.testing.assert_close(found[:, 0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(EffectiveRank()(ragged(rows))["effective_rank"], found[:, 0])


@pytest.mark.parametrize(("layers", "shape"), [((), (0,)), ((2,), (0, 2))])
def test_a_batch_without_rows(layers: tuple[int, ...], shape: tuple[int, ...]) -> None:
    batch = TensorDict(states=torch.zeros(0, 7, *layers, 5), batch_size=[0])
    assert EffectiveRank("states")(batch)["effective_rank"].shape == shape


@pytest.mark.parametrize("pad_output", [False, True])
def test_of_a_policys_output(pad_output: bool) -> None:
    policy, _ = make("text", hidden=HiddenSpec(("response",), tokens=True), pad_output=pad_output)
    out = policy(batch_of("text"))
    found = EffectiveRank()(out)["effective_rank"]
    states = out.get(KEY) if pad_output else out.get(KEY, as_list=True)
    for row, value in zip(states, found.tolist(), strict=True):
        real = row[(row != 0).any(-1)]
        assert value == pytest.approx(rank(real), rel=1e-4, nan_ok=True)


def test_rows_that_have_no_rank() -> None:
    rows = [torch.randn(1, 5), torch.full((4, 5), torch.nan), torch.ones(4, 5), torch.zeros(0, 5)]
    found = EffectiveRank()(ragged(rows))["effective_rank"].tolist()
    assert [math.isnan(value) for value in found] == [True, True, False, True]
    assert found[2] == 0


@pytest.mark.parametrize(("shape", "ranks"), [((0,), (0,)), ((2, 0), (2, 0)), ((), ())])
def test_batches_of_no_rows_and_without_dimensions(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    batch = TensorDict(states=torch.randn(*shape, 3, 5), layers=torch.randn(*shape, 3, 2, 5), batch_size=shape)
    assert EffectiveRank("states")(batch)["effective_rank"].shape == ranks
    assert EffectiveRank("layers")(batch)["effective_rank"].shape == (*ranks, 2)


@pytest.mark.parametrize("invert", [False, True])
def test_in_a_buffer(invert: bool) -> None:
    rows = rows_of([3, 6])
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=2)
    buffer.append_transform(EffectiveRank(), invert=invert)
    buffer.extend(ragged(rows))
    assert ("effective_rank" in set(buffer.storage.get(0).keys())) == invert
    found = buffer.sample()["effective_rank"].tolist()
    assert all(min(abs(value - rank(row)) for row in rows) < 1e-4 for value in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_every_dtype(dtype: torch.dtype) -> None:
    rows = [row.to(dtype) for row in rows_of([3, 6])]
    out = EffectiveRank()(ragged(rows))["effective_rank"]
    assert out.dtype == torch.float32
    assert out.tolist() == pytest.approx([rank(row) for row in rows], rel=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: EffectiveRank()(TensorDict(batch_size=[2])), MissingKeyError, r"HiddenSpec\(tokens=True\)"),
        (
            lambda: EffectiveRank("x")(TensorDict(x=torch.ones(2, 3), batch_size=[2])),
            InputError,
            "expected .*T, D",
        ),
        (
            lambda: EffectiveRank("x")(TensorDict(x=torch.ones(2, 3, 4).long(), batch_size=[2])),
            InputTypeError,
            "int64; expected floating",
        ),
        (lambda: EffectiveRank(centre=1), InputTypeError, "centre=1: expected True or False"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
