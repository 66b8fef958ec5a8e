"""Which logits a policy returns.

Logits stand at the token that was drawn from them, as log-probs do: row t of the response's produced response token t,
row p of the prompt's is what the tokens before p say of token p. Nothing is before token 0, so it has no row.
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
    """Which logits a policy returns: exactly one of ``top_k``, ``token_ids`` and ``full``.

    Args:
        top_k: the k largest of each token, with their ids, the largest first.
        token_ids: those of these C tokens, in this order: the actions of an environment.
        full: all V. Many bytes: 4·V for each token.
        stage: ``"raw"``, what the head gave, softcapped and scaled where the model does that, before penalties, masks
            and temperature; ``"processed"``, what the token was drawn from: after penalties, grammar, logit bias,
            constraints and temperature, so that their log-softmax over all V has the log-prob that is returned.
            ``-inf`` where a token was taken away. As in the log-probs, top-k, top-p and min-p of the sampling are not
            in them: SGLang applies these to the probabilities.
        segments: any of ``"prompt"``, ``"response"``, ``"full"``. A given sequence that is scored has ``"full"`` alone.
            Those of a prompt are the model's own at both stages, without penalties or temperature.
        dtype: float32, or bfloat16 for half the bytes, rounded on the device.

    Raises:
        InputError: none or several of the three, or a value outside these.
        TokenIdError: a negative id, or one that is there twice.
        InputTypeError: a value of the wrong type.
    """

    top_k: int | None = None
    token_ids: tuple[int, ...] | None = None
    full: bool = False
    stage: Stage = "raw"
    segments: tuple[Segment | SegmentName, ...] = (Segment.RESPONSE,)
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
            self._check_ids(self.token_ids)
        if self.stage not in STAGES:
            raise InputError(f"LogitsSpec(stage={self.stage!r}): expected one of {STAGES}")
        if isinstance(self.segments, str) or not isinstance(self.segments, (tuple, list)):
            raise InputTypeError(
                f"LogitsSpec(segments={self.segments!r}): expected a tuple of names, such as ('response',)"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        if not self.segments or not set(self.segments) <= set(SEGMENTS) or len(set(self.segments)) < len(self.segments):
            raise InputError(f"LogitsSpec(segments={self.segments!r}): expected one or more of {SEGMENTS}, each once")
        object.__setattr__(self, "segments", tuple(map(Segment, self.segments)))
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"LogitsSpec(dtype={self.dtype}): expected torch.float32 or torch.bfloat16")

    def _check_ids(self, given: Any) -> None:
        if isinstance(given, torch.Tensor) and not given.is_floating_point() and given.dtype != torch.bool:
            given = given.tolist()
        if not isinstance(given, (list, tuple, range)) or any(type(token_id) is not int for token_id in given):
            raise InputTypeError(
                f"LogitsSpec(token_ids={given!r:.80}): expected token ids, in the order of the columns"
            )
        ids = tuple(given)
        if not ids:
            raise InputError("LogitsSpec(token_ids=()): 0 columns; give at least 1 id")
        if min(ids) < 0 or len(set(ids)) < len(ids):
            raise TokenIdError(f"LogitsSpec(token_ids={ids!r:.80}): ids are at least 0, each once")
        object.__setattr__(self, "token_ids", ids)

    def num_columns(self, vocab_size: int) -> int:
        """C."""
        if self.token_ids is not None:
            return len(self.token_ids)
        return vocab_size if self.top_k is None else self.top_k

    def fits(self, vocab_size: int) -> bool:
        """Whether a model of V tokens has these columns."""
        return max((self.num_columns(vocab_size) - 1, *(self.token_ids or ()))) < vocab_size

    @property
    def of_response(self) -> bool:
        """Whether the response's are wanted."""
        return reads_response(self.segments)

    @property
    def of_prompt(self) -> bool:
        """Whether the prompt's are wanted."""
        return reads_prompt(self.segments)
