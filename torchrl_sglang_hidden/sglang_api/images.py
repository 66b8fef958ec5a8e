"""Checks the images of a `Request` against its prompt and the engine before it is sent, and against what was computed.

SGLang 0.5.23 hangs, drops images without a word or answers an internal error where placeholders and images do not
agree, and reads URLs and paths as seen from its own machine. Knows nothing of how images were read, nor of processors.
"""

from __future__ import annotations

import re

from torchrl_sglang_hidden.errors import AlignmentError, CapabilityError, ImageError, InputError, InputTypeError
from torchrl_sglang_hidden.protocol import digest_prompt
from torchrl_sglang_hidden.records import EngineInfo, Images, Request

__all__ = ["check_computed", "check_images"]

_DATA_URI = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,[A-Za-z0-9+/]")


def check_images(row: int, request: Request, info: EngineInfo) -> None:
    """Refuse images that the engine does not take, or that do not agree with the prompt.

    Args:
        row: the request's place in the caller's batch, for errors.
        request: the request.
        info: the engine's description.

    Raises:
        CapabilityError: images for a model that takes none.
        ImageError: placeholders and images that differ in number, a placeholder without an image, or more images than
            the server takes.
        InputError: an image that is no data URI, or an expanded prompt that is not the sent one, expanded.
        InputTypeError: an image that is no string, or an id that is no Python int.
    """
    images = request.images
    if images is None:
        _check_without_images(row, request, info)
        return
    if not info.takes_images:
        raise CapabilityError(
            f"row {row}: {len(images.data)} images for the model {info.model_path!r}, which reads none; serve a "
            "vision-language model, or leave the images out"
        )
    if set(map(type, images.sent_ids)) - {int}:
        wrong = next(token_id for token_id in images.sent_ids if type(token_id) is not int)
        raise InputTypeError(f"row {row}: token id {wrong!r} is a {type(wrong).__name__}; token ids are integers")
    placeholders = images.sent_ids.count(images.placeholder)
    if not placeholders == len(images.data) == len(images.ranges) or not images.data:
        raise ImageError(
            f"row {row}: {placeholders} placeholders (id {images.placeholder}) in the ids that are sent, "
            f"{len(images.data)} images and {len(images.ranges)} ranges; expected the same number of each, at least 1, "
            "or images=None"
        )
    if info.image_token_id not in (None, images.placeholder):
        raise InputError(
            f"row {row}: the placeholder is id {images.placeholder}, and the model's is {info.image_token_id}; use the "
            "served model's own processor"
        )
    if info.max_images is not None and len(images.data) > info.max_images:
        raise ImageError(
            f"row {row}: {len(images.data)} images, over the server's limit of {info.max_images} for one prompt; send "
            "fewer, or start it with a larger --limit-mm-data-per-request"
        )
    for place, uri in enumerate(images.data):
        _check_uri(f"row {row}, image {place}:", uri)
    _check_expansion(row, request.prompt_ids, images)
    blank = set(request.image_rows)
    for start, stop in request.response_ranges:
        if not blank.isdisjoint(range(start, stop)):
            raise InputError(
                f"row {row}: the response range ({start}, {stop}) has rows of an image, and no token was sampled "
                "there; pass ranges without images"
            )


def check_computed(name: str, request: Request, prompt_digest: int | None) -> None:
    """Refuse an answer to another prompt with images than the one that was sent.

    SGLang hands the prompts of most models with images to their processor as text. What comes back may have other ids,
    at times as many.

    Args:
        name: names the request in errors.
        request: what was sent.
        prompt_digest: of what the server computed, as the server half answers it.

    Raises:
        AlignmentError: they differ.
    """
    if request.images is None:
        return
    expected = digest_prompt(request.prompt_ids, frozenset(request.image_rows))
    if prompt_digest != expected:
        raise AlignmentError(
            f"{name}: the engine computed other ids around the images than the {len(request.prompt_ids)} of the "
            f"request (checksums {prompt_digest} and {expected}): SGLang writes the prompts of this model as text, and "
            "encodes them again. Send ids that the served model's processor makes of a text"
        )


def _check_without_images(row: int, request: Request, info: EngineInfo) -> None:
    """Refuse a placeholder that no image is for: SGLang would compute its embedding, which no training has seen."""
    if not info.takes_images or info.image_token_id is None or info.image_token_id not in request.prompt_ids:
        return
    raise ImageError(
        f"row {row}: position {request.prompt_ids.index(info.image_token_id)} of the prompt is the placeholder of an "
        f"image (id {info.image_token_id}), and there are 0 images; pass the image, or take the placeholder out. A "
        "model may sample it by itself: DisallowedTokens keeps it from that"
    )


def _check_uri(name: str, uri: object) -> None:
    if not isinstance(uri, str):
        raise InputTypeError(f"{name} a {type(uri).__name__}; expected a data URI, data:image/png;base64,…")
    if _DATA_URI.match(uri) is None:
        raise InputError(
            f"{name} {uri[:60]!r} is no data URI; expected data:image/png;base64,… or the like. A URL or a path would "
            "be read by the server, on its own machine"
        )


def _check_expansion(row: int, prompt_ids: tuple[int, ...], images: Images) -> None:
    """Refuse an expanded prompt that is not the sent one with rows in place of each placeholder."""
    sent = expanded = 0
    for number, (start, stop) in enumerate(images.ranges):
        if not expanded <= start < stop <= len(prompt_ids) or images.placeholder not in prompt_ids[start:stop]:
            raise InputError(
                f"row {row}: image {number} has the rows {start}..{stop - 1} of a prompt of {len(prompt_ids)} tokens, "
                f"behind row {expanded - 1}; expected ranges in order inside the prompt, with rows of id "
                f"{images.placeholder} in each"
            )
        place = images.sent_ids.index(images.placeholder, sent)
        _check_text(row, prompt_ids[expanded:start], images.sent_ids[sent:place], expanded)
        sent, expanded = place + 1, stop
    _check_text(row, prompt_ids[expanded:], images.sent_ids[sent:], expanded)


def _check_text(row: int, found: tuple[int, ...], sent: tuple[int, ...], first: int) -> None:
    if found != sent:
        raise InputError(
            f"row {row}: the expanded prompt has {len(found)} ids from position {first} to the next image or the end, "
            f"and the sent one {len(sent)}, or others; expected the same ids around the images: expand sent_ids"
        )
