"""Keep the last used of what is dear to make, up to a limit.

Knows nothing of what it keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Bounded"]

Value = TypeVar("Value")


class Bounded(Generic[Value]):
    """A mapping that forgets what was used longest ago.

    Args:
        limit: the sum of the sizes of all values that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """Return the value, or None where it is not kept."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Value, size: int = 1) -> Value:
        """Keep a value, unless it is larger than all that may be kept, and return it."""
        if size <= self.limit:
            self.size += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self.size > self.limit:
                self.size -= self._values.popitem(last=False)[1][1]
        return value
