"""Reads the log-probs of SGLang's answers, and names those that are no numbers.

Knows nothing of requests, nor of what else is in an answer.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Literal, NoReturn

import torch

from torchrl_sglang_hidden.errors import AlignmentError, EngineError, ProtocolError

__all__ = ["read_log_probs"]

# SGLang writes -inf as the smallest float32, which bfloat16 rounds to this.
_MINUS_INFINITY = torch.finfo(torch.bfloat16).min
# What SGLang writes in place of the number that it keeps for a row of an image.
_IMAGE_ROW_ID = 0


def read_log_probs(
    name: str,
    side: Literal["input", "output"],
    entries: Any,
    ids: Sequence[int],
    *,
    start: int = 0,
    first: int = 0,
    images: Sequence[int] = (),
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Return the log-probs of the tokens from ``start`` on.

    Args:
        name: names the request in errors.
        side: whether they are of the prompt or of the response.
        entries: SGLang's, ``[log-prob, id, text]`` for each token.
        ids: the tokens that the entries must be of.
        start: the first entry to return.
        first: the index of ``ids[0]`` in the prompt or the response, for errors.
        images: places among ``ids`` where a row of an image stands. SGLang gives id 0 and its log-prob there, which
            mean nothing.
        vocab_size: the engine's. SGLang gives id 0 for the last id of the vocabulary too, beside its own log-prob.

    Returns:
        float32 ``[len(ids) - start]``: ``-inf`` for a token of probability 0. NaN at ``images``, and for the first of
        the input, where SGLang gives null: nothing is before it.

    Raises:
        AlignmentError: they are of other ids.
        EngineError: one is NaN or infinite.
        ProtocolError: they cannot be read.
    """
    try:
        found_ids = tuple(map(int, map(itemgetter(1), entries)))
        values = list(map(itemgetter(0), entries[start:]))
        blank = [place - start for place in images if start <= place < start + len(values)]
        for place in blank:
            values[place] = None if place == start == 0 else 0.0
        unmeasured = int(side == "input" and start == 0 and bool(values) and values[0] is None)
        null = next((place for place in range(unmeasured, len(values)) if values[place] is None), None)
        values[:unmeasured] = [math.nan] * unmeasured
        # A third of the time of torch.tensor, and as strict: what is no number raises. The clone owns its memory.
        known = values if null is None else values[:null]
        log_probs_N = torch.frombuffer(array("f", known), dtype=torch.float32).clone() if known else torch.empty(0)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise ProtocolError(
            f"{name}: the {side} log-probs cannot be read ({error}); is that an SGLang server of a version that this "
            "package supports?"
        ) from error
    if _written(found_ids, vocab_size) != _written(ids, vocab_size, images):
        raise AlignmentError(
            f"{name}: {len(entries)} log-probs for {len(ids)} {side} tokens, or of other ids; this is a fault of the "
            "engine, please report it"
        )
    log_probs_N[log_probs_N <= _MINUS_INFINITY] = -math.inf
    wrong = (log_probs_N[unmeasured:].isnan() | log_probs_N[unmeasured:].isposinf()).nonzero()
    if len(wrong):
        place = int(wrong[0]) + unmeasured
        _refuse(name, side, first + start + place, ids[start + place], str(float(log_probs_N[place])))
    if null is not None:
        _refuse(name, side, first + start + null, ids[start + null], "null, which is how JSON has NaN and -inf")
    if blank:
        log_probs_N[torch.tensor(blank)] = math.nan
    return log_probs_N


def _written(ids: Sequence[int], vocab_size: int | None, images: Sequence[int] = ()) -> list[int]:
    """Return ids as SGLang writes them beside input log-probs: 0 at rows of images, and for the vocabulary's last."""
    last = None if vocab_size is None else vocab_size - 1
    written = [_IMAGE_ROW_ID if token_id == last else token_id for token_id in ids]
    for place in images:
        written[place] = _IMAGE_ROW_ID
    return written


def _refuse(name: str, side: str, index: int, token_id: int, value: str) -> NoReturn:
    segment = "prompt" if side == "input" else "response"
    raise EngineError(
        f"{name}: the log-prob of {segment} token {index} (id {token_id}) is {value}; the model's numbers overflowed "
        "there, as they do in float16: serve the model with dtype='bfloat16' or 'float32', and look at its weights"
    )
