"""SGLang's control routes around an update: pause, flush, name the version, and read what they answer.

Knows the routes by name and payload, not how they are called: the engines pass that in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchrl_sglang_hidden.errors import RequestRejectedError

__all__ = ["Call", "finish_update", "paused", "succeeded"]

# A control route of SGLang's and its payload → its answer.
Call = Callable[[str, dict[str, Any]], dict[str, Any]]

NOT_FLUSHED = "Weights were updated, but the cache was not flushed"


def succeeded(answer: Mapping[str, Any], what: str) -> None:
    """Raises when a control route says that it failed."""
    if not answer.get("success"):
        raise RequestRejectedError(f"SGLang refused to {what}: {answer.get('message')}")


@contextmanager
def paused(call: Call) -> Iterator[None]:
    """Stops generation. Running requests are retracted, and computed again from their tokens when it goes on."""
    # Inside: the server may have paused although its answer did not come.
    try:
        call("pause_generation", {"mode": "retract"})
        yield
    finally:
        call("continue_generation", {"torch_empty_cache": False})


def finish_update(call: Call, answer: Mapping[str, Any], version: str, what: str) -> None:
    """Reads the answer of an update; where only the flush of the prefix cache failed, makes up for it.

    SGLang's update waits for the requests that clients wait for. One whose client hung up in the middle of a stream may
    still run: then the weights are in, the cache is the old ones', and the version that clients see has not moved.
    """
    if str(answer.get("message")).startswith(NOT_FLUSHED):
        with paused(call):
            succeeded(call("flush_cache", {}), "flush its cache after an update")
            call("update_weight_version", {"new_version": version, "abort_all_requests": False})
        return
    succeeded(answer, what)
