"""Frozen records: what the user asks for, what is sent to an engine, what comes back.

Axes, here and in every name of the package:

    B  rows of a batch             T  response tokens
    P  prompt tokens               D  hidden size

    name_BD is a tensor of shape [B, D]; a name without axes is a scalar or a record.

Which rows are pooled (positions are those of the tokens fed to the model, 0 … P+T-2; the last sampled token is never
fed back, so it has no state):

    prompt     0 … P-1        P rows
    response   P-1 … P+T-2    T rows; row t is the state that produced response token t
    full       0 … P+T-2      P+T-1 rows, each position once

``response`` is the convention of Hugging Face ``generate(output_hidden_states=True)``: entry t, last position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError

Segment = Literal["prompt", "response", "full"]
Pooling = Literal["mean", "last"]

SEGMENTS: tuple[Segment, ...] = get_args(Segment)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rows_expected(segment: Segment, num_prompt: int, num_response: int) -> int:
    """How many positions a segment has, for P prompt and T response tokens (see the module's table)."""
    return {"prompt": num_prompt, "response": num_response, "full": num_prompt + num_response - 1}[segment]


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """Which hidden states a policy returns.

    Args:
        segments: any of ``"prompt"``, ``"response"``, ``"full"``, at least one. A policy that reads ``V(s)`` wants
            ``"prompt"``: the response is the action, not the state.
        pooling: ``"mean"`` averages the segment's rows, accumulated in float32 whatever the model's dtype; ``"last"``
            takes the segment's last row.
        layers: ``-1``, what the language-model head reads (after the final norm; Hugging Face ``hidden_states[-1]``).
            Other layers are not captured by this version and raise.
        dtype: floating dtype of the returned vectors. float32 goes into ``ValueOperator`` and GAE as it is.

    Raises:
        InputError: a value outside these.
        InputTypeError: ``segments`` is not a sequence of strings, or ``dtype`` is no torch dtype.
    """

    segments: tuple[Segment, ...] = ("response",)
    pooling: Pooling = "mean"
    layers: int = -1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        # A bare string is a sequence of letters; a list is what JSON and YAML configs give.
        if isinstance(self.segments, str) or not isinstance(self.segments, (tuple, list)):
            raise InputTypeError(
                f"HiddenSpec(segments={self.segments!r}): expected a tuple of names, such as ('response',)"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        unknown = [segment for segment in self.segments if segment not in SEGMENTS]
        if unknown or not self.segments or len(set(self.segments)) != len(self.segments):
            raise InputError(f"HiddenSpec(segments={self.segments!r}): expected one or more of {SEGMENTS}, each once")
        if self.pooling not in POOLINGS:
            raise InputError(f"HiddenSpec(pooling={self.pooling!r}): expected one of {POOLINGS}")
        if type(self.layers) is not int or self.layers != -1:
            raise InputError(
                f"HiddenSpec(layers={self.layers!r}): this version captures the last layer only; use layers=-1"
            )
        if not isinstance(self.dtype, torch.dtype):
            raise InputTypeError(f"HiddenSpec(dtype={self.dtype!r}): expected a torch.dtype, such as torch.float32")
        if self.dtype not in FLOAT_DTYPES:
            raise InputError(f"HiddenSpec(dtype={self.dtype}): expected one of {FLOAT_DTYPES}")

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether every prompt row must be computed, so that a prefix-cache hit would leave a gap."""
        return self.pooling == "mean" and ("prompt" in self.segments or "full" in self.segments)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way to an engine.

    Args:
        prompt_ids: the P token ids that the engine gets, unpadded, exactly these.
        sampling: SGLang's sampling parameters, by SGLang's names.
        return_log_probs: whether the log-prob of every sampled token comes back.
        hidden: which hidden states come back, or None.
        score_prompt: whether the log-prob of every prompt token comes back.
    """

    prompt_ids: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    return_log_probs: bool = True
    hidden: HiddenSpec | None = None
    score_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Pooled:
    """One pooled segment of one request.

    Args:
        vector_D: float32 ``[D]``.
        count: the rows it was pooled over. Checked against the tokens before this record exists.
    """

    vector_D: torch.Tensor
    count: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for one `Request`. All per-token fields have the same T, checked when it was read.

    Args:
        prompt_ids: the ids that were sent, ``[P]``.
        response_ids: every sampled id up to and with the one that ended the response, ``[T]``, T ≥ 1.
        text: the response as text, without special tokens and without a matched stop string.
        log_probs_T: float32 ``[T]``, or None when not asked for.
        hidden: the segments asked for, pooled.
        finish_reason: ``"stop"`` or ``"length"``.
        weight_version: the engine's name for the weights that the last token was sampled with.
        mixed_weights: whether tokens before it were sampled with other weights, because of an update in between.
        prompt_log_probs_P: float32 ``[P]``, when asked for: each prompt token's log-prob given those before it, of the
            model's own distribution, without temperature or penalties. The first is NaN: nothing is before it.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    log_probs_T: torch.Tensor | None
    hidden: Mapping[Segment, Pooled]
    finish_reason: str
    weight_version: str
    mixed_weights: bool = False
    prompt_log_probs_P: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself when a client connects.

    Args:
        model_path: where the engine read the weights from, in its own file system.
        tokenizer_path: likewise for the tokenizer.
        vocab_size: ids are in ``[0, vocab_size)``.
        hidden_size: D.
        context_length: most tokens of prompt and response together.
        max_prompt_tokens: most tokens of one prompt; less than the context length when the KV cache is small.
        weight_version: the engine's name for its weights at connect, or since the last update through this engine.
        pools_in_server: whether the server half is there and speaks this version's protocol.
        returns_hidden_states: whether the engine serves stock ``return_hidden_states``.
        honours_seeds: whether a request's ``sampling_seed`` has an effect: SGLang reads it only under
            ``--enable-deterministic-inference``.
    """

    model_path: str
    tokenizer_path: str
    vocab_size: int
    hidden_size: int
    context_length: int
    max_prompt_tokens: int
    weight_version: str
    pools_in_server: bool
    returns_hidden_states: bool
    honours_seeds: bool
