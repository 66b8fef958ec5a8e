"""Images in chats: taken out of messages, so that a chat template writes a placeholder for each.

Knows the forms of TorchRL, of Hugging Face and of OpenAI. Knows nothing of ids or processors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang_hidden.errors import ImageError, InputTypeError
from torchrl_sglang_hidden.images.image_data import ImageData, read_image

__all__ = ["IMAGE_TYPES", "hide_images", "take_images"]

IMAGE_TYPES = ("image", "image_url")
# Where a part may hold its image, and what forms: torchrl's ContentBase has "data" and "url", Hugging Face's parts have
# "image", "url", "path" and "base64", OpenAI's "image_url".
PLACES = ("image", "image_url", "data", "url", "path", "base64")
# What an image's part may say beside it: names, and what `take_images` writes itself.
BESIDE = ("type", "mime_type", "name", "size", "digest")
# Kinds that the engine could serve for some models, and this package does not send.
OTHER_MEDIA = ("video", "video_url", "audio", "audio_url", "input_audio")


def take_images(
    name: str, messages: Sequence[Mapping[str, Any]], given: Sequence[ImageData]
) -> tuple[list[dict[str, Any]], list[ImageData]]:
    """Return messages whose parts of images are bare, as chat templates read them, and the images in their order.

    A bare part says by a digest which image it stands for: chats of other images are other chats.

    Args:
        name: of the row and its key, for errors.
        messages: the messages of a chat.
        given: the row's images at ``images_key``, for parts that have none of their own.

    Raises:
        ImageError: a part without an image, an image without a part, a part of another medium, or one that says more
            of its image, such as a size to read it in.
        InputTypeError: a part that is no mapping, or holds something else than an image.
    """
    rest, images, taken = list(given), [], []
    for turn, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            taken.append(dict(message))
            continue
        parts = []
        for index, part in enumerate(content):
            where = f"{name} message {turn}, part {index}:"
            if not _is_image(where, part):
                parts.append(part)
                continue
            image = _image_of(where, part)
            if image is None and not rest:
                raise ImageError(
                    f"{where} an image's place without an image, and {len(given)} at images_key, all of them taken; "
                    "give each place its own"
                )
            image = rest.pop(0) if image is None else image
            images.append(image)
            parts.append({"type": "image", "digest": image.digest})
        taken.append({**message, "content": parts})
    if rest:
        raise ImageError(
            f"{name} {len(given)} images at images_key, and the chat has places for {len(given) - len(rest)}, parts "
            '{"type": "image"} without an image of their own; give as many of one as of the other'
        )
    return taken, images


def hide_images(messages: Sequence[Mapping[str, Any]], images: Sequence[ImageData]) -> list[dict[str, Any]]:
    """Return the messages as `take_images` does, of a chat whose images, in their order, are known already."""
    rest = iter(images)

    def hidden(part: Any) -> Any:
        is_image = isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES
        return {"type": "image", "digest": next(rest).digest} if is_image else part

    return [
        {**message, "content": [hidden(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _is_image(where: str, part: Any) -> bool:
    if not isinstance(part, Mapping):
        raise InputTypeError(
            f'{where} {part!r:.60}, a {type(part).__name__}; expected a dict such as {{"type": "text", "text": "Hi"}}'
        )
    kind = part.get("type")
    if kind in OTHER_MEDIA:
        raise ImageError(f"{where} of type {kind!r}; text and images can be sent to the engine: leave the part out")
    if kind not in ("text", *IMAGE_TYPES):
        raise ImageError(
            f"{where} has a part of type {kind!r}; expected 'text', 'image' or 'image_url': leave it out, or describe "
            "it in words"
        )
    return kind in IMAGE_TYPES


def _image_of(where: str, part: Mapping[str, Any]) -> ImageData | None:
    """Return the image that a part holds; None for one that is bare."""
    more = [key for key, value in part.items() if key not in (*PLACES, *BESIDE) and not _is_nothing(value)]
    if more:
        raise ImageError(
            f"{where} has {more} beside its image, which the model's processor does not read; leave it out, and give "
            "the image in the size that it is to have, and a text in a part of its own"
        )
    held = [(place, part[place]) for place in PLACES if part.get(place) is not None]
    if not held:
        return None
    if len(held) > 1:
        raise ImageError(f"{where} an image at each of {[place for place, _ in held]}; give it once")
    ((place, value),) = held
    if isinstance(value, Mapping) and "url" in value:  # OpenAI's {"image_url": {"url": …}}
        if value.get("detail") not in (None, "auto"):
            raise ImageError(
                f"{where} detail={value['detail']!r}; the model's own processor says in what detail an image is read: "
                "leave it out"
            )
        value = value["url"]
    if place == "base64":
        value = f"data:image/unknown;base64,{value}"
    return read_image(where, value)


def _is_nothing(value: Any) -> bool:
    """Whether a part leaves a field open: data sets have all fields of all parts in each."""
    return value is None or (isinstance(value, str) and not value)
