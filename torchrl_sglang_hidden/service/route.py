"""Answers ``POST /v1/hidden_states``: from the body of a request to vectors, or to an error that says what is wrong.

The API key is checked before, by SGLang's own middleware. Knows nothing of the scheduler: what reaches it was checked
here, and what comes back is counted, as for every other client of this package.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, assert_never

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from torchrl_sglang_hidden.errors import (
    CapabilityError,
    InputError,
    RequestAbortedError,
    RequestRejectedError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.images.expansion import ImageProcessor
from torchrl_sglang_hidden.records import Completion, EngineInfo, Images, Request
from torchrl_sglang_hidden.service.answer import as_bytes, as_json
from torchrl_sglang_hidden.service.body import Encoding, VectorRequest, read_body
from torchrl_sglang_hidden.service.image_prompts import has_images, image_prompt
from torchrl_sglang_hidden.service.prompts import prompt_ids
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.in_process import translated
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.sglang_api.server_info import read_info, warm_up

__all__ = ["MAX_BODY_BYTES", "MAX_VECTOR_BYTES", "PATH", "VectorService"]

PATH = "/v1/hidden_states"
JSON, BYTES = "application/json", "application/octet-stream"
# Most bytes of the vectors of one answer. As JSON they are five times as many, which are written while others wait.
MAX_VECTOR_BYTES = 64 * 2**20
# Most bytes of one request, which are held in memory and parsed. Images travel in it, as base64.
MAX_BODY_BYTES = 64 * 2**20
# A body over this is read in a thread: all of SGLang's HTTP waits for the event loop. So much takes a millisecond.
LARGE_BODY_BYTES = 2**16


class VectorService:
    """Answers requests for vectors, with the engine behind SGLang's HTTP server.

    Args:
        tokenizer_manager: SGLang's.
        make_input: makes SGLang's request object of a payload.
        model_info: returns what SGLang's ``/model_info`` answers.
        server_info: returns what SGLang's ``/server_info`` answers.
    """

    def __init__(
        self,
        tokenizer_manager: Any,
        make_input: Callable[..., Any],
        model_info: Callable[[], Awaitable[Mapping[str, Any]]],
        server_info: Callable[[], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self.tokenizer_manager, self._make_input = tokenizer_manager, make_input
        self._model_info, self._server_info = model_info, server_info
        self._info: EngineInfo | None = None
        self._processor: ImageProcessor | None = None
        self._reading, self._preparing = asyncio.Lock(), asyncio.Lock()

    async def respond(self, http: HTTPRequest) -> Response:
        """Answer one request: with vectors, or with a status and what is wrong with it."""
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != JSON:
            return _refusal(InputError(f"content-type {media_type!r:.80}: expected {JSON}; send this header"), 415)
        encoding: Encoding = "bytes" if BYTES in http.headers.get("accept", "").lower() else "float"
        try:
            body = await _receive(http)
            if body is None:
                return _refusal(
                    InputError(
                        f"the body has over {MAX_BODY_BYTES} bytes, the limit of one request; send fewer rows at a "
                        "time, or smaller images"
                    ),
                    413,
                )
            large = len(body) > LARGE_BODY_BYTES
            asked = await asyncio.to_thread(read_body, body, encoding) if large else read_body(body, encoding)
            completions = await self._generate(asked, http)
            # In a thread: all of SGLang's HTTP waits for this event loop.
            return await asyncio.to_thread(_write, asked, completions, self.tokenizer_manager.served_model_name)
        except SGLangHiddenError as error:
            return _refusal(error, _status_of(error))

    async def _generate(self, asked: VectorRequest, http: HTTPRequest) -> list[Completion]:
        manager = self.tokenizer_manager
        if asked.model not in (None, manager.served_model_name, manager.model_path):
            raise InputError(
                f"model={asked.model!r:.200} is not served here; name {manager.served_model_name!r}, or leave it out"
            )
        info = await self._read_info()
        _check_size(asked, info)
        requests = [
            Request(
                ids,
                sampling=asked.sampling,
                return_log_probs=False,
                hidden=asked.hidden,
                lora=asked.lora,
                priority=asked.priority,
                images=images,
            )
            for ids, images in await self._prompts(asked, info)
        ]
        check_requests(requests, info)
        answer = await self._send(to_payload(requests, info, binary=True), http)
        return read_responses(requests, answer, info)

    async def _prompts(self, asked: VectorRequest, info: EngineInfo) -> list[tuple[tuple[int, ...], Images | None]]:
        """Return the ids of each prompt, and its images."""
        rows = list(zip(asked.rows, asked.images or [()] * len(asked.rows), strict=True))
        tokenizer = self.tokenizer_manager.tokenizer
        # Some models' chat template is their processor's alone.
        if info.takes_images and (not tokenizer.chat_template or any(has_images(*row) for row in rows)):
            processor = await self._read_processor(info)
            # In a thread: an image takes long to decode, and all of SGLang's HTTP waits for this event loop. By turns,
            # since a fast tokenizer takes one caller at a time.
            async with self._preparing:
                return await asyncio.to_thread(
                    lambda: [image_prompt(number, *row, processor) for number, row in enumerate(rows)]
                )
        for number, (_, images) in enumerate(rows):
            if images:
                raise CapabilityError(
                    f"row {number}: {len(images)} images, and the model {info.model_path!r} takes text alone; leave "
                    "images out"
                )
        return [
            (prompt_ids(number, row, self.tokenizer_manager.tokenizer), None) for number, (row, _) in enumerate(rows)
        ]

    async def _read_processor(self, info: EngineInfo) -> ImageProcessor:
        """Return the model's processor, a copy: SGLang's own is in use in SGLang's own threads."""
        async with self._reading:
            if self._processor is None:
                own = await asyncio.to_thread(copy.deepcopy, self.tokenizer_manager.processor)
                self._processor = ImageProcessor(own, info.model_path, takes_images=True, max_images=info.max_images)
            return self._processor

    async def _read_info(self) -> EngineInfo:
        """Return the engine's description, read at the first request as a client reads it at connect."""
        async with self._reading:
            if self._info is None:
                server_info = await self._server_info()
                payload = warm_up(server_info)
                if payload is not None:
                    await self._send(payload, None)
                    server_info = await self._server_info()
                self._info = read_info(await self._model_info(), server_info, _refuse_model)
            return self._info

    async def _send(self, payload: dict[str, Any], http: HTTPRequest | None) -> Any:
        """Have SGLang generate, which aborts the requests when the client hangs up."""
        with translated():
            return await anext(self.tokenizer_manager.generate_request(self._make_input(**payload), http))


async def _receive(http: HTTPRequest) -> bytes | None:
    """Return the body of a request, or None where it is over the limit."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in http.stream():
        size += len(chunk)
        # The rest is let go, and not left unread: a client that still sends would miss the answer.
        if size > MAX_BODY_BYTES:
            chunks.clear()
        else:
            chunks.append(chunk)
    return b"".join(chunks) if size <= MAX_BODY_BYTES else None


def _refuse_model(model_path: str) -> NoReturn:
    raise CapabilityError(
        f"the server half of torchrl_sglang_hidden is not in place for the model {model_path!r}; look at the server's "
        "log"
    )


def _check_size(asked: VectorRequest, info: EngineInfo) -> None:
    """Refuse an answer of so many bytes that writing it would hold the server up."""
    num_vectors = len(asked.rows) * len(asked.hidden.segments) * len(asked.hidden.layer_ids)
    size = 4 * num_vectors * info.hidden_size
    if size > MAX_VECTOR_BYTES:
        raise InputError(
            f"{num_vectors} vectors of {info.hidden_size} numbers are {size / 2**20:.0f} MiB, over the limit of "
            f"{MAX_VECTOR_BYTES // 2**20} MiB for one answer; send fewer rows, segments or layers at a time"
        )


def _write(asked: VectorRequest, completions: list[Completion], model: str) -> Response:
    match asked.encoding:
        case "float":
            return Response(as_json(completions, asked.hidden.segments, model), media_type=JSON)
        case "bytes":
            data, headers = as_bytes(completions, asked.hidden.segments, model)
            return Response(data, headers=headers, media_type=BYTES)
        case unknown:
            assert_never(unknown)


def _status_of(error: SGLangHiddenError) -> int:
    match error:
        case InputError() | CapabilityError() | RequestRejectedError():
            return 400
        case RequestAbortedError():
            return 503
    return 500


def _refusal(error: SGLangHiddenError, status: int) -> Response:
    said = {"message": str(error), "type": type(error).__name__, "code": status}
    return Response(json.dumps({"error": said}), status, media_type=JSON)
