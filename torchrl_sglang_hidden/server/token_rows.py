"""Plan, before a forward step, which tokens' logits are wanted or constrained, and in which rows of the step they are.

Knows SGLang's batches by attribute name, and imports nothing of SGLang. Runs inside the scheduler, where an exception
ends the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.server.forward_modes import DECODE_MODE, PREFILL_MODES

__all__ = ["PromptPart", "SamplingRow", "plan_tokens"]


@dataclass(slots=True)
class SamplingRow:
    """Describes a batch row that samples a token in this step, for a request that constrains it or wants its logits.

    Args:
        row: the request's index in the batch, and in the step's logits.
        input_row: the row of the step's inputs that the token is computed from.
        index: the token's index in its response.
        logits: collects the request's logits.
        max_new_tokens: most tokens of the response.
        ids_before: SGLang's own list of the response's ids, for a request that reads them: no copy at each step. Under
            overlap scheduling it is one id short, and it may grow before the token is sampled.
    """

    row: int
    input_row: int
    index: int
    logits: RequestLogits
    max_new_tokens: int
    ids_before: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Describes the prompt tokens ``first … stop-1``, whose logits this step computes for one request.

    Args:
        row: the request's index in the batch.
        offset: added to a position of the request, gives its row in the step's states.
        first: the first prompt token.
        stop: one past the last prompt token.
        logits: collects the request's logits.
    """

    row: int
    offset: int
    first: int
    stop: int
    logits: RequestLogits


def plan_tokens(
    batch: Any, requests: Mapping[Any, RequestLogits], vocab_size: int
) -> tuple[tuple[SamplingRow, ...], tuple[PromptPart, ...], int] | None:
    """Plan the coming step.

    Args:
        batch: SGLang's, with the lengths of this step.
        requests: those that want logits or constrain them, by SGLang's own objects.
        vocab_size: V.

    Returns:
        The batch rows that sample a token, the prompt tokens whose logits the step computes, and the number of the
        step's positions; None where there is nothing to do.
    """
    mode = batch.forward_mode.name
    if mode not in (*PREFILL_MODES, DECODE_MODE):
        return None
    prefills = mode in PREFILL_MODES
    if not prefills and batch.seq_lens_cpu is None:
        return None  # a speculative batch, whose lengths the host does not have: the client's count finds it
    seq_lens = None if prefills else batch.seq_lens_cpu.tolist()
    sampling_rows: list[SamplingRow] = []
    prompts: list[PromptPart] = []
    # By identity: to look a request up by itself makes a weak reference of it, for each row of each step.
    logits_of = {id(req): logits for req, logits in requests.items()}
    first = 0
    for row, req in enumerate(batch.reqs):
        length = batch.extend_lens[row] if prefills else 1
        logits = logits_of.get(id(req))
        # Columns that the model does not have would end the scheduler; no client of this package asks for them.
        if logits is not None and logits.fits(vocab_size):
            # Overlap scheduling lets the request's own ids lag by one; the lengths are those of the step.
            stop = batch.prefix_lens[row] + length if seq_lens is None else seq_lens[row]
            index = stop - len(logits.prompt_ids)
            if index >= 0 and logits.wants_sampled:
                before = req.output_ids if logits.reads_response else ()
                limit = logits.wanted.response_limit
                sampling_rows.append(SamplingRow(row, first + length - 1, index, logits, limit, before))
            tokens = logits.plan_prompt(stop - length, stop) if prefills else None
            if tokens is not None:
                offset = first - (stop - length)
                prompts.append(PromptPart(row=row, offset=offset, first=tokens[0], stop=tokens[1], logits=logits))
        first += length
    if not sampling_rows and not prompts:
        return None
    return tuple(sampling_rows), tuple(prompts), first
