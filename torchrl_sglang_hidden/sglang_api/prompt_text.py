"""Says which ids a text has and what must not stand in it, for all who turn texts into prompts.

A tokenizer is given here, and only asked. Knows nothing of chats, TensorDicts or payloads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torchrl_sglang_hidden.errors import ImageError, InputError

__all__ = ["check_no_placeholder", "check_unicode", "special_ends", "written_once"]

# A special token for the place of a medium, such as <|image_pad|>, <image>, [IMG] and <|AUDIO|>.
PLACEHOLDER = re.compile(r"(?<![a-z])(image|img|video|vision|audio)(?![a-z])", re.IGNORECASE)
# Of a text with images, whose placeholders and the tokens around them, such as <|vision_start|>, are counted elsewhere.
OTHER_MEDIUM = re.compile(r"(?<![a-z])(video|audio)(?![a-z])", re.IGNORECASE)


def check_unicode(name: str, text: str) -> None:
    """Refuse a text that no fast tokenizer reads: one with half of a surrogate pair, as in a bad ``\\u`` of JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a surrogate pair and no character; "
            "remove it, or read the text from its bytes with errors='replace'"
        ) from error


def check_no_placeholder(name: str, text: str, tokenizer: Any, *, beside_images: bool = False) -> None:
    """Check that a text has no special token that stands for a picture or another medium.

    Args:
        name: says whose text it is.
        text: the text.
        tokenizer: whose special tokens are looked for.
        beside_images: whether images are sent with the text, so that it may have their tokens.

    Raises:
        ImageError: it has one.
    """
    for token in tokenizer.get_added_vocab():
        if token in text and (OTHER_MEDIUM if beside_images else PLACEHOLDER).search(token):
            raise ImageError(
                f"{name} has {token!r}, which the tokenizer takes for the place of a picture or another medium, and "
                "none is sent with it; give the image with it, to a model that reads images, or remove it from the text"
            )


def special_ends(added: Sequence[bool]) -> tuple[int, int]:
    """Return how many ids at the beginning and at the end the tokenizer wrote by itself.

    Args:
        added: of each id, whether the tokenizer added it to the text: its ``special_tokens_mask``.
    """
    if all(added):
        return len(added), 0
    return added.index(False), added[::-1].index(False)


def written_once(ids: tuple[int, ...], before: int, after: int) -> tuple[int, ...]:
    """Return the ids of a text without the special tokens that both it and the tokenizer wrote at one of its ends.

    A text that a chat template wrote begins with a BOS already, and a tokenizer of the kind of Llama 3's adds one.

    Args:
        ids: what the tokenizer wrote.
        before: how many of the first it wrote by itself, such as a BOS; see `special_ends`.
        after: how many of the last.
    """
    own = ids[before : len(ids) - after]
    head, tail = ids[:before], ids[len(ids) - after :]
    head = () if own[:before] == head else head
    tail = () if after and own[-after:] == tail else tail
    return (*head, *own, *tail)
