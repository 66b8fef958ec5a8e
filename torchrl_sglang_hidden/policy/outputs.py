"""The TensorClasses that this package writes beside TorchRL's own, and the keys that everything is written to.

Knows nothing of how they are filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A rollout on disk holds TorchRL's TensorClasses too, and is read once a class of this package was imported.
import torchrl.modules.llm.policies  # noqa: F401
from tensordict import TensorClass, TensorDict
from tensordict.utils import NestedKey

__all__ = ["HiddenStates", "Logits", "OutputKeys", "TokenHiddenStates"]


class HiddenStates(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """Pooled hidden states, aligned with the tokens of the same row.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``.
        response (torch.Tensor | None): the states that produced the response tokens, positions ``P-1 … P+T-2``.
        full (torch.Tensor | None): every position once: ``0 … P+T-2``; of a scored sequence ``0 … N-1``.
        prompt_count (torch.Tensor | None): rows of the segment, P. Each was pooled for ``"mean"``; ``"last"`` took the
            last of them.
        response_count (torch.Tensor | None): likewise, T.
        full_count (torch.Tensor | None): likewise, P+T-1, or N.
        spans (TensorDict | None): the pooled spans by their names, read as ``("hidden_states", "spans", name)``.
        span_counts (TensorDict | None): rows of each span, by the same names.

    Shapes:
        - prompt, response, full, and each span: ``[*batch, D]``, or ``[*batch, K, D]`` where `HiddenSpec.layers` is a
          tuple; float32 unless `HiddenSpec.dtype` says otherwise. None for a segment that was not asked for.
        - counts: int64 ``[*batch]``.

    A row that said it wants no states (``"return_hidden_states"``) has NaN, and a count of 0.

    The convention of ``response`` is that of Hugging Face ``generate(output_hidden_states=True)``, last position.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None
    prompt_count: torch.Tensor | None = None
    response_count: torch.Tensor | None = None
    full_count: torch.Tensor | None = None
    spans: TensorDict | None = None
    span_counts: TensorDict | None = None


class TokenHiddenStates(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The hidden state of every token of a row, unpooled.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``: one row for each token of ``tokens.prompt``.
        response (torch.Tensor | None): row t produced response token t, positions ``P-1 … P+T-2``: one row for each
            token of ``tokens.response``, and for its log-prob.
        full (torch.Tensor | None): every position once, ``0 … P+T-2``: one row for each token of ``tokens.full`` but
            the last, which was never read; of a scored sequence all N.

    Shapes:
        - ``[*batch, rows, D]``, or ``[*batch, rows, K, D]`` where `HiddenSpec.layers` is a tuple; in
          `HiddenSpec.dtype`. Ragged, unless the output is padded: then the prompt's rows on the left, the response's on
          the right, and those of ``full`` as in ``tokens.full``, with zeros beside them. The masks tell which rows are
          real; in ``full`` those of tokens that another token follows. None for a segment that was not asked for.

    A row that said it wants no states (``"return_hidden_states"``) has none; padded, it has NaN everywhere.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None


class Logits(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The logits that tokens were drawn from: each row stands at its token, as log-probs do.

    Args:
        prompt (torch.Tensor | None): row p is what the tokens before p say of prompt token p. Nothing is before token
            0: its row is zeros, as TorchRL's own shifted logits are.
        response (torch.Tensor | None): row t is what response token t was drawn from.
        full (torch.Tensor | None): both, one row for each token of ``tokens.full``; of a scored sequence all N.
        token_ids (torch.Tensor | None): of the response's columns, for `LogitsSpec.top_k`, where they differ from row
            to row; None else: the columns are those asked for. That of token 0 is ``0 … k-1``.
        prompt_token_ids (torch.Tensor | None): likewise, of the prompt's.
        full_token_ids (torch.Tensor | None): likewise, of both.

    Shapes:
        - prompt, response, full: ``[*batch, rows, C]`` in `LogitsSpec.dtype`; C is V, k, or the number of
          `LogitsSpec.token_ids`. None for a segment that was not asked for.
        - token_ids: int64, likewise.

    Ragged, unless the output is padded: then as the tokens are, with zeros, and 0 for ids.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    prompt_token_ids: torch.Tensor | None = None
    full_token_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class OutputKeys:
    """Where each result is written; None leaves it out."""

    text: NestedKey | None
    tokens: NestedKey | None
    masks: NestedKey | None
    log_probs: NestedKey | None
    history: NestedKey | None
    hidden_states: NestedKey | None
    token_hidden_states: NestedKey | None
    weight_version: NestedKey | None
    finish_reason: NestedKey | None
    mixed_weights: NestedKey | None
    logits: NestedKey | None = None

    def present(self) -> list[NestedKey]:
        """The keys that are written."""
        keys = (
            self.text, self.masks, self.tokens, self.log_probs, self.history, self.hidden_states,
            self.token_hidden_states, self.weight_version, self.finish_reason, self.mixed_weights, self.logits,
        )  # fmt: skip
        return [key for key in keys if key is not None]
