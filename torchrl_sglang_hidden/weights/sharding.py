"""Weights that several processes hold together as DTensors: gathered one bucket at a time into a checkpoint.

All processes of the trainer take part, as the sharding demands; the first writes, and alone talks to the engine. Knows
nothing of servers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed

from torchrl_sglang_hidden.errors import EngineError, WeightsError
from torchrl_sglang_hidden.weights.disk import CheckpointWriter, checkpoint_directory
from torchrl_sglang_hidden.weights.trainers import size_of, split
from torchrl_sglang_hidden.weights.validation import CheckpointDirectory, ShardedWeights

__all__ = ["update_together"]

dist: Any = torch.distributed  # untyped


def update_together(weights: ShardedWeights, update: Callable[[CheckpointDirectory], str], *, bucket_bytes: int) -> str:
    """Gather sharded weights and give them to an engine; called by every process of the trainer.

    The first process writes what is gathered to memory (tmpfs) or disk, one bucket at a time, and updates the engine
    from there. The others take part in the gathering, wait for the outcome, and return or raise as the first does.

    Args:
        weights: the parts of this process.
        update: gives a checkpoint to the engine and returns its version; called in the first process alone.
        bucket_bytes: most bytes of whole weights in the main memory of the first process, one weight more at most.

    Raises:
        WeightsError: the processes do not hold the same weights.
        EngineError: the update failed in another process.
    """
    first = dist.get_rank() == 0
    device = _device_of(weights)
    names = hashlib.sha256("\n".join(weights.parts).encode()).hexdigest()
    if len(set(_tell_all(names, device))) > 1:
        raise WeightsError(
            "the trainer's processes hold different weights, as with pipeline parallelism; gather them into one state "
            "dict, and pass that in the first process"
        )
    with ExitStack() as stack:
        writer: CheckpointWriter | None = None
        with _agreed(device):
            if first:
                size = sum(size_of(weights.parts, name) for name in weights.parts)
                directory = stack.enter_context(checkpoint_directory(size))
                writer = CheckpointWriter(directory, bucket_bytes)
        for bucket in split(weights.parts, bucket_bytes):
            # What fails in the gathering itself is raised as it is: this process is out of step with the others, and
            # could not tell them.
            failure = _gather(weights, bucket, writer)
            with _agreed(device):
                if failure is not None:
                    raise failure
        version = ""
        with _agreed(device):
            if writer is not None:
                writer.close()
                version = update(CheckpointDirectory(directory))
        return _tell_all(version, device)[0]


def _device_of(weights: ShardedWeights) -> torch.device:
    """Return the device on which the processes can talk to each other."""
    shard: Any = next(value for value in weights.parts.like.values() if hasattr(value, "full_tensor"))
    local: torch.Tensor = shard.to_local()
    return local.device


def _gather(weights: ShardedWeights, names: list[str], writer: CheckpointWriter | None) -> BaseException | None:
    """Gather one bucket, and write it where there is a writer.

    Returns:
        What writing failed with. The rest of the bucket was gathered nevertheless, since every process takes part in
        each weight.
    """
    kept = _Kept()
    for name in names:
        part: Any = weights.parts[name]
        whole: torch.Tensor = part.full_tensor() if hasattr(part, "full_tensor") else part
        if writer is not None and kept.failure is None:
            with kept:
                for target, tensor in weights.convert({name: whole}).items():
                    writer.add(target, tensor)
    return kept.failure


class _Kept:
    """Runs a block, and keeps what it raises for later."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.failure = error
        return True


class _agreed:
    """Runs a block in every process, and raises in all of them where one failed: the others would wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        said = "" if error is None else f"{type(error).__name__}: {error}"
        told = _tell_all(said, self._device)
        if error is None:
            failed = next(((rank, other) for rank, other in enumerate(told) if other), None)
            if failed is not None:
                raise EngineError(
                    f"the weights did not reach the engine, for process {failed[0]} of the trainer failed with "
                    f"{failed[1]}; mend that, and update again from every process"
                )


def _tell_all(text: str, device: torch.device) -> list[str]:
    """Return the texts of all processes, in their order. Nothing is pickled."""
    data = text.encode()
    length = torch.tensor([len(data)], device=device)
    longest = length.clone()
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = torch.zeros(int(longest), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else padded[:0]
    lengths, texts = ([torch.empty_like(own) for _ in range(dist.get_world_size())] for own in (length, padded))
    dist.all_gather(lengths, length)
    if len(padded):
        dist.all_gather(texts, padded)
    return [bytes(text[: int(size)].tolist()).decode() for text, size in zip(texts, lengths, strict=True)]
