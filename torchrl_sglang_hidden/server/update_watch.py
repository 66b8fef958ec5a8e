"""Ends the update of a trainer that died in the middle: requests go on, and half-new weights get a name of their own.

Knows the tokenizer manager's control methods, and who holds the lease of `protocol.update_lease`. Knows nothing of
states, logits or the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, assert_never

from torchrl_sglang_hidden.protocol.served_weights import INCOMPLETE, NOT_FLUSHED
from torchrl_sglang_hidden.protocol.server_files import sweep
from torchrl_sglang_hidden.protocol.shared_memory import remove_leftovers
from torchrl_sglang_hidden.protocol.update_lease import GRACE_S, LOST_S, LeaseCall

__all__ = ["UpdateWatch"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1


@dataclass(slots=True)
class _Lease:
    """What the trainer that has the lease has done so far.

    Args:
        holder: see `LeaseCall`.
        was_paused: whether somebody had paused the engine before. Then it stays paused.
        deadline: when the trainer is taken for dead; of `time.monotonic`.
        takes: how often it was taken and not yet given back.
        version: of the new weights.
        group: the process group that the server joined for it; empty without one.
        in_session: whether SGLang's session of a weight update is open.
        loaded: how many parts of the new weights the server has.
        complete: whether it has all of them.
        flushed: whether the prefix cache was emptied after the last part.
    """

    holder: str
    was_paused: bool
    deadline: float
    takes: int = 1
    version: str = ""
    group: str = ""
    in_session: bool = False
    loaded: int = 0
    complete: bool = False
    flushed: bool = True

    def note(self, obj: Any, answer: Any) -> None:
        """Note what a control method has done, by the class of its request and its answer."""
        success, said = (answer[0], str(answer[1])) if isinstance(answer, tuple) else (True, "")
        match type(obj).__name__:
            case "InitWeightsUpdateGroupReqInput" if success:
                self.group = obj.group_name
            case "DestroyWeightsUpdateGroupReqInput":
                self.group = ""
            case "BeginWeightUpdateReqInput" if success:
                self.in_session = True
            case "EndWeightUpdateReqInput":
                self.in_session = False
            case "UpdateWeightsFromDistributedReqInput" | "UpdateWeightFromDiskReqInput":
                not_flushed = said.startswith(NOT_FLUSHED)
                if success or not_flushed:
                    self.loaded += 1
                    self.complete, self.flushed = bool(obj.flush_cache), not not_flushed
            case "UpdateWeightVersionReqInput":  # the trainer's own end of an update that was not flushed
                self.flushed = True

    @property
    def late_version(self) -> str:
        """The version that the server's weights must yet be given; empty where they have theirs."""
        if self.loaded and not self.complete:
            return f"{self.version or 'unnamed'}{INCOMPLETE}"
        return self.version if self.complete and not self.flushed else ""


class UpdateWatch:
    """Keeps the lease of one tokenizer manager, and ends the updates of trainers that are gone."""

    def __init__(self) -> None:
        self._lease: _Lease | None = None
        self._under_way = 0
        # An event loop holds its tasks weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    async def noted(self, control: Coroutine[Any, Any, Any], obj: Any) -> Any:
        """Await a control method, and note what it did."""
        self._under_way += 1
        try:
            answer = await control
            if self._lease is not None:
                self._lease.note(obj, answer)
            return answer
        finally:
            self._under_way -= 1

    async def answer(self, call: LeaseCall, manager: Any, request: Any) -> dict[str, Any]:
        """Answer one call about the lease: ``leased`` says whether the caller has it.

        Args:
            call: what is asked.
            manager: SGLang's tokenizer manager.
            request: the HTTP request, whose connection ends with the trainer.
        """
        match call.step:
            case "take":
                leased = await self._take(call, manager, request)
            case "hold":
                leased = await self._hold(call, request)
            case "give_back":
                leased = self._give_back(call)
            case _:
                assert_never(call.step)
        return {"success": True, "message": "", "leased": leased}

    async def _take(self, call: LeaseCall, manager: Any, request: Any) -> bool:
        if getattr(manager.server_args, "tokenizer_worker_num", 1) > 1:
            return False  # each of several processes sees a part of an update
        while self._lease is not None:
            if self._lease.holder == call.holder:
                self._lease.takes += 1
                return True
            if await _is_gone(request):
                return False
            await asyncio.sleep(_POLL_S)
        self._lease = _Lease(call.holder, bool(manager.is_pause), time.monotonic() + LOST_S)
        task = asyncio.create_task(self._watch(self._lease, manager))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _hold(self, call: LeaseCall, request: Any) -> bool:
        until = time.monotonic() + call.hold_s
        while (lease := self._held_by(call)) is not None:
            # Of two calls at a time, one may be from before the version was chosen.
            lease.version, lease.deadline = call.version or lease.version, time.monotonic() + LOST_S
            if await _is_gone(request):
                lease.deadline = time.monotonic() + GRACE_S
                return False
            if time.monotonic() >= until:
                return True
            await asyncio.sleep(_POLL_S)
        return False

    def _give_back(self, call: LeaseCall) -> bool:
        lease = self._held_by(call)
        if lease is None:
            return False
        lease.takes -= 1
        if not lease.takes:
            self._lease = None
        return True

    def _held_by(self, call: LeaseCall) -> _Lease | None:
        lease = self._lease
        return lease if lease is not None and lease.holder == call.holder and lease.deadline else None

    async def _watch(self, lease: _Lease, manager: Any) -> None:
        while self._lease is lease:
            if time.monotonic() > lease.deadline:
                lease.deadline = 0.0  # whoever comes back now is told that it is too late
                try:
                    await self._end(lease, manager)
                finally:
                    self._lease = None
                return
            await asyncio.sleep(_POLL_S)

    async def _end(self, lease: _Lease, manager: Any) -> None:
        """End an update as its trainer would have: what it paused goes on, and weights are called what they are."""
        from sglang.srt.managers import io_struct

        # What the trainer asked for last may still run, and reads its files.
        while self._under_way:
            await asyncio.sleep(_POLL_S)
        state = "all" if lease.complete else "a part" if lease.loaded else "none"
        logger.warning(
            "torchrl_sglang_hidden: the trainer of weights %r is gone in the middle of its update, of which the server "
            "has %s; %s",
            lease.version,
            state,
            "update again: clients refuse the mixture" if state == "a part" else "requests go on",
        )
        if lease.in_session:
            await manager.end_weight_update(io_struct.EndWeightUpdateReqInput())
        if lease.group:
            await manager.destroy_weights_update_group(
                io_struct.DestroyWeightsUpdateGroupReqInput(group_name=lease.group)
            )
        if lease.late_version:
            if not manager.is_pause:
                await manager.pause_generation(io_struct.PauseGenerationReqInput(mode="retract"))
            flushed = (await manager.flush_cache()).success
            # Prefixes of the old weights in the cache make a mixture too.
            version = lease.late_version if flushed else f"{lease.late_version.removesuffix(INCOMPLETE)}{INCOMPLETE}"
            await manager.update_weight_version(
                io_struct.UpdateWeightVersionReqInput(new_version=version, abort_all_requests=False)
            )
        if manager.is_pause and not lease.was_paused:
            await manager.continue_generation(io_struct.ContinueGenerationReqInput(torch_empty_cache=False))
        await asyncio.to_thread(_remove_files)


def _remove_files() -> None:
    remove_leftovers()
    sweep()


async def _is_gone(request: Any) -> bool:
    return request is not None and bool(await request.is_disconnected())
