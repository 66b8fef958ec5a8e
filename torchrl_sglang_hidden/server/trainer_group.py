"""The scheduler's side of an update over the network: it waits for no trainer that is gone.

While a scheduler waits it computes nothing, for anybody. Knows SGLang's weight updater, and nothing of leases.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from torchrl_sglang_hidden.protocol.update_lease import GROUP_PREFIX

__all__ = ["AROUND_GROUP", "around_join", "around_receive"]

logger = logging.getLogger(__name__)

# Longest wait for a trainer to accept a connection. SGLang itself would try for half an hour to join its group.
_PROBE_S = 5.0
# So often a scheduler that receives asks whether the trainer listens, and so many times in a row it must not.
_ASK_S = 1.0
_MISSES = 3

# Where the trainer of the process group listens that was joined last, by the group's name.
_trainers: dict[str, tuple[str, int]] = {}


def around_join(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    master_address: str,
    master_port: int,
    rank_offset: int,
    world_size: int,
    group_name: str,
    backend: str = "nccl",
) -> tuple[bool, str]:
    """Join the process group of a trainer that is still there."""
    arguments = (master_address, master_port, rank_offset, world_size, group_name, backend)
    if not group_name.startswith(GROUP_PREFIX):
        return original(updater, *arguments)
    trainer = (master_address, int(master_port))
    reason = _why_gone(trainer)
    if reason:
        return False, reason
    _trainers.clear()
    # NCCL's operations are of the thread's device, and belong in the scheduler's own thread.
    if backend == "gloo":
        _trainers[group_name] = trainer
    return original(updater, *arguments)


def around_receive(original: Callable[..., Any], updater: Any, **options: Any) -> Any:
    """Receive weights for as long as their trainer is there.

    Gloo may miss that a peer has closed its connection, where that happens while it begins to receive, and would wait
    for half an hour. Its operation cannot be ended: it goes on in a thread of its own, with its group.

    Raises:
        RuntimeError: the trainer is gone. SGLang answers so, and loads nothing.
    """
    trainer = _trainers.get(options["group_name"])
    if trainer is None:
        return original(updater, **options)
    received: Future[Any] = Future()
    # The last reference to a group waits for its operations.
    group = updater._model_update_group.get(options["group_name"])
    arguments = (received, group, lambda: original(updater, **options))
    threading.Thread(target=_receive, args=arguments, name="receive-weights", daemon=True).start()
    misses = 0
    while not wait([received], _ASK_S).done:
        reason = _why_gone(trainer)
        misses = misses + 1 if reason else 0
        if misses == _MISSES:
            raise RuntimeError(f"the trainer is gone: {reason}")
    return received.result()


def _receive(received: Future[Any], group: Any, receive: Callable[[], Any]) -> None:
    try:
        received.set_result(receive())
    except Exception as error:  # whichever: the scheduler's thread raises it, if it still waits
        logger.exception("torchrl_sglang_hidden: weights could not be received")
        received.set_exception(error)


def _why_gone(trainer: tuple[str, int]) -> str:
    """Say why a trainer cannot be reached; "" where it listens."""
    try:
        socket.create_connection(trainer, _PROBE_S).close()
    except OSError as error:
        return f"nothing listens at {trainer[0]}:{trainer[1]} ({error})"
    return ""


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
AROUND_GROUP: dict[str, Callable[..., Any]] = {
    f"{_UPDATER}.init_weights_update_group": around_join,
    f"{_UPDATER}.receive_weights_from_distributed": around_receive,
}
