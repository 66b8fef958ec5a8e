"""Take, constrain and score the logits of prompt tokens, many requests at a time.

Pure torch on the rows of one call of the model's head; knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from torchrl_sglang_hidden.reduce.columns import select_rows
from torchrl_sglang_hidden.reduce.constraining import constrain
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.token_logits import NextToken
from torchrl_sglang_hidden.server.taken_logits import PromptLogits, PromptPiece
from torchrl_sglang_hidden.server.token_rows import PromptPart

__all__ = ["piece_rows", "prompt_logits_of", "split_parts"]

# Logits in float32 that one call of the head may bring: at 150 000 tokens 220 rows. Their log-softmax and constrained
# copies are as large again, in memory that SGLang's budget does not know.
PIECE_BYTES = 2**27
MAX_PIECE_ROWS = 1024


def piece_rows(vocab_size: int) -> int:
    """Return how many prompt rows the head gets at once."""
    return max(1, min(MAX_PIECE_ROWS, PIECE_BYTES // (4 * vocab_size)))


def split_parts(parts: Sequence[PromptPart], size: int) -> Iterator[tuple[PromptPiece, ...]]:
    """Cut the parts, one behind another, into calls of ``size`` rows; the last has fewer."""
    pieces: list[PromptPiece] = []
    room = size
    for part in parts:
        first = part.first
        while first < part.stop:
            count = min(room, part.stop - first)
            pieces.append(PromptPiece(part=part, first=first, count=count))
            first, room = first + count, room - count
            if room == 0:
                yield tuple(pieces)
                pieces, room = [], size
    if pieces:
        yield tuple(pieces)


def prompt_logits_of(pieces: tuple[PromptPiece, ...], raw_NV: torch.Tensor) -> PromptLogits:
    """Constrain, score and select the logits of prompt tokens.

    Args:
        pieces: whose tokens the rows are, in order.
        raw_NV: the head's logits, float32 ``[N, V]``.
    """
    logits_NV, choosable_N = _constrain_responses(pieces, raw_NV)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.count)
    scored = tuple(place for place, piece in enumerate(pieces) if piece.part.logits.wanted.scored)
    log_probs_S = None
    if scored:
        rows_S = _rows_of(scored, starts, raw_NV.device)
        rows_SV = logits_NV if rows_S is None else logits_NV[rows_S]
        log_probs_S = _log_probs_of([pieces[place] for place in scored], rows_SV)
    groups: dict[object, list[int]] = {}
    for place, piece in enumerate(pieces):
        request = piece.part.logits
        if request.columns is not None and request.wants_prompt_columns:
            groups.setdefault(request.columns.group, []).append(place)
    columns = []
    for places in groups.values():
        asked = [kind for place in places for kind in [pieces[place].part.logits.columns] * pieces[place].count if kind]
        rows = [row for place in places for row in range(starts[place], starts[place + 1])]
        source_NV = raw_NV if asked[0].stage == "raw" else logits_NV
        columns.append((tuple(places), select_rows(source_NV, rows, asked, raw_NV.shape[1])))
    return PromptLogits(
        pieces=pieces,
        columns=tuple(columns),
        scored=scored,
        log_probs_S=log_probs_S,
        choosable_N=choosable_N,
    )


def _log_probs_of(pieces: Sequence[PromptPiece], logits_SV: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each piece's tokens, float32 ``[S]``; NaN where a row of an image stands."""
    ids: list[int] = []
    images: list[int] = []
    for piece in pieces:
        request, stop = piece.part.logits, piece.first + piece.count
        if request.image_rows:
            images += [len(ids) + at - piece.first for at in range(piece.first, stop) if at in request.image_rows]
        ids += request.prompt_ids[piece.first : stop]
    log_probs_S = logits_SV.log_softmax(-1).gather(1, on_device(ids, logits_SV.device, torch.int64)[:, None])[:, 0]
    return log_probs_S.index_fill(0, on_device(images, logits_SV.device), torch.nan) if images else log_probs_S


def _rows_of(places: Sequence[int], starts: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Return the rows of some pieces; None for all rows."""
    if len(places) == len(starts) - 1:
        return None
    return on_device([row for place in places for row in range(starts[place], starts[place + 1])], device)


def _constrain_responses(
    pieces: Sequence[PromptPiece], logits_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Constrain the tokens that are inside a response of their scored prompt; leave the others as they are.

    Returns:
        The logits, and bool ``[N]``, whether any token is left to choose; None where no token is inside a response.
    """
    rows: list[int] = []
    tokens: list[NextToken] = []
    row = 0
    for piece in pieces:
        request = piece.part.logits
        for start, stop in request.wanted.response_ranges if request.wanted.constraints else ():
            for token in range(max(start, piece.first), min(stop, piece.first + piece.count)):
                if token in request.image_rows:
                    continue
                rows.append(row + token - piece.first)
                ids_of = partial(request.ids.of_sequence, request.prompt_ids, start, token, logits_NV.device)
                limit = request.wanted.response_limit
                tokens.append(NextToken(request, token - start, limit, ids_of, response_start=start))
        row += piece.count
    if not rows:
        return logits_NV, None
    rows_R = on_device(rows, logits_NV.device)
    changed_RV, choosable_R = constrain(logits_NV[rows_R], tokens)
    all_true_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
    return logits_NV.index_copy(0, rows_R, changed_RV), all_true_N.index_copy(0, rows_R, choosable_R)
