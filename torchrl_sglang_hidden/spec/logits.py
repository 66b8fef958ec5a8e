"""Defines which logits a policy returns.

A row of logits belongs to the token that was drawn from it, as a log-prob does. Row t of a response produced response
token t. Row p of a prompt is what the tokens before p predict for token p; token 0 has no row, since no token is before
it. Knows nothing of SGLang, TensorDicts or constraints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.spec.hidden import SEGMENTS, Segment, SegmentName, reads_prompt, reads_response

Stage = Literal["raw", "processed"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, slots=True)
class LogitsSpec:
    """Says which logits a policy returns: exactly one of ``top_k``, ``token_ids`` and ``full``.

    Args:
        top_k: the k largest logits of each token with their token ids, the largest first.
        token_ids: the logits of these C tokens, in this order, such as the actions of an environment.
        full: the logits of all V tokens, 4·V bytes for each row in float32.
        stage: ``"raw"`` for the logits of the model's head, with the model's own softcap and scale, before penalties,
            masks and temperature. ``"processed"`` for the logits that the token was drawn from, after penalties,
            grammar, logit bias, constraints and temperature: the returned log-prob is their log-softmax over all V. A
            removed token has ``-inf``. Top-k, top-p and min-p sampling change neither logits nor log-probs, since
            SGLang applies them to the probabilities.
        segments: any of ``"prompt"``, ``"response"``, ``"full"``. Scoring returns ``"full"`` alone. The prompt's logits
            are the model's own at both stages, without penalties or temperature.
        dtype: float32, or bfloat16 for half the bytes, rounded on the device.

    Raises:
        InputError: none or several of ``top_k``, ``token_ids`` and ``full``, or a value outside its limits.
        TokenIdError: a negative id, or an id given twice.
        InputTypeError: a value of the wrong type.
    """

    top_k: int | None = None
    token_ids: tuple[int, ...] | None = None
    full: bool = False
    stage: Stage = "raw"
    segments: tuple[Segment | SegmentName, ...] = ("response",)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.full, bool):
            raise InputTypeError(f"LogitsSpec(full={self.full!r}): expected True or False")
        if (self.top_k is not None) + (self.token_ids is not None) + self.full != 1:
            raise InputError(
                f"LogitsSpec(top_k={self.top_k!r}, token_ids={self.token_ids!r:.80}, full={self.full}): give exactly "
                "one of the three"
            )
        if self.top_k is not None and type(self.top_k) is not int:
            raise InputTypeError(f"LogitsSpec(top_k={self.top_k!r}): expected an integer of at least 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"LogitsSpec(top_k={self.top_k}): expected an integer of at least 1")
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", _resolve_ids(self.token_ids))
        if self.stage not in STAGES:
            raise InputError(f"LogitsSpec(stage={self.stage!r}): expected one of {STAGES}")
        if isinstance(self.segments, str) or not isinstance(self.segments, (tuple, list)):
            raise InputTypeError(
                f"LogitsSpec(segments={self.segments!r}): expected a tuple of names, such as ('response',)"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments or not set(self.segments) <= set(SEGMENTS) or len(set(self.segments)) < len(self.segments):
            raise InputError(f"LogitsSpec(segments={self.segments!r}): expected one or more of {SEGMENTS}, each once")
        object.__setattr__(self, "segments", tuple(map(str, self.segments)))
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"LogitsSpec(dtype={self.dtype}): expected torch.float32 or torch.bfloat16")

    def num_columns(self, vocab_size: int) -> int:
        """Return C, the number of logits in a row, for a model of V tokens."""
        match self:
            case LogitsSpec(top_k=int(top_k)):
                return top_k
            case LogitsSpec(token_ids=tuple(token_ids)):
                return len(token_ids)
            case LogitsSpec(full=True):
                return vocab_size
            case _:
                raise NotImplementedError(f"{self}: the number of columns is not known; add a case to num_columns")

    def fits(self, vocab_size: int) -> bool:
        """Return whether a model of V tokens has these columns."""
        return max((self.num_columns(vocab_size) - 1, *(self.token_ids or ()))) < vocab_size

    @property
    def of_response(self) -> bool:
        """Whether logits of response tokens are wanted."""
        return reads_response(self.segments)

    @property
    def of_prompt(self) -> bool:
        """Whether logits of prompt tokens are wanted."""
        return reads_prompt(self.segments)


def _resolve_ids(token_ids: Any) -> tuple[int, ...]:
    if isinstance(token_ids, torch.Tensor) and not token_ids.is_floating_point() and token_ids.dtype != torch.bool:
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, (list, tuple, range)) or any(type(token_id) is not int for token_id in token_ids):
        raise InputTypeError(
            f"LogitsSpec(token_ids={token_ids!r:.80}): expected token ids, in the order of the columns"
        )
    ids = tuple(token_ids)
    if not ids:
        raise InputError("LogitsSpec(token_ids=()): 0 columns; give at least 1 id")
    if min(ids) < 0 or len(set(ids)) < len(ids):
        raise TokenIdError(f"LogitsSpec(token_ids={ids!r:.80}): ids are at least 0, each once")
    return ids
