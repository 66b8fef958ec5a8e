"""Streamed responses: SGLang's growing answers become `StreamChunk`s, and the last answer a `Completion`.

SGLang sends the whole response so far with every token. Knows nothing of how the answers travel.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from torchrl_sglang_hidden.engines.meter import Meter
from torchrl_sglang_hidden.errors import AlignmentError, CapabilityError, EngineError, InputError, ProtocolError
from torchrl_sglang_hidden.protocol import excerpt
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.fields import read_ids
from torchrl_sglang_hidden.sglang_api.log_probs import read_log_probs
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.sglang_api.streamed_scores import StreamedScores

__all__ = ["AsyncStream", "Stream", "StreamChunk", "check_stream"]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """The part of a response that came after the previous chunk. All chunks joined are the response.

    Args:
        ids: the N new response ids: one, or more where the reader was slower than the engine.
        text: the new text. Empty while the text may still be the start of a stop string, or half of a character.
        log_probs_T: log-probs of the new ids, float32 ``[N]``; None when not asked for.
        scores: what heads gave the new ids, float32 ``[N]`` by the heads' names, NaN for one that is infinite; those
            that ``HeadSpec(pooling=…)`` pools are in the completion alone.
    """

    ids: tuple[int, ...]
    text: str
    log_probs_T: torch.Tensor | None
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict)


def check_stream(request: Request, info: EngineInfo, *, cumulative: bool) -> None:
    """Refuse requests and engines that cannot stream.

    Args:
        request: the request to stream.
        info: the engine's `EngineInfo`.
        cumulative: whether the engine sends the whole response so far with every token.

    Raises:
        InputError: a request that generates nothing, or that asks for the prompt's log-probs.
        CapabilityError: hidden states without the server half, or an engine that streams increments.
    """
    if request.reads_only:
        raise InputError("max_new_tokens=0 generates nothing that could be streamed; use generate")
    if request.score_prompt:
        raise InputError(
            "score_prompt=True in a stream: SGLang would send the log-probs of all prompt tokens again with every new "
            "token; use generate"
        )
    if request.hidden is not None and not info.pools_in_server:
        raise CapabilityError(
            "hidden states are asked for in a stream, and the engine has no torchrl_sglang_hidden server half: SGLang "
            "would send all states so far again with every token; start it with `torchrl-sglang-hidden serve`, use "
            "generate, or pass hidden=None"
        )
    if not cumulative:
        raise CapabilityError(
            "the engine was started with --incremental-streaming-output, which cuts up what the server half adds to an "
            "answer; start it without"
        )


class _Reader:
    """Cuts growing answers into chunks, and checks that each answer begins with the answer before it."""

    def __init__(self, request: Request, info: EngineInfo, meter: Meter | None) -> None:
        self._request, self._info = request, info
        self._meter = meter or Meter.of_nobody()
        self._ids: tuple[int, ...] = ()
        self._text = ""
        self._scores = StreamedScores(request.heads)
        self._rid: Any = None
        self._completion: Completion | None = None
        self._over = ""

    @property
    def completion(self) -> Completion:
        if self._completion is None:
            raise EngineError(
                f"no completion after {len(self._ids)} tokens: {self._over or 'read the stream to its end first'}"
            )
        return self._completion

    def begin(self) -> None:
        """Count the request, which is on its way."""
        self._meter.tally.add(requests=1)

    def end(self, why: str) -> None:
        """Note why there will be no completion; only the first reason is kept."""
        self._over = self._over or why

    def fail(self, error: BaseException) -> None:
        """Note the error that the stream ends with, and count it."""
        self._meter.failed(error)
        self.end(f"the stream failed with {type(error).__name__}: {error}")

    def check_complete(self) -> None:
        """Check, after the last answer, that the response ended.

        Raises:
            ProtocolError: the answers ended before the response.
        """
        if self._completion is None and not self._over:
            self.end("the engine ended the stream before the response")
            raise ProtocolError(
                f"the stream ended after {len(self._ids)} tokens without a finish reason; look at the engine's log"
            )

    def read(self, row: Any) -> StreamChunk:
        try:
            ids, text = read_ids(row["output_ids"], self._info.vocab_size), row["text"]
            meta = row["meta_info"]
            rid, finish = meta["id"], meta["finish_reason"]
            self._rid = rid if self._rid is None else self._rid
            if not isinstance(rid, str) or rid != self._rid:
                raise ValueError(f"it answers {excerpt(rid)}, and {excerpt(self._rid)} before")
            name = f"request {rid}"
            entries = meta["output_token_logprobs"] if self._request.return_log_probs else None
            if self._request.return_log_probs and entries is None and finish is None:
                raise ValueError("its log-probs are null")
            goes_on = ids[: len(self._ids)] == self._ids and text.startswith(self._text)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong = f"lacks {error}" if isinstance(error, KeyError) else f"is wrong, {error}"
            raise ProtocolError(
                f"a part of a stream {wrong}: {excerpt(row, 200)}; is that an SGLang server of a version that "
                "this package supports?"
            ) from error
        if not goes_on:
            raise AlignmentError(
                f"{name}: the stream takes back what it said: {len(ids)} tokens that do not start with the "
                f"{len(self._ids)} before; this is a fault of the engine, please report it"
            )
        start, before = len(self._ids), len(self._text)
        last = self._scores.read(name, meta)
        if finish is not None:
            whole = {**row, "meta_info": last}
            self._completion = read_responses([self._request], [whole], self._info)[0]
            self._meter.took([self._completion])
            scores = self._scores.end(name, self._completion, start)
            every_T = self._completion.log_probs_T
            log_probs_T = None if every_T is None else every_T[start:]
        else:
            log_probs_T = None if entries is None else read_log_probs(name, "output", entries, ids, start=start)
            scores = self._scores.of(name, start, len(ids))
        self._ids, self._text = ids, text
        return StreamChunk(ids[start:], text[before:], log_probs_T, scores)


class Stream(Iterator[StreamChunk]):
    """An iterator over one response as it is generated; afterwards `completion` is the whole response.

    The engine generates whether or not the stream is read; tokens that came since the last read are one chunk. Closing
    the stream, leaving its ``with`` block or dropping the last reference before the end closes the connection, and
    SGLang then drops the request. For one thread at a time.

    Args:
        rows: yields once when the request is on its way, then each of SGLang's answers.
        request: the request that was sent.
        info: the engine's `EngineInfo`.
        meter: counts the request once it is on its way, see `Meter.opening`; None for an engine that counts nothing.
    """

    def __init__(
        self, rows: Generator[Any, None, None], request: Request, info: EngineInfo, meter: Meter | None = None
    ) -> None:
        self._rows, self._reader = rows, _Reader(request, info, meter)
        next(rows)
        self._reader.begin()

    @property
    def completion(self) -> Completion:
        """The whole response with its pooled states, checked as `Engine.generate` checks.

        Raises:
            EngineError: the stream was not read to its end, was closed before, or failed.
        """
        return self._reader.completion

    def __next__(self) -> StreamChunk:
        try:
            row = next(self._rows, None)
            if row is not None:
                return self._reader.read(row)
            self._reader.check_complete()
        except BaseException as error:
            self._reader.fail(error)
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Stop reading, whereupon SGLang drops the request; a second call does nothing."""
        self._reader.end("the stream was closed before the response ended")
        self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(AsyncIterator[StreamChunk]):
    """A `Stream` for ``async for``; made by `Engine.astream`. Cancelling the task that reads it closes it."""

    def __init__(
        self, rows: AsyncGenerator[Any, None], request: Request, info: EngineInfo, meter: Meter | None = None
    ) -> None:
        self._rows, self._reader = rows, _Reader(request, info, meter)

    @classmethod
    async def open(
        cls, rows: AsyncGenerator[Any, None], request: Request, info: EngineInfo, meter: Meter | None = None
    ) -> Self:
        """Wait until the request is on its way; see `Stream` for the arguments."""
        stream = cls(rows, request, info, meter)
        await anext(rows)
        stream._reader.begin()
        return stream

    @property
    def completion(self) -> Completion:
        """See `Stream.completion`."""
        return self._reader.completion

    async def __anext__(self) -> StreamChunk:
        try:
            row = await anext(self._rows, None)
            if row is not None:
                return self._reader.read(row)
            self._reader.check_complete()
        except BaseException as error:
            self._reader.fail(error)
            await self.aclose()
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `Stream.close`."""
        self._reader.end("the stream was closed before the response ended")
        await self._rows.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
