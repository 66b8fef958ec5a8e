"""Refuses what some of SGLang's routes would fail on, or hang on, before the tokenizer manager sees the request.

They read texts, chats and template arguments themselves: a text that fits no model holds up all requests while it is
tokenized, and what a template or a tensor does not take is answered with status 500, or in the middle of a stream.

Knows SGLang's route handlers by attribute name. What the tokenizer manager refuses is in ``server.request_guard``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from torchrl_sglang_hidden.errors import InputError, PromptLengthError, TokenIdError
from torchrl_sglang_hidden.server.request_checks import most_characters
from torchrl_sglang_hidden.spec.request_rules import check_prompt_ids

__all__ = ["install_checks", "refuse_ids", "refuse_overrides", "refuse_texts"]

# What SGLang itself passes to `apply_chat_template`, or what makes of its ids something else.
_OF_THE_SERVER = frozenset(
    {
        "add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages", "padding",
        "return_assistant_tokens_mask", "return_dict", "return_tensors", "self", "tokenize", "tokenizer_kwargs",
        "tools", "truncation",
    }
)  # fmt: skip
# Parts of a message that are no text: images come as megabytes of base64.
_MEDIA = frozenset({"audio_url", "image_url", "input_audio", "video_url"})


def install_checks(http_server: Any, chat_handler: Any) -> None:
    """Put the checks in front of the handlers of SGLang's HTTP server.

    Args:
        http_server: its module.
        chat_handler: its class for chats, which is in a module of its own.
    """
    # SGLang's own place for such checks, which these routes leave empty.
    http_server.OpenAIServingDetokenize._validate_request = refuse_ids
    http_server.OpenAIServingTokenize._validate_request = refuse_texts
    http_server.OpenAIServingScore._validate_request = refuse_overrides
    for handler, name, hook in (
        # Of Anthropic's routes, of /tokenize and of /v1/responses too.
        (chat_handler, "_process_messages", around_messages),
        (http_server.OllamaServing, "handle_chat", around_ollama),
        (http_server.OllamaServing, "_stream_chat_response", around_stream),
        (http_server.OllamaServing, "_stream_generate_response", around_stream),
    ):
        setattr(handler, name, _hooked(getattr(handler, name), hook))


def _hooked(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return method


def refuse_ids(serving: Any, request: Any) -> str | None:
    """Say which ids for ``/detokenize`` no token has: a tokenizer raises at a negative one, SGLang answers with 500."""
    rows = request.tokens if request.tokens and isinstance(request.tokens[0], list) else [request.tokens]
    try:
        for number, row in enumerate(rows):
            if row:  # no ids are no text
                check_prompt_ids(f"row {number}:", row, serving.tokenizer_manager.model_config.vocab_size)
    except TokenIdError as error:
        return str(error)
    return None


def refuse_texts(serving: Any, request: Any) -> str | None:
    """Say that texts for ``/tokenize`` are too long together: no other request is answered meanwhile."""
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    return _said(serving.tokenizer_manager, "the texts have", sum(map(len, texts)))


def refuse_overrides(serving: Any, request: Any) -> str | None:
    """Say which embedding for ``/v1/score`` has not the model's width, or that its texts are too long together."""
    width = serving.tokenizer_manager.model_config.hidden_size
    of_items = request.item_embed_overrides or []
    for name, rows in (
        ("query_embed_overrides", request.query_embed_overrides or []),
        *((f"item_embed_overrides[{item}]", rows or []) for item, rows in enumerate(of_items)),
    ):
        for position, row in enumerate(rows):
            if len(row) != width:
                return f"{name} has {len(row)} numbers at position {position}; expected {width}, the model's width"
    items = [request.items] if isinstance(request.items, str) else request.items or []
    texts = [text for text in (request.query, *items) if isinstance(text, str)]
    return _said(serving.tokenizer_manager, "query and items have", sum(map(len, texts)))


def around_messages(original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a chat that no model's context has room for, and template arguments that are the server's own."""
    own = sorted(_OF_THE_SERVER.intersection(request.chat_template_kwargs or {}))
    if own:
        raise InputError(f"chat_template_kwargs has {own[0]!r}, which is the server's own to choose; leave it out")
    given = request.model_dump(include={"messages", "tools", "chat_template_kwargs"}, exclude_none=True)
    _check(serving.tokenizer_manager, "messages and tools, with their fields' names, have", _count_characters(given))
    return original(serving, request, *args, **kwargs)


async def around_ollama(
    original: Callable[..., Coroutine[Any, Any, Any]], serving: Any, request: Any, *args: Any
) -> Any:
    """Refuse a chat of Ollama's kind that no model's context has room for."""
    _check(serving.tokenizer_manager, "the messages have", sum(len(message.content) for message in request.messages))
    return await original(serving, request, *args)


async def around_stream(original: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """Wait for the first piece of a stream: what refuses the request is then an answer, and no connection that ends."""
    response = await original(*args)
    pieces = response.body_iterator
    first = await anext(pieces, None)
    if first is not None:
        response.body_iterator = _chained(first, pieces)
    return response


async def _chained(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for piece in rest:
        yield piece


def _count_characters(given: Any) -> int:
    """Count the characters of all texts in nested objects and lists, names included; of media none."""
    count, left = 0, [given]
    while left:  # no recursion: a tool's schema may be nested a thousand times
        match left.pop():
            case str() as text:
                count += len(text)
            case Mapping() as fields:
                count += sum(len(str(name)) for name in fields)
                left.extend(value for name, value in fields.items() if name not in _MEDIA)
            case list() | tuple() as parts:
                left.extend(parts)
    return count


def _check(manager: Any, what: str, characters: int) -> None:
    most = most_characters(manager)
    if characters > most:
        raise PromptLengthError(
            f"{what} {characters} characters, over the limit of {most}: no text of more fits the model's context; "
            "send less at a time"
        )


def _said(manager: Any, what: str, characters: int) -> str | None:
    try:
        _check(manager, what, characters)
    except PromptLengthError as error:
        return str(error)
    return None
