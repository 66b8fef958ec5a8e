"""Sums over the beginnings of prompts, kept for those that begin alike and find their keys and values in the cache.

SGLang's prefix cache keeps keys and values and no states, so that a prompt that hits it has rows that nobody computes.
What a mean needs of them is their sum. Sums are found by what they are of: the tokens, and whatever else makes SGLang
keep prefixes apart. So no slot of the KV cache is watched: what it forgets is computed again, and the sums are bounded
by themselves.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchrl_sglang_hidden.reduce.pooling import BLOCK

__all__ = ["PrefixKeys", "PrefixSums"]

MAX_BYTES = 256 * 2**20
_ID_BYTES = 8

# What a sum costs beside its numbers: the tensor around them, and its places in two dicts.
ENTRY_BYTES = 1024

_Key = tuple[bytes, bytes]


@dataclass(slots=True)
class PrefixKeys:
    """Names of the beginnings of one request's tokens: a digest of all whole blocks, and the ids behind them.

    Args:
        kind: what keeps prefixes of the same tokens apart.
        ids: the request's tokens so far; may grow at its end.
    """

    kind: str
    ids: Sequence[int]
    _digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._digests.append(hashlib.blake2b(self.kind.encode(), digest_size=16).digest())

    def block(self, number: int) -> bytes:
        """The digest of the first ``number`` blocks."""
        while len(self._digests) <= number:
            start = (len(self._digests) - 1) * BLOCK
            block = array("q", self.ids[start : start + BLOCK]).tobytes()
            self._digests.append(hashlib.blake2b(self._digests[-1] + block, digest_size=16).digest())
        return self._digests[number]

    def key(self, length: int) -> _Key:
        """The name of the first ``length`` tokens."""
        number = length // BLOCK
        return self.block(number), array("q", self.ids[number * BLOCK : length]).tobytes()


class PrefixSums:
    """Bounded; forgets what was not used for longest.

    Args:
        max_bytes: of sums and their names.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._sums: OrderedDict[_Key, torch.Tensor] = OrderedDict()
        # Which lengths there are behind a block, so that a search need not try all.
        self._lengths: dict[bytes, Counter[int]] = {}

    def put(self, keys: PrefixKeys, length: int, sum_KD: torch.Tensor) -> None:
        """Keeps the sum over the first ``length`` positions."""
        key = keys.key(length)
        if key in self._sums:
            self._sums.move_to_end(key)
            return
        self._sums[key] = sum_KD
        self._lengths.setdefault(key[0], Counter())[len(key[1]) // _ID_BYTES] += 1
        self.bytes += _cost(key, sum_KD)
        while self.bytes > self.max_bytes:
            self._forget_oldest()

    def longest(self, keys: PrefixKeys, limit: int, multiple: int = 1) -> tuple[int, torch.Tensor] | None:
        """The longest beginning of at most ``limit`` tokens whose sum is kept, or None.

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
                    sum_KD = self._sums.get(key)
                    if sum_KD is not None:
                        self._sums.move_to_end(key)
                        return length, sum_KD
        return None

    def clear(self) -> None:
        """Forgets all: other weights give other states."""
        self._sums.clear()
        self._lengths.clear()
        self.bytes = 0

    def _forget_oldest(self) -> None:
        key, sum_KD = self._sums.popitem(last=False)
        self.bytes -= _cost(key, sum_KD)
        digest, tail = key[0], len(key[1]) // _ID_BYTES
        lengths = self._lengths[digest]
        lengths[tail] -= 1
        if not lengths[tail]:
            del lengths[tail]
        if not lengths:
            del self._lengths[digest]


def _cost(key: _Key, sum_KD: torch.Tensor) -> int:
    return sum_KD.nbytes + len(key[1]) + ENTRY_BYTES
