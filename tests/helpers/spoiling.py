"""Spoils values as a broken or hostile program would write them: `spoil` changes a good one, as `Choices` say.

Every choice is read from bytes, so that whoever makes bytes (hypothesis, or a fuzzer that watches which code they
reach) decides what happens, and the same bytes spoil in the same way again. Knows nothing of who reads the values.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# How many things are wrong at once: mostly one, for whoever reads stops at the first.
CHANGES = (1, 1, 1, 1, 1, 2, 2, 4)


class Choices:
    """Choices that some bytes stand for; behind their end, always the first of what there is to choose from.

    Args:
        data: the bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def left(self) -> bool:
        """Whether there are bytes that were not read."""
        return self._place < len(self._data)

    def below(self, count: int) -> int:
        """Return a number from 0 to ``count - 1``, of one byte or two."""
        width = 1 if count <= 256 else 2
        part = self._data[self._place : self._place + width]
        self._place += width
        return int.from_bytes(part, "little") % count

    def pick(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def rest(self) -> bytes:
        """Return the bytes that are left, which are then read."""
        found, self._place = self._data[self._place :], len(self._data)
        return found


def nested(depth: int, kind: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = kind(value)
    return value


# What stands where something else was expected. The numbers are ends of types, and sizes of which no memory is made.
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 96, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**12, -(10**12), 10**400,
    0.5, -0.0, 3.0, 1e308, math.nan, math.inf, -math.inf, "", "x", "7", "nan", "\x00", "\ud800", "é" * 300, "../../etc",
    "/etc/hostname", "stop", "abort", "float32", "int32", "shared",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    *SCALARS, [], {}, [None], [[]], [math.nan], ["x"], [0] * 300, [10**12] * 2, {"": None}, {"x": {}}, {"type": "stop"},
    nested(60), nested(330), nested(60, lambda inner: {"x": inner}), b"", b"\xff\x00\x80",
)  # fmt: skip


def spoil(value: Any, choices: Choices) -> Any:
    """Return a copy of a value of dicts, lists and scalars with one change or a few."""
    holder = [copy.deepcopy(value)]
    for _ in range(choices.pick(CHANGES)):
        _change(holder, choices)
    if choices.below(2):
        reseal(holder)
    return holder[0] if holder else None


def _change(holder: list[Any], choices: Choices) -> None:
    """Change something somewhere below ``holder[0]``."""
    parent: Any = holder
    key: Any = 0
    if not holder:
        return
    while isinstance(parent[key], (dict, list)) and parent[key] and choices.below(8):
        parent = parent[key]
        key = choices.pick(sorted(parent, key=str)) if isinstance(parent, dict) else choices.below(len(parent))
    here = parent[key]
    match choices.below(8):
        case 0 | 1:
            parent[key] = copy.deepcopy(choices.pick(ODD))
        case 2:
            if parent is not holder:
                del parent[key]
        case 3:
            parent[key] = [here] if choices.below(2) else (here[0] if isinstance(here, list) and here else {"x": here})
        case 4:
            parent[key] = copy.deepcopy(_somewhere(holder[0], choices))
        case 5 if isinstance(parent, dict):
            parent[choices.pick(("", "x", "shared", "data", "id", "type", *sorted(map(str, parent))))] = parent.pop(key)
        case _:
            parent[key] = _bent(here, choices)


def _somewhere(value: Any, choices: Choices) -> Any:
    while isinstance(value, (dict, list)) and value and choices.below(6):
        value = choices.pick([value[key] for key in sorted(value, key=str)] if isinstance(value, dict) else value)
    return value


def _bent(value: Any, choices: Choices) -> Any:
    """Return a value that is nearly the same."""
    match value:
        case bool():
            return not value
        case int() | float():
            changed = (
                value + 1,
                value - 1,
                -value,
                value * 2,
                float(value) if abs(value) < 2**53 else 0.5,
                str(value)[:9],
            )
            return choices.pick(changed) if not isinstance(value, float) or math.isfinite(value) else 0
        case str() if len(value) > 20 and _as_json(value) is not None:
            inner = [_as_json(value)]
            _change(inner, choices)
            return json.dumps(inner[0], default=str)
        case str() | bytes():
            place = choices.below(len(value) + 1)
            more: Any = choices.pick(("\x00", "=", "A", "-1", "\n")) if isinstance(value, str) else b"\xc0\x7f"
            return choices.pick((value[:place], value[:place] + more + value[place:], value[place:] + value, value * 3))
        case list():
            place = choices.below(len(value) + 1)
            odd = copy.deepcopy(choices.pick(ODD))
            return choices.pick(
                (value[:place], value[place:], value[::-1], value + value[:1], [*value[:place], odd, *value[place:]],
                 value * 40, value[place:] + value[:place])
            )  # fmt: skip
        case dict():
            return {**value, choices.pick(("shared", "x", "message", "refused")): copy.deepcopy(choices.pick(ODD))}
    return copy.deepcopy(choices.pick(ODD))


def _as_json(text: str) -> Any:
    try:
        return json.loads(text) if text[:1] in "{[" else None
    except (ValueError, RecursionError):
        return None


def reseal(value: Any) -> None:
    """Write a right checksum beside all bytes, so that what reads them looks at the rest too."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict) and "crc32" in one and isinstance(one.get("data"), (str, bytes)):
            data = one["data"]
            try:
                one["crc32"] = zlib.crc32(data if isinstance(data, bytes) else base64.b64decode(data, validate=True))
            except (ValueError, binascii.Error):
                continue
        stack += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
