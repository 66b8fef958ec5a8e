"""All targets of fuzzing by name, for `tools/fuzz.py` and for the tests with hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from helpers.fuzz_answers import ANSWERS
from helpers.fuzz_files import FILES
from helpers.fuzz_requests import REQUESTS
from helpers.spoiling import Choices

TARGETS: dict[str, Callable[[Choices], None]] = {**ANSWERS, **REQUESTS, **FILES}


def read_spoiled(name: str, data: bytes) -> None:
    """Spoil a good value of one target as ``data`` says, and read it.

    Raises:
        SGLangHiddenError: it was refused, which is right.
        Exception: any other is a fault of the reader.
    """
    TARGETS[name](Choices(data))
