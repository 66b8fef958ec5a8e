"""Keeps what fails in a control request, such as a profile's or a session's, from ending SGLang's scheduler.

The scheduler answers such a request by an object of the class that the request's own answer has. Where its handler
raises, it answers by one that says why, in a field that SGLang leaves empty; the tokenizer manager raises that, which
every route answers with status 400. A request that has begun to write new weights is left out: a model with a half of
them must not go on.

Knows SGLang's scheduler and tokenizer manager by attribute name; imports of SGLang are inside functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from torchrl_sglang_hidden.errors import InputError

__all__ = ["AFTER_CONTROL", "AROUND_CONTROL"]

logger = logging.getLogger(__name__)

# Stands before the reason in the field `rid` of an answer, which answers to control requests do not use.
_REFUSED = "torchrl_sglang_hidden refuses: "
# What writes weights. An error in the middle leaves a model that is neither the old one nor the new one.
_WRITES = frozenset(
    {
        "UpdateWeightFromDiskReqInput",
        "UpdateWeightsFromDistributedReqInput",
        "UpdateWeightsFromTensorReqInput",
        "UpdateWeightsFromIPCReqInput",
        "BeginWeightUpdateReqInput",
        "EndWeightUpdateReqInput",
    }
)
# What `request_isolation` looks after.
_PROMPTS = frozenset(
    {
        "TokenizedGenerateReqInput",
        "TokenizedEmbeddingReqInput",
        "BatchTokenizedGenerateReqInput",
        "BatchTokenizedEmbeddingReqInput",
    }
)


# Most seconds before each step that a test of the server may ask for: SGLang's watchdog ends a server after 300, and
# its event loop ends on a number that is too large for a clock.
_MAX_SLEEP_S = 60.0


class _NothingChangedError(InputError):
    """A request that would write weights and has written none."""


def after_init_dispatcher(result: None, scheduler: Any) -> None:
    """Let the scheduler's handlers of control requests raise."""
    original = scheduler._request_dispatcher

    def dispatch(recv_req: Any) -> Any:
        name = type(recv_req).__name__
        if name in _PROMPTS:
            return original(recv_req)
        try:
            _check_values(recv_req)
            return original(recv_req)
        except Exception as error:  # SGLang's scheduler ends on any
            logger.exception("torchrl_sglang_hidden: %s failed", name)
            if name in _WRITES and not isinstance(error, _NothingChangedError):
                raise
            return _answer_of(name, recv_req, f"{_REFUSED}{name} failed: {error!r:.400}; see the server's log")

    scheduler._request_dispatcher = dispatch


def around_deserialize(original: Callable[..., Any], worker: Any, serialized: Any) -> Any:
    """Say that tensors which cannot be read have changed nothing."""
    try:
        return original(worker, serialized)
    except Exception as error:  # whatever the bytes come to
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().tp_size > 1:
            raise  # another rank may have read its own, and wait for this one
        raise _NothingChangedError(
            f"serialized_named_tensors cannot be read ({error!r:.200}); send what SGLang's own serializer writes"
        ) from error


def around_profile_step(original: Callable[..., None], profiler: Any, batch: Any) -> None:
    """End a profile that fails while a step begins: its directory is gone, say, or the disk is full."""
    try:
        original(profiler, batch)
    except Exception:  # SGLang's scheduler ends on any
        logger.exception("torchrl_sglang_hidden: a profile failed, and is ended")
        _end_profile(profiler)
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().tp_size > 1:
            raise  # another rank may wait for this one where profiles end


def _end_profile(profiler: Any) -> None:
    """Let no later step go on with a profile."""
    running = getattr(profiler, "torch_profiler", None)
    if running is not None:
        with suppress(Exception):  # what failed may have stopped it
            running.stop()
    profiler.torch_profiler = None
    profiler.profile_in_progress = profiler.profile_by_stage = False
    profiler.profiler_start_forward_ct = profiler.profiler_target_forward_ct = None
    if hasattr(profiler, "_profile_manager"):  # SGLang's other profiler, which an environment variable chooses
        trigger = profiler._profile_manager.stage_based_trigger
        trigger.stage_configs.clear()
        trigger.running_state = None


async def around_control(original: Callable[..., Coroutine[Any, Any, Any]], communicator: Any, obj: Any) -> Any:
    """Raise what the scheduler refuses.

    Raises:
        ValueError: with the reason; an HTTP exception of status 400 too, for the routes that know no other.
    """
    answers = await original(communicator, obj)
    for answer in answers:
        reason = getattr(answer, "rid", None)
        if isinstance(reason, str) and reason.startswith(_REFUSED):
            raise _refused_class()(400, reason.removeprefix(_REFUSED))
        # SGLang raises what its routes answer with status 500 and no reason.
        if type(answer).__name__ == "ProfileReqOutput" and not answer.success:
            raise _refused_class()(400, answer.message)
    return answers


@cache
def _refused_class() -> type[Exception]:
    from starlette.exceptions import HTTPException

    class RefusedControlError(HTTPException, ValueError):
        """A control request that was refused."""

        def __str__(self) -> str:
            return str(self.detail)

    return RefusedControlError


def _check_values(recv_req: Any) -> None:
    """Check what a handler would find out too late: in the middle of its work, or in a later step."""
    match type(recv_req).__name__:
        case "UpdateWeightFromDiskReqInput" if recv_req.load_format is not None:
            from sglang.srt.configs.load_config import LoadFormat

            known = [str(one.value) for one in LoadFormat]
            if recv_req.load_format not in known:
                raise _NothingChangedError(f"load_format={recv_req.load_format!r:.80}: expected one of {known}")
        case "SlowDownReqInput" if recv_req.forward_sleep_time is not None:
            if not recv_req.forward_sleep_time <= _MAX_SLEEP_S:
                raise InputError(
                    f"forward_sleep_time={recv_req.forward_sleep_time!r:.80}: expected at most {_MAX_SLEEP_S:g} "
                    "seconds, or null for none"
                )
        case "ProfileReq" if recv_req.profile_by_stage and recv_req.num_steps is None:
            # The next step compares with it, and ends the scheduler.
            raise InputError("profile_by_stage=true without num_steps; pass how many steps of each stage to profile")
        case "ProfileReq" if recv_req.output_dir is not None:
            # The step that ends the profile writes it.
            try:
                Path(recv_req.output_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"output_dir={recv_req.output_dir!r:.200} cannot be written to ({error}); pass another"
                ) from error


def _answer_of(name: str, recv_req: Any, reason: str) -> Any:
    """Return an object of the class that answers a request, with the reason; None where nobody waits for one."""
    from sglang.srt.managers import io_struct

    made = next(
        (
            getattr(io_struct, found)
            for found in (f"{name}Output", name.replace("Input", "Output"))
            if found != name and hasattr(io_struct, found)
        ),
        None,
    )
    if made is None:
        return None
    fields: dict[str, Any] = {"rid": reason}
    for field in msgspec.structs.fields(made):
        if field.required:
            blanks: tuple[Any, ...] = (getattr(recv_req, field.name, False), False, None, reason, 0, [], {})
            fields[field.name] = next(blank for blank in blanks if _fits(blank, field.type))
    return made(**fields)


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


_PROFILER = "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
AFTER_CONTROL: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher": after_init_dispatcher,
}
AROUND_CONTROL: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.communicator.FanOutCommunicator.__call__": around_control,
    "sglang.srt.managers.tp_worker.BaseTpWorker.deserialize_own_rank": around_deserialize,
    f"{_PROFILER}._profile_batch_predicate": around_profile_step,
}
