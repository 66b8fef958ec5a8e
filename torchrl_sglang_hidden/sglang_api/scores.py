"""Says what a request asks of heads, and reads and counts the scores of one answer.

Knows nothing of what a head computes, nor of how bytes travel.
"""

from __future__ import annotations

import torch

from torchrl_sglang_hidden.errors import AlignmentError, CapabilityError, InputError, ProtocolError
from torchrl_sglang_hidden.protocol import FALLBACK_REMEDY, Answer
from torchrl_sglang_hidden.records import EngineInfo, Request, Scores
from torchrl_sglang_hidden.reduce.head_scores import WantedScores
from torchrl_sglang_hidden.spec.head_scores import HeadSpec

__all__ = ["check_heads", "read_scores", "scores_of"]


def scores_of(request: Request) -> WantedScores | None:
    """Return the scores that a request asks the server half for; None for none."""
    spec = request.heads
    return None if spec is None else WantedScores(spec.heads, spec.of_prompt, spec.of_response, spec.rule)


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
            f"row {row}: max_new_tokens=0 generates nothing, and HeadSpec(segments={spec.segments}) are not all of the "
            "prompt; ask for segments=('prompt',)"
        )


def read_scores(
    name: str, request: Request, answer: Answer | None, num_response: int, finish_type: str, *, complete: bool
) -> dict[str, Scores]:
    """Read the scores of one answer, and count them against the tokens.

    Args:
        name: names the request in errors.
        request: what was asked.
        answer: the server half's.
        num_response: T.
        finish_type: why the response ended.
        complete: whether it ended by itself, and was not given up on.

    Raises:
        AlignmentError: there are not as many scores as tokens, or the response did not end where its rule says.
        ProtocolError: there are none, or of other heads.
    """
    spec = request.heads
    if spec is None:
        if finish_type == "head":
            raise ProtocolError(f"{name}: finished with 'head', and no head was asked for; send it again")
        return {}
    found = None if answer is None else answer.scores
    if found is None or len(found.versions) != len(spec.heads):
        raise ProtocolError(
            f"{name}: the scores of heads {spec.heads} were asked for and are not in the answer; send it again"
        )
    for segment, scores, wanted, expected in (
        ("prompt", found.prompt_HP, spec.of_prompt, len(request.prompt_ids)),
        ("response", found.response_HT, spec.of_response, num_response),
    ):
        count = None if scores is None else scores.shape[1]
        if count != (expected if wanted else None):
            raise AlignmentError(
                f"{name}: {count} scores of each head for {expected} {segment} tokens, asked for: {wanted}; send it "
                "again"
            )
    if complete:
        _check_end(name, spec, found.response_HT, finish_type)
    return {
        head: Scores(
            prompt_P=None if found.prompt_HP is None else found.prompt_HP[index].clone(),
            response_T=None if found.response_HT is None else found.response_HT[index].clone(),
            version=found.versions[index],
        )
        for index, head in enumerate(spec.heads)
    }


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
