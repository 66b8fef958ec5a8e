"""What SGLang's routes would fail on is refused before they begin: long texts, reserved names, ragged tensors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from torchrl_sglang_hidden.service import route_checks

WIDTH, MOST = 3, 200


class Chat(BaseModel):
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stop: str = ""


class Handler:
    """One of SGLang's, with the tokenizer manager that all have."""

    def __init__(self) -> None:
        self.tokenizer_manager = SimpleNamespace(
            model_config=SimpleNamespace(vocab_size=10, hidden_size=WIDTH),
            tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0, "aaaa": 1}),
            allow_auto_truncate=False,
            context_len=25,
        )


class Tokenize(Handler):
    pass


class Score(Handler):
    pass


class Detokenize(Handler):
    pass


class Chats(Handler):
    def _process_messages(self, request: Any, is_multimodal: bool) -> str:
        return f"processed {is_multimodal}"


class Ollama(Handler):
    pieces: tuple[Any, ...] = (b"1", b"2")

    async def handle_chat(self, request: Any, raw_request: Any) -> str:
        return "handled"

    async def _stream_chat_response(self, request: Any, raw_request: Any, name: str) -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        return StreamingResponse(stream())

    _stream_generate_response = _stream_chat_response


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    route_checks.install_checks(
        SimpleNamespace(
            OpenAIServingTokenize=Tokenize,
            OpenAIServingDetokenize=Detokenize,
            OpenAIServingScore=Score,
            OllamaServing=Ollama,
        ),
        Chats,
    )


def refusal(handler: Any, **fields: Any) -> str | None:
    said: str | None = handler._validate_request(SimpleNamespace(**fields))
    return said


def test_ids_that_no_token_has_are_not_decoded() -> None:
    for tokens, words in (
        ([], None),
        ([0, 9], None),
        ([[0], [], [9]], None),
        ([5, -1], "row 0: token id -1 at position 1 is outside the vocabulary of 10"),
        ([[5], [10]], "row 1: token id 10 at position 0 is outside the vocabulary of 10"),
    ):
        said = refusal(Detokenize(), tokens=tokens)
        assert (said is None) == (words is None)
        assert words is None or (said is not None and words in said)


def test_texts_that_fit_no_context_are_not_tokenized() -> None:
    for prompt in (None, "", "a" * MOST, ["a" * 150, "a" * 50]):
        assert refusal(Tokenize(), prompt=prompt) is None
    for long in ("a" * (MOST + 1), ["a" * 150, "a" * 51]):
        said = refusal(Tokenize(), prompt=long)
        assert said is not None
        assert f"the texts have 201 characters, over the limit of {MOST}" in said


def score(**fields: Any) -> str | None:
    plain = {"query": [5], "items": [[6]], "query_embed_overrides": None, "item_embed_overrides": None}
    return refusal(Score(), **{**plain, **fields})


def test_embeddings_that_cannot_be_stacked() -> None:
    good = [1.0] * WIDTH
    assert score() is None
    assert score(query_embed_overrides=[good, good], item_embed_overrides=[None, [good]]) is None
    for fields, words in (
        ({"query_embed_overrides": [good, [1.0]]}, "query_embed_overrides has 1 numbers at position 1; expected 3"),
        ({"item_embed_overrides": [None, [good[1:]]]}, "item_embed_overrides[1] has 2 numbers at position 0"),
        ({"query": "a" * 150, "items": ["a" * 51]}, "query and items have 201 characters"),
        ({"query": [5], "items": "a" * 201}, "query and items have 201 characters"),
    ):
        said = score(**fields)
        assert said is not None
        assert words in said
    assert score(query="a" * 100, items=["a" * 100]) is None
    assert score(query=None, items=None) is None


def test_chats_that_fit_no_context() -> None:
    image = {"type": "image_url", "image_url": {"url": "x" * 1000}}
    short = Chat(messages=[{"role": "user", "content": [{"text": "a" * 9}]}], stop="a" * 1000)
    with_image = Chat(messages=[{"content": [image]}])
    for good in (short, with_image):
        assert Chats()._process_messages(good, True) == "processed True"
    nested: Any = "a"
    for _ in range(5000):
        nested = [nested]
    too_long: tuple[tuple[str, Any], ...] = (
        ("messages", [{"content": "a" * MOST}]),
        ("messages", [{"content": [{"type": "text", "text": "a" * MOST}]}]),
        ("messages", [{"content": "a"}] * MOST),
        ("tools", [{"a" * MOST: 1}]),
        ("chat_template_kwargs", {"documents": ["a" * MOST]}),
    )
    for field, value in too_long:
        with pytest.raises(ValueError, match=f"messages and tools, .* have .* characters, over the limit of {MOST}"):
            Chats()._process_messages(Chat.model_validate({field: value}), False)
    assert route_checks._count_characters(nested) == 1


@pytest.mark.parametrize("name", ["tokenize", "messages", "add_generation_prompt", "return_dict", "tools"])
def test_arguments_of_a_template_that_are_the_servers_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}'"):
        Chats()._process_messages(Chat(chat_template_kwargs={name: 1, "enable_thinking": True}), False)
    assert Chats()._process_messages(Chat(chat_template_kwargs={"enable_thinking": True}), False) == "processed False"


def test_chats_of_ollamas_kind() -> None:
    def send(*texts: str) -> str:
        request = SimpleNamespace(messages=[SimpleNamespace(content=text) for text in texts])
        return asyncio.run(Ollama().handle_chat(request, None))

    assert send("a" * 100, "a" * 100) == "handled"
    with pytest.raises(ValueError, match=r"the messages have 201 characters"):
        send("a" * 100, "a" * 101)


@pytest.mark.parametrize("name", ["_stream_chat_response", "_stream_generate_response"])
def test_a_stream_that_is_refused_is_no_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> list[Any]:
        response = await getattr(Ollama(), name)(None, None, "a model")
        return [piece async for piece in response.body_iterator]

    for pieces in ((b"1", b"2", b"3"), (b"1",), ()):
        monkeypatch.setattr(Ollama, "pieces", pieces)
        assert asyncio.run(read()) == list(pieces)
    monkeypatch.setattr(Ollama, "pieces", (ValueError("row 0: top_k=-9"), b"1"))

    async def begin() -> None:
        await getattr(Ollama(), name)(None, None, "a model")

    with pytest.raises(ValueError, match="row 0: top_k=-9"):
        asyncio.run(begin())
