"""Says which logits one request wants, and what came of them.

Knows nothing of batches, JSON or TensorDicts. A row of logits belongs to the token that is drawn from it, as a log-prob
does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, TokenLogits
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["FoundLogits", "WantedLogits"]


@dataclass(frozen=True, slots=True)
class WantedLogits:
    """Says which logits one request wants, and the constraints that change them.

    Args:
        spec: the logits that come back; None for none.
        constraints: applied in this order.
        prompt_from: the first prompt token whose logits are needed, at least 1; None for no prompt token.
        scored: whether the log-probs of the prompt tokens from ``prompt_from`` on are wanted. The request then scores
            a sequence, and its constraints act on ``response_ranges``, not on sampled tokens.
        response_ranges: the responses inside a scored prompt, each ``(start, stop)``. Constraints act on their tokens
            as if they were being sampled.
        response_limit: ``max_new_tokens`` of the response; of a scored prompt, of each response in it.
        entropy: whether the entropies of the sampled tokens' distributions come back.
    """

    spec: LogitsSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    prompt_from: int | None = None
    scored: bool = False
    response_ranges: tuple[tuple[int, int], ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS
    entropy: bool = False

    @property
    def constrains_sampled(self) -> bool:
        """Whether constraints act on sampled tokens; in a scored prompt they act on its responses instead."""
        return bool(self.constraints) and not self.scored

    @property
    def wants_sampled(self) -> bool:
        """Whether sampled tokens are constrained, or their logits or entropies come back."""
        return self.constrains_sampled or self.entropy or (self.spec is not None and self.spec.of_response)

    @property
    def wants_any(self) -> bool:
        """Whether the request has to do with logits at all, of sampled tokens or of prompt tokens."""
        return self.wants_sampled or self.prompt_from is not None


@dataclass(frozen=True, slots=True)
class FoundLogits:
    """Holds the logits and log-probs that one finished request brought.

    Args:
        response: the logits of the sampled tokens, ``[T, C]``; or None.
        prompt: the logits of the prompt tokens from `WantedLogits.prompt_from` on, ``[N, C]``; or None.
        log_probs_N: the log-probs of the same prompt tokens, float32 ``[N]``; or None.
        constrained: the number of sampled tokens that passed through the constraints.
        fault: why the constraints could not be kept; empty where they were.
        refused: why no logits come back; empty where they do.
        entropy_T: the entropies of the sampled tokens' distributions, float32 ``[T]``; or None.
    """

    response: TokenLogits | None = None
    prompt: TokenLogits | None = None
    log_probs_N: torch.Tensor | None = None
    constrained: int = 0
    fault: str = ""
    refused: str = ""
    entropy_T: torch.Tensor | None = None
