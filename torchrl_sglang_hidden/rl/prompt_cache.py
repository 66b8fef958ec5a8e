"""`PromptCache`: the answers to the prompts that were asked last, of one version of the weights.

Knows nothing of what a prompt or an answer is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["CacheInfo", "PromptCache"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """How a cache was used.

    Args:
        hits: prompts whose answer was there.
        misses: prompts that were asked.
        size: answers that are there now.
        max_size: most answers that are kept.
    """

    hits: int
    misses: int
    size: int
    max_size: int

    @property
    def hit_rate(self) -> float:
        """Hits of all prompts, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class PromptCache(Generic[T]):
    """Keeps the answers that were used last, and forgets all of them when the weights change.

    Args:
        max_size: most answers to keep; 0 keeps none.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.version: str | None = None
        self._answers: OrderedDict[Hashable, T] = OrderedDict()
        self._hits = self._misses = 0

    def look_up(self, keys: Mapping[Hashable, int]) -> dict[Hashable, T]:
        """Return the answers that are there, and count.

        Args:
            keys: how often each key is wanted. A key that is not there is asked once, and is a hit after that.
        """
        found = {key: self._answers[key] for key in keys if key in self._answers}
        for key in found:
            self._answers.move_to_end(key)
        misses = len(keys) - len(found)
        self._misses += misses
        self._hits += sum(keys.values()) - misses
        return found

    def use_version(self, version: str | None) -> None:
        """Forget the answers of another version of the weights; None is like none that there was."""
        if version is None or version != self.version:
            self.version = version
            self._answers.clear()

    def keep(self, answers: Mapping[Hashable, T]) -> None:
        """Keep answers of the version in use; those that were used longest ago go."""
        self._answers.update(answers)
        while len(self._answers) > self.max_size:
            self._answers.popitem(last=False)

    @property
    def info(self) -> CacheInfo:
        """How the cache was used so far."""
        return CacheInfo(self._hits, self._misses, len(self._answers), self.max_size)
