"""The vector service's way into SGLang: off unless asked for, and a route only where a server answers."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.service import plugin

SERVER = "sglang.srt.entrypoints.http_server"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what is registered with SGLang's registry. Importing the real one takes seconds and a CUDA wheel."""
    calls: list[Any] = []
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = sys.modules["sglang.srt.plugins.hook_registry"]
    registry.HookType = SimpleNamespace(AFTER="after")
    registry.HookRegistry = SimpleNamespace(register=lambda *call: calls.append(call))
    sys.modules["sglang"].__version__ = "0.5.23"
    monkeypatch.setenv(PLUGIN_ENV, "1")
    return calls


def test_opted_in_it_registers_its_hook(registered: list[Any]) -> None:
    plugin.register()
    assert registered == [(target, hook, "after") for target, hook in plugin.HOOKS.items()]
    assert len(registered) == 5


def test_it_stays_off_in_another_sglang(registered: list[Any]) -> None:
    sys.modules["sglang"].__version__ = "0.6.0"
    plugin.register()
    assert registered == []


@pytest.mark.parametrize("value", [None, "0", "true"])
def test_it_does_nothing_unless_opted_in(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it raises
    if value is None:
        monkeypatch.delenv(PLUGIN_ENV, raising=False)
    else:
        monkeypatch.setenv(PLUGIN_ENV, value)
    plugin.register()


def test_sglang_finds_it() -> None:
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="torchrl_sglang_hidden_service")
    assert entry.value == "torchrl_sglang_hidden.service.plugin:register"


def test_a_process_without_a_server_gets_no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it raises
    monkeypatch.delitem(sys.modules, SERVER, raising=False)
    plugin.after_manager(None, SimpleNamespace(), "server_args", "port_args")


def test_a_server_gets_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Starlette()
    chats = "sglang.srt.entrypoints.openai.serving_chat"
    for name in ("sglang", "sglang.srt", "sglang.srt.entrypoints", "sglang.srt.entrypoints.openai", chats, SERVER):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    server: Any = sys.modules[SERVER]
    server.app, server.GenerateReqInput, server.model_info, server.server_info = app, None, None, None
    for name in ("Detokenize", "Tokenize", "Score"):
        setattr(server, f"OpenAIServing{name}", type(name, (), {}))
    sys.modules[chats].OpenAIServingChat = type("Chat", (), {"_process_messages": None})
    theirs = ("handle_chat", "_stream_chat_response", "_stream_generate_response")
    server.OllamaServing = type("Ollama", (), dict.fromkeys(theirs))
    sys.modules["sglang.srt.entrypoints"].http_server = server
    args = SimpleNamespace(host="127.0.0.1", api_key="sesame", admin_api_key=None, enable_metrics=False)
    plugin.after_manager(None, SimpleNamespace(server_args=args), "server_args", "port_args")

    async def refuse(http: object) -> None:
        raise ValueError("Unsupported tool_call_parser: x")

    app.add_route("/theirs", refuse, methods=["POST"])

    async def post(path: str, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
            return await client.post(path, json={}, headers=headers)

    response = asyncio.run(post("/v1/hidden_states"))
    assert response.status_code == 401, "without the guard nothing asks for the key here"
    for path, words in (("/v1/hidden_states", "no 'input'"), ("/theirs", "Unsupported tool_call_parser: x")):
        response = asyncio.run(post(path, Authorization="Bearer sesame"))
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]


def test_keys_are_hidden_where_sglang_shows_its_arguments() -> None:
    shown = {"api_key": "sesame", "admin_api_key": "open", "ssl_keyfile_password": None, "host": "127.0.0.1"}
    hidden = {**shown, "api_key": "***", "admin_api_key": "***"}
    assert plugin.after_resolved_dict(shown, SimpleNamespace()) == hidden
    assert shown["api_key"] == "sesame", "SGLang goes on with its own"
