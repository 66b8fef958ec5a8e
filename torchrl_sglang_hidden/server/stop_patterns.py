"""Bounds the time in which a request's ``stop_regex`` is searched: SGLang does so after every token, in the scheduler.

Python's ``re`` takes seconds for ``(a+)+b`` in 25 letters, twice as long for each more, and holds up every request
of the server meanwhile, until SGLang's watchdog ends it. The library regex, which transformers requires, stops in time.

Not with several tensor-parallel ranks: each searches for itself, and ranks of which one stops earlier would wait for
each other for good. Knows SGLang's requests by attribute name; imports of SGLang are inside functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import regex

from torchrl_sglang_hidden.counters import SERVER

__all__ = ["AROUND_STOPS", "MAX_SEARCH_S", "BoundedPatterns", "around_stops"]

# For one pattern after one token. A search that ends takes microseconds.
MAX_SEARCH_S = 0.1


class BoundedPatterns:
    """Stands for the module ``re`` where SGLang searches for a stop."""

    error = re.error

    @staticmethod
    def search(pattern: str, text: str) -> object:
        """Search as ``re.search`` does.

        Raises:
            re.error: the search was not done in time, or the library does not take the pattern.
        """
        try:
            return regex.search(pattern, text, timeout=MAX_SEARCH_S)
        except TimeoutError as error:
            raise re.error(
                f"not searched within {MAX_SEARCH_S:g} s in {len(text)} characters; use no repeat within a repeat"
            ) from error
        except regex.error as error:
            raise re.error(f"{error}; use a pattern that the library regex takes") from error


def around_stops(original: Callable[..., bool], req: Any, *args: Any, **kwargs: Any) -> bool:
    """Abort a request whose ``stop_regex`` is not searched in time, and leave all others as they are."""
    patterns = req.sampling_params.stop_regex_strs
    if not patterns or not _bound():
        return original(req, *args, **kwargs)
    finished = original(req, *args, **kwargs)
    reason = req.finished_reason
    if not finished and reason is not None:
        # SGLang goes on to compare the token with stop ids and the length, which would take the place of the reason.
        SERVER.add(refusals=1)
        return True
    return finished


def _bound() -> bool:
    """Have SGLang search in bounded time; return whether it does."""
    from sglang.srt.managers import schedule_batch
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size > 1:
        return False
    schedule_batch.re = BoundedPatterns
    return True


AROUND_STOPS: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.schedule_batch.Req._check_str_based_finish": around_stops,
}
