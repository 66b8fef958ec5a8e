"""The scheduler's side of an update over the network: it waits for no trainer that is gone.

While a scheduler waits it computes nothing, for anybody. Knows SGLang's weight updater, and nothing of leases.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch

from torchrl_sglang_hidden.protocol.update_lease import GROUP_PREFIX

__all__ = ["AROUND_GROUP", "around_join", "around_receive"]

logger = logging.getLogger(__name__)

# Longest wait for a trainer to accept a connection, and for its group to form.
_PROBE_S, _JOIN_S = 5.0, 60.0
_POLL_S = 0.1
_MAX_RANKS = 65536
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
    """Join the process group of a trainer that is there, in bounded time.

    To a trainer that listens no more, torch connects again for half an hour; for one that takes the connection and
    says nothing it waits for good, whatever its timeout.
    """
    if not 1 <= rank_offset < world_size <= _MAX_RANKS:
        return False, (
            f"rank_offset={rank_offset}, world_size={world_size}: rank 0 is the trainer's, and a group has at most "
            f"{_MAX_RANKS}; expected 1 <= rank_offset < world_size"
        )
    until = time.monotonic() + _JOIN_S
    trainer = (master_address, int(master_port))
    # Our own trainers listen before they ask. Others may begin to listen a moment later.
    ours = group_name.startswith(GROUP_PREFIX)
    reason = _why_absent(trainer, 0.0 if ours else _JOIN_S)
    if reason:
        return False, reason
    if ours:
        _trainers.clear()
        # NCCL's operations are of the thread's device, and belong in the scheduler's own thread.
        if backend == "gloo":
            _trainers[group_name] = trainer
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def join() -> tuple[bool, str]:
        if device is not None:
            torch.accelerator.set_device_index(device)
        return original(updater, master_address, master_port, rank_offset, world_size, group_name, backend)

    # Left alone where it does not end, since nothing ends it.
    joined = _in_thread("join-update-group", join)
    if wait([joined], max(0.0, until - time.monotonic())).done:
        answer: tuple[bool, str] = joined.result()
        return answer
    return False, (
        f"the trainer at {master_address}:{master_port} did not form the group {group_name!r:.80} within "
        f"{_JOIN_S:g} s; start all its {world_size} ranks"
    )


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
    # The last reference to a group waits for its operations.
    group = updater._model_update_group.get(options["group_name"])
    received = _in_thread("receive-weights", lambda: original(updater, **options), group)
    misses = 0
    while not wait([received], _ASK_S).done:
        reason = _why_gone(trainer)
        misses = misses + 1 if reason else 0
        if misses == _MISSES:
            raise RuntimeError(f"the trainer is gone: {reason}")
    return received.result()


def _in_thread(name: str, call: Callable[[], Any], *kept: Any) -> Future[Any]:
    """Call something in a thread for which the process does not wait; ``kept`` lives as long as it runs."""
    future: Future[Any] = Future()
    threading.Thread(target=_fill, args=(future, name, call, *kept), name=name, daemon=True).start()
    return future


def _fill(future: Future[Any], name: str, call: Callable[[], Any], *kept: Any) -> None:
    try:
        future.set_result(call())
    except Exception as error:  # whichever: the scheduler's thread raises it, if it still waits
        logger.exception("torchrl_sglang_hidden: %s failed", name)
        future.set_exception(error)


def _why_absent(trainer: tuple[str, int], patience_s: float) -> str:
    """Say why a trainer cannot be reached, after so many seconds; "" where it listens."""
    until = time.monotonic() + patience_s
    while True:
        reason = _why_gone(trainer)
        if not reason or time.monotonic() >= until:
            return reason
        time.sleep(min(_POLL_S, patience_s))


def _why_gone(trainer: tuple[str, int]) -> str:
    """Say why a trainer cannot be reached; "" where it listens."""
    try:
        socket.create_connection(trainer, _PROBE_S).close()
    except (OSError, OverflowError) as error:
        return f"nothing listens at {trainer[0]}:{trainer[1]} ({error})"
    return ""


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
AROUND_GROUP: dict[str, Callable[..., Any]] = {
    f"{_UPDATER}.init_weights_update_group": around_join,
    f"{_UPDATER}.receive_weights_from_distributed": around_receive,
}
