"""What holds for the streams of every engine: `StreamContract`, which the tests of each engine inherit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engine_contract import BAD_ROWS, assert_same, prompt_of, request
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.engines.streams import AsyncStream, StreamChunk
from torchrl_sglang_hidden.errors import (
    EngineError,
    InputError,
)
from torchrl_sglang_hidden.records import Completion


def assert_adds_up(chunks: list[StreamChunk], completion: Completion) -> None:
    """Check that the chunks, put together, are exactly the completion: they are the same numbers."""
    assert sum((chunk.ids for chunk in chunks), ()) == completion.response_ids
    assert "".join(chunk.text for chunk in chunks) == completion.text
    log_probs = [chunk.log_probs_T for chunk in chunks if chunk.log_probs_T is not None]
    if completion.log_probs_T is None:
        assert log_probs == []
        return
    assert all(part_T.dtype == torch.float32 for part_T in log_probs)
    assert [len(part_T) for part_T in log_probs] == [len(chunk.ids) for chunk in chunks]
    assert torch.equal(torch.cat(log_probs), completion.log_probs_T)


async def collect(stream: AsyncStream) -> list[StreamChunk]:
    return [chunk async for chunk in stream]


class StreamContract:
    """What holds for the streams of every engine. A subclass gives the fixture `engine`."""

    def test_chunks_add_up_to_the_completion_that_generate_gives(self, engine: Engine) -> None:
        one = request(prompt_of(engine, 9, seed=1))
        stream = engine.stream(one)
        chunks = list(stream)
        assert len(chunks) > 1
        assert_adds_up(chunks, stream.completion)
        assert_same(stream.completion, engine.generate([one])[0])

    def test_awaited_it_is_the_same(self, engine: Engine) -> None:
        one = request(prompt_of(engine, 9, seed=1))

        async def run() -> tuple[list[StreamChunk], Completion]:
            async with await engine.astream(one) as stream:
                return await collect(stream), stream.completion

        chunks, completion = asyncio.run(run())
        assert len(chunks) > 1
        assert_adds_up(chunks, completion)
        assert_same(completion, engine.generate([one])[0])

    def test_without_log_probs_and_states_there_are_none(self, engine: Engine) -> None:
        one = request(prompt_of(engine, 5, seed=2), hidden=None, log_probs=False)
        stream = engine.stream(one)
        chunks = list(stream)
        assert_adds_up(chunks, stream.completion)
        assert stream.completion.log_probs_T is None
        assert stream.completion.hidden == {}

    def test_several_are_read_in_turns(self, engine: Engine) -> None:
        requests = [request(prompt_of(engine, 3 + 2 * row, seed=10 + row)) for row in range(4)]
        streams = [engine.stream(one) for one in requests]
        chunks: list[list[StreamChunk]] = [[] for _ in streams]
        reading = dict(enumerate(streams))
        while reading:
            for row, stream in list(reading.items()):
                chunk = next(stream, None)
                if chunk is None:
                    del reading[row]
                else:
                    chunks[row].append(chunk)
        for stream, parts, one in zip(streams, chunks, requests, strict=True):
            assert_adds_up(parts, stream.completion)
            assert_same(stream.completion, engine.generate([one])[0])

    def test_the_completion_is_there_at_the_end_only(self, engine: Engine) -> None:
        stream = engine.stream(request(prompt_of(engine, 9, seed=1)))
        next(stream)
        with pytest.raises(EngineError, match=r"no completion after \d+ tokens: read the stream to its end first"):
            stream.completion  # noqa: B018
        chunks = list(stream)
        assert chunks
        completion = stream.completion
        assert next(stream, None) is None
        stream.close()
        assert stream.completion is completion

    def test_a_closed_one_ends_and_says_so(self, engine: Engine) -> None:
        with engine.stream(request(prompt_of(engine, 9, seed=1))) as stream:
            next(stream)
        stream.close()
        assert list(stream) == []
        with pytest.raises(EngineError, match=r"after \d+ tokens: the stream was closed before the response ended"):
            stream.completion  # noqa: B018

    def test_a_closed_awaited_one_too(self, engine: Engine) -> None:
        async def run() -> AsyncStream:
            async with await engine.astream(request(prompt_of(engine, 9, seed=1))) as stream:
                await anext(stream)
            await stream.aclose()
            assert await collect(stream) == []
            return stream

        stream = asyncio.run(run())
        with pytest.raises(EngineError, match=r"after \d+ tokens: the stream was closed"):
            stream.completion  # noqa: B018

    @pytest.mark.parametrize("bad", BAD_ROWS)
    def test_what_must_not_be_sent_is_refused(self, engine: Engine, bad: str) -> None:
        make, kind, message = BAD_ROWS[bad]
        with pytest.raises(kind, match=message.replace("row 1", "row 0")):
            engine.stream(make(engine))
        with pytest.raises(kind, match=message.replace("row 1", "row 0")):
            asyncio.run(engine.astream(make(engine)))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens=0 generates nothing"),
            ({"score_prompt": True}, "score_prompt=True in a stream"),
        ],
    )
    def test_what_a_stream_cannot_give_is_refused(self, engine: Engine, changes: dict[str, Any], message: str) -> None:
        one = replace(request(prompt_of(engine, 5, seed=2), hidden=None), **changes)
        with pytest.raises(InputError, match=message):
            engine.stream(one)
        with pytest.raises(InputError, match=message):
            asyncio.run(engine.astream(one))
