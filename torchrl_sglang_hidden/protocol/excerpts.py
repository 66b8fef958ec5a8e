"""Shows values that came from the other side in the text of an error, however long or deep they are.

Knows nothing of what they mean.
"""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["as_count", "excerpt"]

# Levels, entries and characters that are shown. `repr` itself would write all of a value before it is cut, and raise
# RecursionError of one that is nested as deeply as JSON may be.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel = 5
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxdict = 8
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 60


def excerpt(value: object, length: int = 80) -> str:
    """Return the beginning of a value's repr.

    Args:
        value: anything.
        length: most characters.
    """
    try:
        return _SHOWN.repr(value)[:length]
    except (RecursionError, ValueError):  # integers of thousands of digits have no repr
        return f"a {type(value).__name__}"


def as_count(value: Any, what: str, limit: int | None = None) -> int:
    """Return a number that counts something: an integer of at least 0, and no bool, float or text that looks like one.

    Args:
        value: as it came.
        what: names it in the error.
        limit: the highest that it may be; None for any.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    if type(value) is not int:
        raise TypeError(f"{what} is {excerpt(value)}, expected an integer")
    if value < 0 or (limit is not None and value > limit):
        raise ValueError(f"{what} is {value if -(2**63) <= value < 2**64 else 'huge'}, expected 0..{limit or ''}")
    return value
