"""Checks what a request asks of heads, and reads and counts the scores of one answer.

Knows nothing of what a head computes, nor of how bytes travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from torchrl_sglang_hidden.errors import AlignmentError, CapabilityError, InputError, ProtocolError
from torchrl_sglang_hidden.protocol import FALLBACK_REMEDY, Answer
from torchrl_sglang_hidden.records import EngineInfo, Pooled, Request, Scores
from torchrl_sglang_hidden.reduce.head_scores import FoundScores
from torchrl_sglang_hidden.sglang_api.states import read_states
from torchrl_sglang_hidden.spec.head_scores import HeadSpec

__all__ = ["FoundHeads", "check_heads", "read_scores"]


@dataclass(frozen=True, slots=True)
class FoundHeads:
    """The scores of one answer by head; ``faults`` says why a span is not there."""

    scores: Mapping[str, Scores] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


def check_heads(row: int, request: Request, info: EngineInfo) -> None:
    """Refuse scores that the engine cannot give. Which heads it has, only the server knows.

    Raises:
        CapabilityError: a server without the server half.
        InputError: scores of a response where nothing is generated.
    """
    spec = request.heads
    if spec is None:
        return
    if not info.pools_in_server:
        because = f" ({info.no_states_because})" if info.no_states_because else ""
        raise CapabilityError(
            f"row {row}: heads={spec.heads} are asked of a server without the server half{because}; {FALLBACK_REMEDY}"
        )
    if request.reads_only and spec.of_response:
        raise InputError(
            f"row {row}: max_new_tokens=0 generates nothing, and HeadSpec(segments={spec.segments}, "
            f"spans={list(spec.spans)}) are not all of the prompt; ask for segments=('prompt',)"
        )


def read_scores(
    name: str,
    request: Request,
    answer: Answer | None,
    response_ids: tuple[int, ...],
    finish_type: str,
    info: EngineInfo,
    *,
    complete: bool,
) -> FoundHeads:
    """Read the scores of one answer, and count them against the tokens.

    Args:
        name: names the request in errors.
        request: what was asked.
        answer: the server half's.
        response_ids: the T tokens of the response.
        finish_type: why the response ended.
        info: the engine's.
        complete: whether it ended by itself, and was not given up on.

    Raises:
        AlignmentError: there are not as many scores as tokens, or the response did not end where its rule says.
        ProtocolError: there are none, or of other heads.
    """
    spec = request.heads
    if spec is None:
        if finish_type == "head":
            raise ProtocolError(f"{name}: finished with 'head', and no head was asked for; send it again")
        return FoundHeads()
    found = None if answer is None else answer.scores
    if found is None or len(found.versions) != len(spec.heads):
        raise ProtocolError(
            f"{name}: the scores of heads {spec.heads} were asked for and are not in the answer; send it again"
        )
    for segment, scores, wanted, expected in (
        ("prompt", found.prompt_HP, spec.prompt_tokens, len(request.prompt_ids)),
        ("response", found.response_HT, spec.sends_response, len(response_ids)),
    ):
        count = None if scores is None else scores.shape[1]
        if count != (expected if wanted else None):
            raise AlignmentError(
                f"{name}: {count} scores of each head for {expected} {segment} tokens, asked for: {wanted}; send it "
                "again"
            )
    if complete:
        _check_end(name, spec, found.response_HT, finish_type)
    pooled, spans, faults = _read_pooled(name, request, spec, found, response_ids, info)
    by_head = {
        head: Scores(
            prompt_P=None if found.prompt_HP is None else found.prompt_HP[index].clone(),
            response_T=found.response_HT[index].clone()
            if found.response_HT is not None and spec.response_tokens
            else None,
            version=found.versions[index],
            pooled=_of_head(pooled, index),
            spans=_of_head(spans, index),
        )
        for index, head in enumerate(spec.heads)
    }
    return FoundHeads(by_head, faults)


def _read_pooled(
    name: str, request: Request, spec: HeadSpec, found: FoundScores, response_ids: tuple[int, ...], info: EngineInfo
) -> tuple[Mapping[str, Pooled], Mapping[str, Pooled], Mapping[str, str]]:
    """Read pooled scores as states of as many dimensions as there are heads, which are counted alike."""
    pooled = spec.pooled
    if (pooled is None) is not (found.pools is None):
        raise ProtocolError(
            f"{name}: pooled scores asked for: {pooled is not None}, in the answer: {found.pools is not None}; send it "
            "again"
        )
    if pooled is None or found.pools is None:
        return {}, {}, {}
    states = read_states(
        f"{name}, scores of heads",
        replace(request, hidden=pooled, spans=request.head_spans),
        pooled,
        {},
        response_ids,
        replace(info, hidden_size=len(spec.heads)),
        Answer(found.pools, None),
    )
    return states.hidden, states.spans, states.faults


def _of_head(found: Mapping[str, Pooled], index: int) -> dict[str, Pooled]:
    return {name: replace(one, vector=one.vector[..., index].clone()) for name, one in found.items()}


def _check_end(name: str, spec: HeadSpec, response_HT: torch.Tensor | None, finish_type: str) -> None:
    """Check that a response ended with the first token that fulfils its rule, and said so."""
    rule, ends = spec.rule, []
    if rule is not None and response_HT is not None:
        scores_T = response_HT[spec.heads.index(rule.head)].tolist()
        ends = [token for token, score in enumerate(scores_T) if rule.holds(score)]
        if ends and ends[0] != len(scores_T) - 1:
            raise AlignmentError(
                f"{name}: stop_when={spec.stop_when!r} holds at token {ends[0]} of {len(scores_T)}, which should be "
                "the last; send it again, and report it if it stays"
            )
    # A token may end a response in two ways; but without the rule none ends by a head.
    if (finish_type == "head" and not ends) or (finish_type == "length" and ends):
        raise AlignmentError(
            f"{name}: finished with {finish_type!r}, and stop_when={spec.stop_when!r} holds at the tokens {ends}; "
            "send it again, and report it if it stays"
        )
