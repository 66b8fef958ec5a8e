"""Frozen records: what is sent to an engine, what comes back, and what an engine says of itself.

Knows nothing of how they travel, nor of TensorDicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import ResolvedSpan

# SGLang's own default for max_new_tokens.
DEFAULT_NEW_TOKENS = 128
# The sampling of a prompt that is only read: SGLang must sample a token, which is dropped.
READING: Mapping[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}
# Of the states and logits that one server process holds for answers at a time.
MAX_ANSWER_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way to an engine.

    Args:
        prompt_ids: the P token ids that the engine gets, unpadded, exactly these.
        sampling: SGLang's sampling parameters, by SGLang's names. ``max_new_tokens=0`` reads the prompt only, and
            generates nothing.
        return_log_probs: whether the log-prob of every sampled token comes back.
        hidden: which hidden states come back, or None.
        score_prompt: whether log-probs of prompt tokens come back.
        score_from: the first prompt token whose log-prob comes back; those before it may be in the prefix cache. 0
            gives all, of which the first is NaN.
        logits: which logits come back, or None.
        constraints: on the tokens that are sampled; in a prompt that is scored on those in ``responses``.
        responses: the parts of a scored prompt that constraints act on as if they were being sampled: each ``(start,
            stop)``, in order and apart, 1 ≤ start < stop ≤ P. A constraint counts tokens from each start.
        response_limit: the ``max_new_tokens`` that those were sampled with, which a schedule may go by.
        processor: SGLang's own custom logit processor as its ``to_str`` writes it, or None.
        spans: the spans of ``hidden``, resolved for this prompt, under their names.
        lora: the name of a LoRA adapter that the server has loaded, or None.
        priority: of the request in the server's queue, where it schedules by priority; or None.
    """

    prompt_ids: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    return_log_probs: bool = True
    hidden: HiddenSpec | None = None
    score_prompt: bool = False
    spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)
    lora: str | None = None
    priority: int | None = None
    score_from: int = 0
    logits: LogitsSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    responses: tuple[tuple[int, int], ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS
    processor: str | None = None

    @property
    def reads_only(self) -> bool:
        """Whether nothing is generated."""
        return self.sampling.get("max_new_tokens") == 0


@dataclass(frozen=True, slots=True)
class Pooled:
    """One pooled segment or span of one request.

    Args:
        vector: float32 ``[D]``, or ``[K, D]`` where the layers were given as a tuple.
        count: the rows it was pooled over. Checked against the tokens before this record exists.
    """

    vector: torch.Tensor
    count: int


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The states of one run of a request's positions, one row each.

    Args:
        first: the position of the first row.
        rows_ND: ``[N, D]``, or ``[N, K, D]`` where the layers were given as a tuple; float32, or the dtype asked for
            where that is narrower.
    """

    first: int
    rows_ND: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenLogits:
    """The logits that some tokens were drawn from, one row each.

    Args:
        values_NC: ``[N, C]``, float32 or bfloat16 as asked for.
        token_ids_NC: int64 ``[N, C]``, the tokens of the columns, for ``top_k``; None else: they are those asked for.
    """

    values_NC: torch.Tensor
    token_ids_NC: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values_NC.nbytes + (0 if self.token_ids_NC is None else self.token_ids_NC.nbytes)


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for one `Request`. All per-token fields have the same T, checked when it was read.

    Args:
        prompt_ids: the ids that were sent, ``[P]``.
        response_ids: every sampled id up to and with the one that ended the response, ``[T]``, T ≥ 1; T = 0 where
            nothing was to be generated.
        text: the response as text, without special tokens and without a matched stop string.
        log_probs_T: float32 ``[T]``, or None when not asked for.
        hidden: the segments asked for, pooled.
        finish_reason: ``"stop"`` or ``"length"``.
        weight_version: the engine's name for the weights that the last token was sampled with.
        mixed_weights: whether tokens before it were sampled with other weights, because of an update in between.
        prompt_log_probs_P: float32 ``[P - score_from]``, when asked for: each prompt token's log-prob given those
            before it, of the model's own distribution, without temperature or penalties; inside ``responses`` under
            the request's constraints, ``-inf`` for a token that they take away. That of token 0 is NaN: nothing is
            before it.
        spans: the spans asked for, pooled.
        token_rows: every position that ``tokens=True`` asks for, from the first of them to the last; or None.
        logits: of the T response tokens, when asked for.
        prompt_logits: of the prompt's tokens 1 … P-1, when asked for.
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
    spans: Mapping[str, Pooled] = field(default_factory=dict)
    token_rows: TokenRows | None = None
    logits: TokenLogits | None = None
    prompt_logits: TokenLogits | None = None


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
        num_layers: the model's decoder layers.
        layers: the layers whose states can be had, by their canonical ids.
        pools_in_server: whether the server half is there and speaks this version's protocol.
        returns_hidden_states: whether the engine serves stock ``return_hidden_states``.
        honours_seeds: whether a request's ``sampling_seed`` has an effect: SGLang reads it only under
            ``--enable-deterministic-inference``.
        honours_priorities: likewise for its ``priority``, under ``--enable-priority-scheduling``.
        no_states_because: why the engine gives no hidden states, or not those of other layers than the last; empty
            where it gives all that it was started for.
        shares_memory: whether many bytes may come through shared memory: the engine is on this machine.
        constraints: the names of the constraints that the server half has the code of.
        takes_processors: whether it takes SGLang's own custom logit processors, under
            ``--enable-custom-logit-processor``.
    """

    model_path: str
    tokenizer_path: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    layers: tuple[int, ...]
    context_length: int
    max_prompt_tokens: int
    weight_version: str
    pools_in_server: bool
    returns_hidden_states: bool
    honours_seeds: bool
    honours_priorities: bool = False
    no_states_because: str = ""
    shares_memory: bool = False
    constraints: tuple[str, ...] = ()
    takes_processors: bool = False
