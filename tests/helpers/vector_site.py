"""The vector service over HTTP, with the fake engine in the place of SGLang's tokenizer manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from helpers.fake_engine import RecordingEngine, model_page, server_page, tiny_tokenizer
from torchrl_sglang_hidden.service.route import PATH, VectorService

MODEL = "models/tiny"


class Manager:
    """SGLang's tokenizer manager, as much of it as is called."""

    served_model_name, model_path = "tiny", MODEL

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.engine = RecordingEngine(tokenizer=self.tokenizer, binary=True)
        self.payloads: list[dict[str, Any]] = []
        self.error: Exception | None = None

    async def generate_request(self, given: SimpleNamespace, http: Any) -> AsyncGenerator[Any, None]:
        self.payloads.append(vars(given))
        if self.error is not None:
            raise self.error
        if "return_logprob" not in vars(given):
            yield []  # a warm-up, whose answer nobody reads
            return
        rows = self.engine.answer(vars(given))
        if self.engine.fault is not None:
            self.engine.fault(rows)
        yield rows


class Service:
    """The route in an application of its own, and the engine behind it."""

    def __init__(self) -> None:
        self.manager, self.page, self.described = Manager(), server_page(), 0
        self.service = VectorService(self.manager, SimpleNamespace, self.model_info, self.server_info)
        self.app = Starlette(routes=[Route(PATH, self.service.respond, methods=["POST"])])

    async def model_info(self) -> dict[str, Any]:
        return model_page(MODEL)

    async def server_info(self) -> dict[str, Any]:
        self.described += 1
        return self.page

    def send(self, *, method: str = "POST", **request: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await client.request(method, PATH, **request)

        return asyncio.run(call())

    def ask(self, **body: Any) -> httpx.Response:
        return self.send(json=body)

    def data(self, **body: Any) -> list[dict[str, Any]]:
        response = self.ask(**body)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = response.json()["data"]
        return found
