"""Samples that race: more are asked for than are kept, and who ends too late is aborted.

Knows requests and completions only: any engine samples them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.loop_thread import ABORT_TIMEOUT_S, LoopThread
from torchrl_sglang_hidden.engines.row_errors import numbered, renumber
from torchrl_sglang_hidden.errors import SGLangHiddenError
from torchrl_sglang_hidden.records import Completion, Request

__all__ = ["first_to_end"]


def first_to_end(engine: Engine, groups: Sequence[Sequence[Request]], keep: int) -> list[Completion]:
    """Generate each group's requests side by side, and return those that end first; the others are aborted.

    Every request is sent by itself, and to give up waiting for it aborts it on the server.

    Args:
        engine: generates.
        groups: the requests, such as all samples of one prompt. Each group is a race of its own.
        keep: completions of each group that are returned.

    Returns:
        ``len(groups) * keep`` completions, group by group, each group in the order of its requests. A completion with
        an ``error`` is kept only where fewer than ``keep`` others end.

    Raises:
        InputError: a request that must not be sent; nothing was.
        EngineError, SpanError, ConstraintError, AlignmentError: see `Engine.generate`.
    """
    loop = asyncio.new_event_loop()
    try:
        return LoopThread(loop).run(lambda: _race(engine, groups, keep))
    finally:
        loop.close()


async def _race(engine: Engine, groups: Sequence[Sequence[Request]], keep: int) -> list[Completion]:
    calls = [asyncio.ensure_future(_race_of_one(engine, number, group, keep)) for number, group in enumerate(groups)]
    try:
        return [completion for kept in await asyncio.gather(*calls) for completion in kept]
    finally:
        try:
            await _give_up(calls)
        finally:
            # Each request under way had a connection, and this event loop ends with the race.
            await engine.close_event_loop()


async def _race_of_one(engine: Engine, number: int, requests: Sequence[Request], keep: int) -> list[Completion]:
    calls = [asyncio.ensure_future(engine.agenerate([request])) for request in requests]
    ended: dict[int, Completion] = {}
    pending: set[asyncio.Future[list[Completion]]] = set(calls)
    try:
        while pending and sum(one.error is None for one in ended.values()) < keep:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ended |= {index: call.result()[0] for index, call in enumerate(calls) if call in done}
    except SGLangHiddenError as error:
        error.completions = ()
        raise renumber(error, lambda _: number) from error
    finally:
        await _give_up(calls)
    # `ended` is in the order in which they ended.
    kept = sorted(sorted(ended, key=lambda index: ended[index].error is not None)[:keep])
    return [numbered(ended[index], lambda _, place=place: number * keep + place) for place, index in enumerate(kept)]  # type: ignore[misc]


async def _give_up(calls: Sequence[asyncio.Future[list[Completion]]]) -> None:
    """Cancel what has not ended, and wait until its requests are aborted."""
    late = [call for call in calls if not call.done()]
    for call in late:
        call.cancel()
    if late:
        await asyncio.wait(late, timeout=ABORT_TIMEOUT_S)
    for call in calls:
        # Looked at, so that asyncio does not print the failures of those that lost to the first one.
        if call.done() and not call.cancelled():
            call.exception()
