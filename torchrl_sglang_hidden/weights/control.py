"""SGLang's control routes around an update: pause, flush, name the version, and read their answers.

Knows the routes by name and payload, not how they are called: the engines pass that in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, assert_never

from torchrl_sglang_hidden.errors import RequestRejectedError
from torchrl_sglang_hidden.weights.validation import Running

__all__ = ["ControlCall", "finish_update", "paused", "running_requests", "succeeded"]

# Calls one of SGLang's control routes: the route's name and payload → SGLang's answer.
ControlCall = Callable[[str, dict[str, Any]], dict[str, Any]]

NOT_FLUSHED = "Weights were updated, but the cache was not flushed"


def succeeded(answer: Mapping[str, Any], what: str) -> None:
    """Check the answer of a control route.

    Args:
        answer: SGLang's answer.
        what: what SGLang was asked to do, as in "SGLang refused to …".

    Raises:
        RequestRejectedError: the answer says that the route failed.
    """
    if not answer.get("success"):
        raise RequestRejectedError(f"SGLang refused to {what}: {answer.get('message')}; look at the server's log")


def running_requests(running: Running, call: ControlCall) -> AbstractContextManager[None]:
    """Treat the requests under way during an update as the user said.

    ``"finish"`` does nothing, for SGLang's update waits for them by itself; ``"continue"`` pauses them meanwhile.
    """
    match running:
        case "finish":
            return nullcontext()
        case "continue":
            return paused(call)
        case _:
            assert_never(running)


@contextmanager
def paused(call: ControlCall) -> Iterator[None]:
    """Pause generation inside the block. Requests under way are retracted, and computed again from their tokens later.

    The end of the block continues generation, whatever happened in it.
    """
    # Inside: the server may have paused although its answer did not come.
    try:
        call("pause_generation", {"mode": "retract"})
        yield
    finally:
        call("continue_generation", {"torch_empty_cache": False})


def finish_update(call: ControlCall, answer: Mapping[str, Any], version: str, what: str) -> None:
    """Check the answer of an update, and flush the prefix cache where SGLang could not.

    SGLang's update waits for the requests that clients wait for. A request whose client hung up in the middle of a
    stream may still run: then the weights are new, the cache still holds states of the old ones, and the version that
    clients see has not moved.

    Args:
        call: calls a control route.
        answer: SGLang's answer to the update.
        version: the name of the new weights.
        what: as for `succeeded`.

    Raises:
        RequestRejectedError: the update or the flush failed.
    """
    if str(answer.get("message")).startswith(NOT_FLUSHED):
        with paused(call):
            succeeded(call("flush_cache", {}), "flush its cache after an update")
            call("update_weight_version", {"new_version": version, "abort_all_requests": False})
        return
    succeeded(answer, what)
