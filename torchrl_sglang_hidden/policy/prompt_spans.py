"""Resolves the spans of one prompt row: from what the user named to positions of the prompt.

Knows nothing of how the row was read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, assert_never, cast

from tensordict import TensorDictBase

from torchrl_sglang_hidden.errors import InputError, SpanError
from torchrl_sglang_hidden.images.expansion import RowImages
from torchrl_sglang_hidden.policy.chat_text import Chat, decode_all, last_tokens, opened_by, spoken_tokens
from torchrl_sglang_hidden.policy.row_fields import read_token_mask
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.records import Images
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.span_search import find_between, find_marked
from torchrl_sglang_hidden.spec.spans import (
    Between,
    Image,
    LastTokens,
    PromptSpan,
    ResolvedSpan,
    ResponseSpan,
    Role,
    Span,
    TokenMask,
    Turn,
    intervals_of,
    is_of_response,
    span_over,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["resolve_span"]


def resolve_span(
    name: str, row: TensorDictBase, found: Row, span: Span, tokenizer: PreTrainedTokenizerBase
) -> ResolvedSpan:
    """Return a span as positions in a prompt, or as it is if it is of the response.

    Args:
        name: of the row and the span, for errors.
        row: where a mask is read.
        found: the prompt row.
        span: the span.
        tokenizer: the policy's.

    Raises:
        SpanError: a span without tokens, or with more than there are.
        InputError: a span whose tokens cannot be known.
    """
    if isinstance(span, ResponseSpan) and is_of_response(span):
        return opened_by(span, found.chat) if isinstance(span, Between) and found.chat is not None else span
    try:
        return replace(_in_prompt(row, found, span, tokenizer), pooling=span.pooling)
    except (SpanError, InputError) as error:
        raise type(error)(f"{name} {error}") from error


def _in_prompt(row: TensorDictBase, found: Row, span: Span, tokenizer: PreTrainedTokenizerBase) -> PromptSpan:
    """Return the positions of a span of the prompt."""
    # Text is searched with one placeholder for each image, and what is found moves to where it is expanded.
    ids, num_prompt = found.sent_ids, len(found.prompt_ids)
    moved = (lambda inside: inside) if found.images is None else functools.partial(_moved, found.images, ids)
    match span:
        case LastTokens():
            return last_tokens(span, num_prompt)
        case Window(start=start, stop=stop):
            return span_over(range(num_prompt)[start:stop])
        case Every(n=n):
            return span_over(range(0, num_prompt, n))
        case At() | Each():
            return _marked(span, found, tokenizer)
        case Between():
            decode = functools.partial(decode_all, tokenizer)
            return moved(PromptSpan((find_between(span, ids, decode),)))
        case TokenMask() if found.short_placement is not None:
            return moved(read_token_mask(row, span, found.short_placement))
        case TokenMask():
            return read_token_mask(row, span, found.placement or (True,) * num_prompt)
        case Turn() | Role():
            return moved(spoken_tokens(span, cast("Chat", found.chat), ids, tokenizer))
        case Image():
            return _image_rows(span, found.placed)
        case _:
            assert_never(span)


def _marked(span: At | Each, found: Row, tokenizer: PreTrainedTokenizerBase) -> PromptSpan:
    """Return the positions of the states at markers: of an image that one stands behind, the last row."""
    ids = found.sent_ids
    positions = [read for read in find_marked(span, ids, functools.partial(decode_all, tokenizer)) if read >= 0]
    if not positions and span.missing == "error":
        raise SpanError(
            f"{span!r}: the marker begins the prompt, and no state stands before it; use where='after', or "
            "missing='nan'"
        )
    if found.images is not None:
        placeholder, widths = found.images.placeholder_id, iter(found.images.expansions)
        ends = list(accumulate(len(next(widths)) if one == placeholder else 1 for one in ids))
        positions = [ends[position] - 1 for position in positions]
    return span_over(positions)


def _moved(images: RowImages, ids: Sequence[int], span: PromptSpan) -> PromptSpan:
    """Return a span of the ids with one placeholder for each image as a span of the expanded ids."""
    inside = [False] * len(ids)
    for start, stop in span.intervals:
        inside[start:stop] = [True] * (stop - start)
    widths = iter(images.expansions)
    spread: list[bool] = []
    for is_inside, token_id in zip(inside, ids, strict=True):
        spread += [is_inside] * (len(next(widths)) if token_id == images.placeholder_id else 1)
    return intervals_of(spread)


def _image_rows(span: Image, placed: Images | None) -> PromptSpan:
    """Return the rows of one image."""
    ranges = () if placed is None else placed.ranges
    if not -len(ranges) <= span.index < len(ranges):
        raise SpanError(f"{span}: the prompt has {len(ranges)} images; name one of those")
    return PromptSpan((ranges[span.index],))
