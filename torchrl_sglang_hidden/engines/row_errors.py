"""What concerns one row of a batch and no other: which errors do, before anything is sent, and how they name the row.

Knows requests and completions only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import add

from torchrl_sglang_hidden.errors import ConstraintError, ImageError, PromptLengthError, SGLangHiddenError, SpanError
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request, failed_completion
from torchrl_sglang_hidden.sglang_api.checks import check_requests

__all__ = ["ROW_ERRORS", "generate_rows", "numbered", "refused_rows", "renumber"]

# What is wrong with one prompt, its images, spans or constraints. A wrong id or option concerns the whole call.
ROW_ERRORS = (ImageError, PromptLengthError, SpanError, ConstraintError)


def refused_rows(requests: Sequence[Request | None], info: EngineInfo) -> list[SGLangHiddenError | None]:
    """Return for each request the error that keeps it alone from being sent, or None.

    Args:
        requests: one for each row; None for a row that need not be looked at.
        info: the engine's.

    Raises:
        InputError, CapabilityError: what concerns the whole call, such as a ``max_new_tokens`` that no prompt leaves
            room for.
    """
    errors: list[SGLangHiddenError | None] = []
    for row, request in enumerate(requests):
        if request is None:
            errors.append(None)
            continue
        try:
            check_requests([request], info)
        except SGLangHiddenError as error:
            moved = renumber(error, partial(add, row))
            no_prompt_fits = request.sampling.get("max_new_tokens", 0) >= info.context_length
            if no_prompt_fits or not isinstance(error, ROW_ERRORS):
                raise moved from None
            errors.append(moved)
        else:
            errors.append(None)
    return errors


def generate_rows(
    requests: Sequence[Request],
    refused: Sequence[SGLangHiddenError | None],
    weight_version: str,
    generate: Callable[[list[Request]], list[Completion]],
    *,
    num_samples: int = 1,
) -> list[Completion]:
    """Generate the requests that are not refused; the others get completions without a response.

    Args:
        requests: one for each row.
        refused: for each row the error that keeps it from being sent, or None.
        weight_version: the engine's.
        generate: returns ``num_samples`` completions of each request that it is given, in order.
        num_samples: see there.

    Returns:
        ``num_samples`` completions of each row, in order.

    Raises:
        SGLangHiddenError: what ``generate`` raises; of one response per row it names the row in this batch.
    """
    rows = [row for row, error in enumerate(refused) if error is None]
    try:
        sent = generate([requests[row] for row in rows]) if rows else []
    except SGLangHiddenError as failure:
        if num_samples > 1:
            raise  # counts prompts before the samples are sent, and samples then
        moved = renumber(failure, rows.__getitem__)
        raise moved from failure

    def place(index: int) -> int:
        return rows[index // num_samples] * num_samples + index % num_samples

    found = {place(index): numbered(one, place) for index, one in enumerate(sent)}
    for row, error in enumerate(refused):
        if error is not None:
            failed = failed_completion(requests[row], error, weight_version)
            found |= {row * num_samples + sample: failed for sample in range(num_samples)}
    return [found[index] for index in range(len(found))]


def numbered(completion: Completion, move: Callable[[int], int]) -> Completion:
    """Return a completion whose error, if it has one, names its row in another batch."""
    if completion.error is None:
        return completion
    return replace(completion, error=renumber(completion.error, move))


def renumber(error: SGLangHiddenError, move: Callable[[int], int]) -> SGLangHiddenError:
    """Return a copy of an error with another number of the row that its message begins with."""
    moved = copy.copy(error)
    moved.args = (re.sub(r"^row (\d+)", lambda found: f"row {move(int(found[1]))}", str(error)),)
    return moved
