"""Keeps the heads that clients pushed to this server, one set in each scheduler.

A request keeps the heads that it began with: a head that is pushed again serves the requests that begin behind it.
Knows SGLang's weight updater by attribute name, and imports nothing of SGLang. Knows nothing of rows or scores.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.errors import InputError, WeightsError
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.spec.heads import MAX_HEADS, Head

__all__ = ["MAX_HEADS_BYTES", "ServedHead", "ServedHeads", "make_head_hooks"]

logger = logging.getLogger(__name__)

# Most bytes of all heads of a server together, on its device.
MAX_HEADS_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class ServedHead:
    """A head on the model's device.

    Args:
        head: as it was pushed.
        version: the name of these weights of it.
        digest: of its file.
        tensors: the head's, on the device.
    """

    head: Head
    version: str
    digest: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """The size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scores(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return the score of each state, float32 ``[N]``, on the device."""
        return self.head.compute(states_ND, self.tensors)


class ServedHeads:
    """The heads of one scheduler, by name.

    Args:
        takes: returns whether the server has the states of some layers.
    """

    def __init__(self, takes: Callable[[Sequence[int]], bool]) -> None:
        self._takes = takes
        self._heads: dict[str, ServedHead] = {}

    def check(self, names: Sequence[str]) -> None:
        """Check that the server has heads of these names.

        Raises:
            InputError: it does not have one.
        """
        missing = [name for name in names if name not in self._heads]
        if missing:
            raise InputError(
                f"the server has no head {missing[0]!r}: it has {sorted(self._heads)}; use Engine.push_head, "
                "again after a restart that launch(restart=True) did not make"
            )

    def of(self, wanted: WantedScores | None) -> tuple[ServedHead, ...]:
        """Return the heads of a request that was taken in; none where one of them was dropped since."""
        names = () if wanted is None else wanted.heads
        return tuple(self._heads[name] for name in names) if self._heads.keys() >= set(names) else ()

    def answer(self, call: HeadCall, hidden_size: int, device: torch.device) -> None:
        """Do what a call asks for.

        Args:
            call: pushes a head, or drops one.
            hidden_size: D.
            device: the model's.

        Raises:
            InputError: the head cannot be served, or there is none to drop. Nothing has changed.
        """
        if not call.data:
            self.check([call.name])
            del self._heads[call.name]
            return
        head, digest = Head.from_bytes(call.data), hashlib.sha256(call.data).hexdigest()
        if head.width != hidden_size:
            raise WeightsError(
                f"head {call.name!r} reads states of {head.width} numbers, and the model's have {hidden_size}; train "
                "it on this model's states"
            )
        if head.layer < -1 or not self._takes((head.layer,)):
            raise InputError(
                f"head {call.name!r} reads layer {head.layer}, whose states the server does not give; start it for "
                "that layer, as launch(layers=…) does, or use another"
            )
        served = self._heads.get(call.name)
        if served is not None and served.version == call.version and served.digest != digest:
            raise InputError(
                f"head {call.name!r} has version {call.version!r} with other weights, so that no answer could tell "
                "the two apart; pass another version, or None"
            )
        others = [one for name, one in self._heads.items() if name != call.name]
        size = sum(one.num_bytes for one in others) + sum(tensor.nbytes for tensor in head.tensors.values())
        if len(others) >= MAX_HEADS or size > MAX_HEADS_BYTES:
            raise InputError(
                f"{len(others) + 1} heads of {size / 2**20:.0f} MiB, over the server's limits of {MAX_HEADS} and "
                f"{MAX_HEADS_BYTES // 2**20} MiB; drop one with Engine.drop_head"
            )
        tensors = {name: on_device(tensor, device) for name, tensor in head.tensors.items()}
        self._heads[call.name] = ServedHead(head, call.version, digest, tensors)
        logger.info("torchrl_sglang_hidden: head %r is of version %r now", call.name, call.version)


def make_head_hooks(heads: ServedHeads) -> dict[str, Callable[..., Any]]:
    """Return the hook around SGLang's handler that heads are pushed through."""

    def around_get_weights(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
        if not HeadCall.is_packed(recv_req.name):
            return original(updater, recv_req)
        runner = updater.tp_worker.model_runner
        heads.answer(HeadCall.unpack(recv_req.name), runner.model_config.hidden_size, torch.device(runner.device))
        from sglang.srt.managers.io_struct import GetWeightsByNameReqOutput

        return GetWeightsByNameReqOutput(parameter=[])

    return {f"{_UPDATER}.get_weights_by_name": around_get_weights}


_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
