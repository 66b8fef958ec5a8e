"""SGLang's control routes around an update: pause, flush, name the version, and read their answers.

Knows the routes by name and payload, not how they are called: the engines pass that in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, assert_never

from torchrl_sglang_hidden.errors import RequestRejectedError
from torchrl_sglang_hidden.protocol.served_weights import DRAIN, NOT_FLUSHED, WAS_PAUSED
from torchrl_sglang_hidden.weights.validation import Running

__all__ = ["ControlCall", "drained", "finish_update", "paused", "running_requests", "succeeded"]

# Calls one of SGLang's control routes: the route's name and payload → SGLang's answer.
ControlCall = Callable[[str, dict[str, Any]], dict[str, Any]]


def succeeded(answer: Mapping[str, Any], what: str) -> None:
    """Check the answer of a control route.

    Args:
        answer: SGLang's answer.
        what: what SGLang was asked to do, as in "SGLang refused to …".

    Raises:
        RequestRejectedError: the answer says that the route failed.
    """
    if not answer.get("success"):
        said = answer.get("message") or answer.get("error_message")
        raise RequestRejectedError(f"SGLang refused to {what}: {said}; look at the server's log")


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
def drained(call: ControlCall) -> Iterator[bool]:
    """Hold new requests back inside the block, which begins when those under way have ended.

    Only a server half can do that: SGLang's own pause takes requests out in their middle.

    Yields:
        Whether somebody had paused the engine before. Then the requests under way stand still and have not ended, and
        the engine stays paused after the block.
    """
    was_paused = False
    # Inside: the server may hold requests back although its answer did not come.
    try:
        was_paused = bool(call("get_weights_by_name", {"name": DRAIN}).get(WAS_PAUSED))
        if not was_paused:
            # What slipped in meanwhile is taken out before its first token.
            call("pause_generation", {"mode": "retract"})
        yield was_paused
    finally:
        if not was_paused:
            call("continue_generation", {"torch_empty_cache": False})


@contextmanager
def paused(call: ControlCall, *, stays: bool = False) -> Iterator[None]:
    """Pause generation inside the block. Requests under way are retracted, and computed again from their tokens later.

    The end of the block continues generation, whatever happened in it, unless the engine ``stays`` paused.
    """
    # Inside: the server may have paused although its answer did not come.
    try:
        call("pause_generation", {"mode": "retract"})
        yield
    finally:
        if not stays:
            call("continue_generation", {"torch_empty_cache": False})


def finish_update(
    call: ControlCall, answer: Mapping[str, Any], version: str, what: str, *, stays_paused: bool = False
) -> None:
    """Check the answer of an update, and flush the prefix cache where SGLang could not.

    SGLang's update waits for the requests that clients wait for. A request whose client hung up in the middle of a
    stream may still run: then the weights are new, the cache still holds states of the old ones, and the version that
    clients see has not moved.

    Args:
        call: calls a control route.
        answer: SGLang's answer to the update.
        version: the name of the new weights.
        what: as for `succeeded`.
        stays_paused: whether somebody had paused the engine, who is to let it go on; see `drained`.

    Raises:
        RequestRejectedError: the update or the flush failed.
    """
    if str(answer.get("message")).startswith(NOT_FLUSHED):
        with paused(call, stays=stays_paused):
            succeeded(call("flush_cache", {}), "flush its cache after an update")
            call("update_weight_version", {"new_version": version, "abort_all_requests": False})
        return
    succeeded(answer, what)
