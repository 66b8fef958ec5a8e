"""Turns prompts with images into token ids: messages with parts, and texts or ids with placeholders and images beside.

An image is a data URI: a URL or a path would be read by the server, on its own machine and in its own network. Knows
nothing of requests, nor of what the engine takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang_hidden.errors import ImageError, InputError, InputTypeError
from torchrl_sglang_hidden.images.expansion import ImageProcessor, tokenizer_of
from torchrl_sglang_hidden.images.image_data import ImageData, read_image
from torchrl_sglang_hidden.images.messages import IMAGE_TYPES, take_images
from torchrl_sglang_hidden.records import Images
from torchrl_sglang_hidden.service.prompts import check_texts, ids_of_messages, prompt_ids

__all__ = ["has_images", "image_prompt", "split_images"]

REMEDY = "send the file's bytes as a data URI, data:image/png;base64,…"


def split_images(given: object, rows: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """Return the images of each row: a list for each, or null, or one list alone where there is one row.

    Raises:
        InputTypeError: something else than lists.
        InputError: another number of lists than of rows.
    """
    if not isinstance(given, list):
        raise InputTypeError(
            f"images={given!r:.80} is a {type(given).__name__}; expected a list of data URIs for each row"
        )
    lists = [given] if len(rows) == 1 and all(isinstance(one, str) for one in given) else given
    lists = [[] if images is None else images for images in lists]
    for number, images in enumerate(lists):
        if not isinstance(images, list):
            raise InputTypeError(
                f"images, row {number}: {images!r:.80} is a {type(images).__name__}; expected a list of data URIs, "
                "empty or null for a row without images"
            )
    if len(lists) != len(rows):
        raise InputError(f"images has {len(lists)} lists for {len(rows)} rows; give one for each, empty for none")
    return tuple(map(tuple, lists))


def has_images(row: Any, images: Sequence[Any]) -> bool:
    """Return whether a row has images, or a message of parts."""
    if images:
        return True
    messages = row if isinstance(row, list) else ()
    return any(isinstance(one, Mapping) and isinstance(one.get("content"), list) for one in messages)


def image_prompt(
    number: int, row: Any, images: Sequence[Any], processor: ImageProcessor
) -> tuple[tuple[int, ...], Images | None]:
    """Return the ids of one prompt, expanded, and its images.

    Args:
        number: where the row stands in the request, for errors.
        row: a text or ids with one placeholder for each image, or messages; ids may be expanded already.
        images: the row's data URIs, for placeholders and for parts of messages that bring none of their own.
        processor: the served model's.

    Raises:
        ImageError: an image that is no data URI or cannot be read, or an image and its place without each other.
        CapabilityError: a model that takes text alone.
        InputError: what `prompt_ids` refuses, or a part that is neither a text nor an image.
    """
    name = f"row {number}:"
    read = [_read_uri(f"row {number}, image {i}:", one) for i, one in enumerate(images)]
    is_chat = isinstance(row, list) and any(isinstance(part, Mapping) for part in row)
    messages: list[dict[str, Any]] = []
    if is_chat:
        for turn, message in enumerate(row):
            _check_message(f"row {number}, message {turn}", message)
        messages, read = take_images(f"row {number},", row, read)
    found = processor.row_images(name, read)
    tokenizer = tokenizer_of(processor.processor)
    if is_chat:
        own = None if tokenizer.chat_template else processor.own_template(tokenizer)
        check_texts(number, messages, tokenizer)
        short = ids_of_messages(f"row {number}", messages, tokenizer, own)
    elif found is None:
        return prompt_ids(number, row, tokenizer), None
    else:
        short = prompt_ids(number, row, tokenizer, images=True)
        if not isinstance(row, str):
            short = found.short_of(name, short)
    if found is None:
        return short, None
    processor.check_sent(name, short)
    try:
        return found.expand(short)
    except ImageError as error:
        raise type(error)(f"{name} {error}") from error


def _read_uri(name: str, value: object) -> ImageData:
    if not isinstance(value, str):
        raise InputTypeError(f"{name} {value!r:.80} is a {type(value).__name__}; {REMEDY}")
    if not value.startswith("data:image/"):
        raise ImageError(f"{name} {value!r:.80} is no data URI, and this route reads no URLs or paths; {REMEDY}")
    return read_image(name, value)


def _check_message(name: str, message: Any) -> None:
    """Refuse a message of anything but a role and texts and images: a template may leave it out without a word."""
    if not isinstance(message, Mapping):
        raise InputTypeError(f"{name}: {message!r:.80} is a {type(message).__name__}; expected an object")
    content = message.get("content")
    known = message.keys() == {"role", "content"} and isinstance(message["role"], str)
    if not known or not isinstance(content, (str, list)):
        raise InputTypeError(
            f'{name}: {message!r:.80}; expected {{"role": …, "content": …}}, a string, and a string or a list of '
            "parts, and no more"
        )
    for place, part in enumerate(content if isinstance(content, list) else ()):
        _check_part(f"{name}, part {place}:", part)


def _check_part(name: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
        return
    if kind not in IMAGE_TYPES or not part.keys() <= {"type", kind}:
        raise InputError(
            f'{name} {part!r:.80}; expected {{"type": "text", "text": …}}, {{"type": "image_url", "image_url": '
            '{"url": …}} or {"type": "image", "image": …}: leave out what is neither text nor image'
        )
    value = part.get(kind)
    if isinstance(value, Mapping):
        if not value.keys() <= {"url", "detail"} or value.get("detail", "auto") != "auto":
            raise InputError(
                f"{name} {kind} has {sorted(value.keys() - {'url'})}; expected a url alone: the model's own processor "
                "says in what detail an image is read"
            )
        value = value.get("url")
    if kind in part and not (isinstance(value, str) and value.startswith("data:image/")):
        raise ImageError(f"{name} {value!r:.80} is no data URI, and this route reads no URLs or paths; {REMEDY}")
