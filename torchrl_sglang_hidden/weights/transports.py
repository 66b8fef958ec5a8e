"""The transports that bring new weights to an engine: which one an engine gets, and the function behind each name.

The names are `Transport` in ``validation.py``; each is handled here and nowhere else. A name without a case is a type
error, and stops the update when it runs. Knows engines as `Receiver`s, not how their control routes are called.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch

from torchrl_sglang_hidden.errors import CapabilityError
from torchrl_sglang_hidden.weights.control import ControlCall
from torchrl_sglang_hidden.weights.disk import checkpoint, load_from_disk
from torchrl_sglang_hidden.weights.network import NetworkPath, broadcast, check_nccl
from torchrl_sglang_hidden.weights.validation import (
    BUCKET_BYTES,
    CheckpointDirectory,
    Running,
    Transport,
    Weights,
)

__all__ = ["ChosenTransport", "Receiver", "WeightUpdate", "choose_transport", "open_update", "send"]

# What "auto" is resolved to.
ChosenTransport = Literal["disk", "network", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """One engine that new weights are sent to.

    Args:
        name: how messages name the engine, such as its URL.
        call: calls one of the engine's control routes.
        has_server_half: whether this package's server half runs in the engine.
        reads_local_files: whether the engine is known to see this machine's files.
        network: the way to the engine over the network; None for an engine in this process.
    """

    name: str
    call: ControlCall
    has_server_half: bool
    reads_local_files: bool
    network: NetworkPath | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """Checked weights, ready to be sent to any number of engines.

    Args:
        tensors: the weights, by Hugging Face's checkpoint names.
        version: the name that the engines give them.
        running: what becomes of requests under way; see `Engine.update_weights`.
        directory: a checkpoint with the same weights; None when no transport reads one and none is kept.
        is_users: whether the directory is the user's own, which stays.
        bucket_bytes: most bytes that a transport over the network holds at once.
    """

    tensors: Mapping[str, torch.Tensor]
    version: str
    running: Running
    directory: Path | None
    is_users: bool = False
    bucket_bytes: int = BUCKET_BYTES


def choose_transport(transport: Transport, weights: Weights, receiver: Receiver) -> ChosenTransport:
    """Resolve ``"auto"``, and refuse a transport that cannot serve this engine.

    Raises:
        CapabilityError: ``"disk"`` with weights that are no directory, to a server without the server half;
            ``"network"`` or ``"nccl"`` to an engine in this process; or ``"nccl"`` without GPUs on both sides.
    """
    match transport:
        case "auto":
            local = receiver.network is None or (receiver.reads_local_files and receiver.has_server_half)
            return "disk" if local else "network"
        case "disk":
            # Without the server half SGLang would go on naming the deleted checkpoint as its model, and later clients
            # of the server would fail on it. The user's own directory stays.
            stays = receiver.network is None or receiver.has_server_half or isinstance(weights, (str, os.PathLike))
            if not stays:
                raise CapabilityError(
                    f"transport='disk' for a {type(weights).__name__}: {receiver.name} has no torchrl_sglang_hidden "
                    "server half and would go on naming the deleted checkpoint as its model; pass a directory, or use "
                    "transport='network'"
                )
            return "disk"
        case "network" | "nccl":
            if receiver.network is None:
                raise CapabilityError(
                    f"transport={transport!r} is for servers, and {receiver.name} reads from disk; use transport='disk'"
                )
            if transport == "nccl":
                check_nccl(receiver.network)
            return transport
        case _:
            assert_never(transport)


@contextmanager
def open_update(
    transports: Collection[ChosenTransport],
    weights: Weights,
    tensors: Mapping[str, torch.Tensor],
    *,
    version: str,
    running: Running,
    bucket_bytes: int = BUCKET_BYTES,
    keeps: bool = False,
) -> Iterator[WeightUpdate]:
    """Prepare what the transports read: one checkpoint for all engines, where one of them loads from disk.

    Args:
        transports: the transport of each engine.
        weights: what the user passed. A directory is used as it is, anything else is written to memory (tmpfs) or disk
            and deleted afterwards.
        tensors: the same weights, checked.
        version: their name.
        running: see `WeightUpdate`.
        bucket_bytes: see `WeightUpdate`; of a checkpoint, most bytes that wait in main memory for their file.
        keeps: whether an engine keeps the weights for its next start, for which a checkpoint is needed too.

    Raises:
        EngineError: neither memory nor disk has space for the checkpoint.
    """
    with ExitStack() as stack:
        directory, is_users = None, isinstance(weights, (str, os.PathLike))
        if keeps or "disk" in transports:
            if isinstance(weights, (str, os.PathLike)):
                directory = Path(weights).expanduser().absolute()
            elif isinstance(tensors, CheckpointDirectory):  # gathered from several processes
                directory = tensors.path
            else:
                directory = stack.enter_context(checkpoint(tensors, bucket_bytes))
        yield WeightUpdate(
            tensors=tensors,
            version=version,
            running=running,
            directory=directory,
            is_users=is_users,
            bucket_bytes=bucket_bytes,
        )


def send(transport: ChosenTransport, update: WeightUpdate, receiver: Receiver) -> None:
    """Send checked weights to one engine by the transport that was chosen for it.

    Raises:
        EngineError: the engine failed or refused them, and keeps its weights.
        CapabilityError: SGLang's update over the network does not serve this server.
    """
    match transport:
        case "disk":
            if update.directory is None:
                raise AssertionError("open_update was not told of transport 'disk'")
            load_from_disk(receiver.call, update.directory, update.version, update.running)
        case "network" | "nccl":
            if receiver.network is None:
                raise AssertionError(f"choose_transport refuses transport {transport!r} here")
            broadcast(
                receiver.call,
                update.tensors,
                update.version,
                path=receiver.network,
                running=update.running,
                backend="gloo" if transport == "network" else "nccl",
                bucket_bytes=update.bucket_bytes,
                drains=receiver.has_server_half,
            )
        case _:
            assert_never(transport)
