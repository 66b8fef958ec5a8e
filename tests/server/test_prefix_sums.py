"""The store of sums against a dictionary of whole prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.reduce.wanted import BLOCK
from torchrl_sglang_hidden.server.prefix_sums import ENTRY_BYTES, PrefixKeys, PrefixSums

# One block in two forms, so that beginnings are often equal, and differ in the middle of whole blocks too.
BLOCKS = [(7,) * BLOCK, (*(7,) * (BLOCK - 1), 8)]
prompts = st.builds(
    lambda blocks, tail: tuple(i for block in blocks for i in block) + tuple(tail),
    st.lists(st.sampled_from(BLOCKS), max_size=3),
    st.lists(st.sampled_from([7, 8]), max_size=3) | st.just(BLOCKS[0][:-1]),
).filter(bool)


def sum_of(number: float = 0.0, size: int = 4) -> torch.Tensor:
    return torch.full((1, size), float(number))


def near(draw: st.DrawFn, length: int) -> int:
    """Draw a length of at most this: the whole length, or one near a block's end."""
    ends = [place for block in range(BLOCK, length + 1, BLOCK) for place in (block - 1, block, block + 1)]
    return draw(st.sampled_from(sorted({1, length, max(length - 1, 1), *(end for end in ends if end <= length)})))


@given(data=st.data())
def test_the_longest_kept_beginning_is_found(data: st.DataObject) -> None:
    store, model = PrefixSums(), dict[tuple[str, tuple[int, ...]], float]()
    for number in range(data.draw(st.integers(0, 8))):
        ids, kind = data.draw(prompts), data.draw(st.sampled_from(["a", "b"]))
        length = near(data.draw, len(ids))
        store.put(PrefixKeys(kind, ids), length, sum_of(number))
        model.setdefault((kind, ids[:length]), float(number))  # what is kept stays
    for _ in range(4):
        ids, kind = data.draw(prompts), data.draw(st.sampled_from(["a", "b"]))
        limit, multiple = data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from([1, 2, 16, BLOCK]))
        expected = max(
            (length for length in range(1, limit + 1) if length % multiple == 0 and (kind, ids[:length]) in model),
            default=None,
        )
        found = store.longest(PrefixKeys(kind, ids), limit, multiple)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert (found[0], float(found[1][0, 0])) == (expected, model[kind, ids[:expected]])
    assert store.bytes == sum(cost(4, len(ids)) for _, ids in model)


@given(data=st.data())
def test_what_was_not_used_for_longest_goes_first_and_bytes_are_exact(data: st.DataObject) -> None:
    """Putting a sum again and finding it both count as use."""
    sizes, max_bytes = (4, 8, 12), 5 * ENTRY_BYTES
    store, model = PrefixSums(max_bytes), dict[tuple[int, ...], int]()
    for _ in range(data.draw(st.integers(1, 20))):
        ids = data.draw(st.lists(st.sampled_from([7, 8]), min_size=1, max_size=3).map(tuple))
        keys = PrefixKeys("", ids)
        if data.draw(st.booleans()):
            size = data.draw(st.sampled_from(sizes))
            store.put(keys, len(ids), sum_of(size=size))
            model[ids] = model.pop(ids, cost(size, len(ids)))
        else:
            found = store.longest(keys, len(ids))
            expected = next((ids[:length] for length in range(len(ids), 0, -1) if ids[:length] in model), None)
            assert (None if found is None else ids[: found[0]]) == expected
            if expected is not None:
                model[expected] = model.pop(expected)
        while sum(model.values()) > max_bytes:
            del model[next(iter(model))]
        assert store.bytes == sum(model.values()) <= max_bytes
    for ids in [*model]:
        assert store.longest(PrefixKeys("", ids), len(ids)) is not None


def test_one_that_has_no_room_at_all_is_not_kept() -> None:
    store = PrefixSums(cost(4, 2) - 1)
    store.put(PrefixKeys("", (1, 2)), 2, sum_of(size=4))
    assert (store.bytes, store.longest(PrefixKeys("", (1, 2)), 2)) == (0, None)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_kinds_are_apart(length: int) -> None:
    """Sums of other layers, or of another adapter's states, are never found."""
    store, ids = PrefixSums(), (3,) * 100
    store.put(PrefixKeys("(-1,) ", ids), length, sum_of())
    assert store.longest(PrefixKeys("(-1,) lora", ids), 100) is None
    assert store.longest(PrefixKeys("(-1,) ", ids), 100) is not None


def test_nothing_is_left_after_clear() -> None:
    store, ids = PrefixSums(), (3,) * 100
    store.put(PrefixKeys("", ids), 70, sum_of())
    store.clear()
    assert (store.bytes, store.longest(PrefixKeys("", ids), 100)) == (0, None)
    store.put(PrefixKeys("", ids), 70, sum_of())
    assert (store.bytes, store.longest(PrefixKeys("", ids), 100)[0]) == (cost(4, 70), 70)


def cost(size: int, length: int) -> int:
    """Return the bytes of a sum of ``size`` numbers, with its entry and the ids after its last whole block."""
    return 4 * size + 8 * (length % BLOCK) + ENTRY_BYTES


class Growing(Sequence[int]):
    """Ids that come one by one, of which slices only are read."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, places: slice) -> list[int]:  # type: ignore[override]
        return self.ids[places]


@given(ids=prompts, data=st.data())
def test_ids_may_grow(ids: tuple[int, ...], data: st.DataObject) -> None:
    """The keys of a request that is under way are those of its tokens at the end."""
    growing = Growing()
    keys = PrefixKeys("kind", growing)
    for length in sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=5))):
        growing.ids[:] = ids[:length]
        asked = near(data.draw, length)
        assert keys.key(asked) == PrefixKeys("kind", ids).key(asked)
    growing.ids[:] = ids
    assert keys.key(len(ids)) == PrefixKeys("kind", ids).key(len(ids))


@given(one=prompts, other=prompts)
def test_equal_keys_are_equal_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    same = PrefixKeys("", one).key(len(one)) == PrefixKeys("", other).key(len(other))
    assert same is (one == other)
