"""Keeps sums and maxima over the beginnings of prompts, for prompts that begin alike and hit SGLang's prefix cache.

SGLang's prefix cache keeps keys and values and no states, so that a prompt that hits it has rows that nobody computes.
A mean needs their sum, and a maximum their maximum: sums and maxima are kept apart and are not interchangeable. A value
is looked up by its kind, its tokens, and whatever else makes SGLang keep prefixes apart. The KV cache is not watched:
rows that it loses are computed again, and the kept values have a byte limit of their own.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch

from torchrl_sglang_hidden.reduce.wanted import BLOCK

__all__ = ["PrefixKeys", "PrefixSums", "TokensOf"]

MAX_BYTES = 256 * 2**20
_ID_BYTES = 8

# What an entry costs beside its numbers: the tensor around them, and its entries in two dicts.
ENTRY_BYTES = 1024

_Key = tuple[bytes, bytes]


@dataclass(slots=True)
class PrefixKeys:
    """Names the beginnings of one request's tokens: a digest of all whole blocks, and the ids after them.

    Args:
        kind: what keeps values over the same tokens apart: the reducer, the layers, an adapter.
        ids: the request's tokens so far; may grow at its end.
    """

    kind: str
    ids: Sequence[int]
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._digests.append(hashlib.blake2b(self.kind.encode(), digest_size=16).digest())

    def block(self, number: int) -> bytes:
        """Return the digest of the first ``number`` blocks."""
        while len(self._digests) <= number:
            start = (len(self._digests) - 1) * BLOCK
            block = array("q", self.ids[start : start + BLOCK]).tobytes()
            self._digests.append(hashlib.blake2b(self._digests[-1] + block, digest_size=16).digest())
        return self._digests[number]

    def key(self, length: int) -> _Key:
        """Return the name of the first ``length`` tokens."""
        number = length // BLOCK
        return self.block(number), array("q", self.ids[number * BLOCK : length]).tobytes()


class PrefixSums:
    """Holds running values up to a limit of bytes; forgets what was not used for longest.

    Args:
        max_bytes: of values and their names.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._sums: OrderedDict[_Key, tuple[torch.Tensor, int]] = OrderedDict()
        # Which lengths there are after a block, so that a search need not try all.
        self._lengths: dict[bytes, Counter[int]] = {}

    def put(self, keys: PrefixKeys, length: int, value_KD: torch.Tensor, num_bytes: int | None = None) -> None:
        """Keep the running value over the first ``length`` positions.

        Args:
            keys: of the request.
            length: positions.
            value_KD: the value; an empty tensor on a rank that does not hold it.
            num_bytes: its size where it is held, as all ranks must forget alike; None for that of ``value_KD``.
        """
        key = keys.key(length)
        if key in self._sums:
            self._sums.move_to_end(key)
            return
        num_bytes = value_KD.nbytes if num_bytes is None else num_bytes
        self._sums[key] = (value_KD, num_bytes)
        self._lengths.setdefault(key[0], Counter())[len(key[1]) // _ID_BYTES] += 1
        self.bytes += _cost(key, num_bytes)
        while self.bytes > self.max_bytes:
            self._forget_oldest()

    def longest(self, keys: PrefixKeys, limit: int, multiple: int = 1) -> tuple[int, torch.Tensor] | None:
        """Return the longest beginning of at most ``limit`` tokens whose value is kept, and that value; or None.

        Args:
            keys: of the request.
            limit: tokens.
            multiple: the length must be one of this: SGLang matches whole pages.
        """
        for number in range(limit // BLOCK, -1, -1):
            found = self._lengths.get(keys.block(number))
            for tail in sorted(found or (), reverse=True):
                length = number * BLOCK + tail
                if 0 < length <= limit and length % multiple == 0:
                    key = keys.key(length)
                    found_value = self._sums.get(key)
                    if found_value is not None:
                        self._sums.move_to_end(key)
                        return length, found_value[0]
        return None

    def clear(self) -> None:
        """Forget all: other weights give other states."""
        self._sums.clear()
        self._lengths.clear()
        self.bytes = 0

    def _forget_oldest(self) -> None:
        key, (_, num_bytes) = self._sums.popitem(last=False)
        self.bytes -= _cost(key, num_bytes)
        digest, tail = key[0], len(key[1]) // _ID_BYTES
        lengths = self._lengths[digest]
        lengths[tail] -= 1
        if not lengths[tail]:
            del lengths[tail]
        if not lengths:
            del self._lengths[digest]


def _cost(key: _Key, num_bytes: int) -> int:
    return num_bytes + len(key[1]) + ENTRY_BYTES


class TokensOf(Sequence[int]):
    """Reads prompt and response of SGLang's request as one sequence, as they stand when it is read."""

    def __init__(self, req: Any) -> None:
        self._req = ref(req)  # its pools must not keep it alive

    def _parts(self) -> tuple[Sequence[int], Sequence[int]]:
        req = self._req()
        return ((), ()) if req is None else (req.origin_input_ids, req.output_ids)

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    def __getitem__(self, index: Any) -> Any:
        prompt, response = self._parts()
        start, stop, _ = index.indices(len(self))
        cut = len(prompt)
        return [*prompt[start:stop], *response[max(start - cut, 0) : max(stop - cut, 0)]]
