"""Turns what a client sends as input into token ids: texts, token ids, messages, or a list of these.

The ids are those that a policy of this package sends for the same prompt: the tokenizer's own special tokens around a
text, each once, and the tokenizer's own chat template around messages. Knows nothing of images or requests, nor of what
the engine takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchrl_sglang_hidden.errors import ChatTemplateError, InputError, InputTypeError, PromptLengthError
from torchrl_sglang_hidden.sglang_api.prompt_text import (
    check_no_placeholder,
    check_unicode,
    special_ends,
    written_once,
)

__all__ = ["check_texts", "ids_of_messages", "prompt_ids", "split_rows"]


def split_rows(given: object) -> tuple[Any, ...]:
    """Return one prompt for each row: a text, a list of ids and a list of messages are a row of their own.

    Raises:
        InputTypeError: neither a text nor a list.
        PromptLengthError: an empty list.
    """
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list):
        raise InputTypeError(
            f"input={given!r:.80} is a {type(given).__name__}; expected a text, token ids, messages, or a list of these"
        )
    if not given:
        raise PromptLengthError("input=[] has 0 rows; give at least 1 prompt")
    return tuple(given) if isinstance(given[0], (str, list)) else (given,)


def prompt_ids(number: int, row: Any, tokenizer: Any, *, images: bool = False) -> tuple[int, ...]:
    """Return the ids of one prompt. Those that a client sent as ids are not looked at: the engine's check does that.

    Args:
        number: where the row stands in the request, for errors.
        row: a text, a list of ids, or a list of messages.
        tokenizer: the served model's.
        images: whether images go with a text, whose placeholders are counted when they are expanded.

    Raises:
        PromptLengthError: an empty text.
        InputTypeError: something that is no prompt.
        ChatTemplateError: there is no chat template, or it cannot write the messages.
        InputError: a text that the tokenizer cannot read, or one with a picture's placeholder; a message with more than
            a role and a text.
    """
    match row:
        case str():
            return _ids_of_text(f"row {number}:", row, tokenizer, images=images)
        case [dict(), *_]:
            return _ids_of_messages(f"row {number}", row, tokenizer)
        case list():
            return tuple(row)
    raise InputTypeError(
        f"row {number}: {row!r:.80} is a {type(row).__name__}; expected a text, a list of token ids or a list of "
        "messages"
    )


def _ids_of_text(name: str, text: str, tokenizer: Any, *, images: bool) -> tuple[int, ...]:
    if not text:
        raise PromptLengthError(f"{name} an empty text, 0 tokens; SGLang needs at least 1")
    check_unicode(name, text)
    check_no_placeholder(name, text, tokenizer, beside_images=images)
    encoded = tokenizer(text, return_special_tokens_mask=True)
    return written_once(tuple(encoded["input_ids"]), *special_ends(encoded["special_tokens_mask"]))


def _ids_of_messages(name: str, messages: list[Any], tokenizer: Any) -> tuple[int, ...]:
    for turn, message in enumerate(messages):
        _check_message(f"{name}, message {turn}:", message, tokenizer)
    return ids_of_messages(name, messages, tokenizer)


def ids_of_messages(
    name: str, messages: list[dict[str, Any]], tokenizer: Any, chat_template: str | None = None
) -> tuple[int, ...]:
    """Return the ids of checked messages, as the chat template writes them.

    Args:
        name: of the row, for errors.
        messages: each with a role, and a text or parts.
        tokenizer: the served model's.
        chat_template: one in place of the tokenizer's, or None.

    Raises:
        ChatTemplateError: there is no chat template, or it cannot write the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except _foreign_errors() as error:
        raise ChatTemplateError(
            f"{name}: the server's chat template cannot write the messages: {type(error).__name__}: {error}; change "
            "them, or send a text or token ids"
        ) from error
    # The template wrote the special tokens already.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_message(name: str, message: Any, tokenizer: Any) -> None:
    """Refuse a message with anything beside a role and a text: a template may leave it out without a word."""
    if not isinstance(message, Mapping):
        raise InputTypeError(f"{name} {message!r:.80} is a {type(message).__name__}; expected an object")
    content, role = message.get("content"), message.get("role")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise InputError(
                f"{name} a part of type {kind!r:.80}; the served model takes text alone: leave the part out, or "
                "describe it in words"
            )
    if message.keys() != {"role", "content"} or not isinstance(role, str) or not isinstance(content, str):
        raise InputTypeError(
            f'{name} {message!r:.80}; expected {{"role": …, "content": …}}, each a string, and no more'
        )
    _check_texts(name, (role, content), tokenizer)


def check_texts(number: int, messages: list[dict[str, Any]], tokenizer: Any) -> None:
    """Check what messages say, in their parts too, as `prompt_ids` does.

    Raises:
        InputError: a text that the tokenizer cannot read, or one with a picture's placeholder.
    """
    for turn, message in enumerate(messages):
        content = message["content"]
        parts = [part.get("text", "") for part in content] if isinstance(content, list) else [content]
        _check_texts(f"row {number}, message {turn}:", (message["role"], *parts), tokenizer)


def _check_texts(name: str, texts: Iterable[str], tokenizer: Any) -> None:
    for text in texts:
        check_unicode(name, text)
        check_no_placeholder(name, text, tokenizer)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Return what a template can raise, which is code of the model's."""
    from jinja2 import TemplateError

    return (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
