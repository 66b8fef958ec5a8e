"""Defines the frozen records: what is sent to an engine, what comes back, and the description of an engine.

Knows nothing of TensorDicts, nor of how the records travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchrl_sglang_hidden.errors import SGLangHiddenError
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import ResolvedSpan

# SGLang's own default for max_new_tokens.
DEFAULT_NEW_TOKENS = 128
# Sampling parameters for a prompt that is only read: SGLang samples at least one token, which is dropped.
READING: Mapping[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}
# Most bytes of states and logits that one server process holds at a time for clients to fetch.
MAX_ANSWER_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class SamplingRecords:
    """Says what is recorded of each sampled token beside its log-prob.

    Args:
        entropy: the entropy of the distribution that it was drawn from, which the server half computes.
        sampling_mask: the tokens that top-k, top-p and min-p left to draw from.
        routed_experts: the experts that each position was routed to, of a mixture of experts.
    """

    entropy: bool = False
    sampling_mask: bool = False
    routed_experts: bool = False


NO_RECORDS = SamplingRecords()


@dataclass(frozen=True, slots=True)
class Images:
    """Says which images stand in a prompt, and where.

    Args:
        sent_ids: the prompt with one placeholder for each image: what the engine gets, which expands it.
        data: the images as data URIs, in the order of their placeholders.
        ranges: where each image's rows stand in `Request.prompt_ids`, half-open, in order.
        placeholder: the id of an image row in `Request.prompt_ids`. Rows inside a range with another id, such as
            Pixtral's breaks, are ordinary tokens.
    """

    sent_ids: tuple[int, ...]
    data: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    placeholder: int

    def rows(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of the expanded prompt where an image stands and no token."""
        return tuple(
            position
            for start, stop in self.ranges
            for position in range(start, stop)
            if prompt_ids[position] == self.placeholder
        )

    def followed_by(self, ids: Sequence[int]) -> Images:
        """Return the same images in a prompt that goes on with these ids, such as a response."""
        return replace(self, sent_ids=(*self.sent_ids, *ids))


@dataclass(frozen=True, slots=True)
class Request:
    """Says what to do with one prompt: what to generate, and what comes back.

    Args:
        prompt_ids: the P token ids of the prompt, without padding. The engine gets exactly these, or computes them
            from ``images.sent_ids``: with images they are expanded, one id for each row of an image.
        sampling: SGLang's sampling parameters by SGLang's names. ``max_new_tokens=0`` reads the prompt and generates
            nothing.
        return_log_probs: whether the log-prob of every sampled token comes back.
        hidden: the hidden states that come back, or None.
        score_prompt: whether the log-probs of prompt tokens come back.
        spans: the spans of ``hidden`` by name, each resolved for this prompt.
        lora: the name of a LoRA adapter that the server has loaded, or None.
        priority: the request's priority in the server's queue, for a server that schedules by priority; or None.
        score_from: index of the first prompt token whose log-prob comes back. Earlier tokens may come from the prefix
            cache. 0 gives the log-probs of all P tokens, and the first is NaN.
        logits: the logits that come back, or None.
        constraints: constrain the sampled tokens; in a scored prompt, the tokens inside ``response_ranges``.
        response_ranges: the responses inside a scored prompt, each ``(start, stop)`` with 1 ≤ start < stop ≤ P, in
            order and without overlap. Constraints act on their tokens as if they were being sampled, and count tokens
            from each start.
        response_limit: the ``max_new_tokens`` that the responses of a scored prompt were sampled with. A
            `TemperatureScale` without ``steps`` of its own depends on it.
        processor: a serialised native SGLang logit processor (its ``to_str()``), or None.
        records: what else is recorded of the sampling.
        return_errors: whether what goes wrong with this request alone, after it was sent, comes back as
            `Completion.error`: an abort, a span that the response does not have, constraints that left no token. False
            raises it, and the completions of all rows are on the exception.
        images: the images in the prompt, or None for none. All positions of a request (``score_from``, ``spans``,
            ``response_ranges``) count the rows of ``prompt_ids``.
        heads: the scores that come back, and the rule that ends the response by one; or None.
        head_spans: the spans of ``heads``, as ``spans`` has those of ``hidden``.
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
    response_ranges: tuple[tuple[int, int], ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS
    processor: str | None = None
    records: SamplingRecords = NO_RECORDS
    return_errors: bool = False
    images: Images | None = None
    heads: HeadSpec | None = None
    head_spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)

    @property
    def image_rows(self) -> tuple[int, ...]:
        """The positions of the prompt where an image stands and no token; none without images."""
        return () if self.images is None else self.images.rows(self.prompt_ids)

    @property
    def reads_only(self) -> bool:
        """Whether the prompt is read and nothing is generated."""
        return self.sampling.get("max_new_tokens") == 0


@dataclass(frozen=True, slots=True)
class Pooled:
    """Holds the pooled hidden state of one segment or span of one request.

    Args:
        vector: float32 ``[D]``; ``[K, D]`` where the layers were given as a tuple. Of a span without a pooling its S
            rows, ``[S, D]`` or ``[S, K, D]``. Of a span that may be empty, and is, NaN, or no rows.
        count: the number of rows that were pooled. It was checked against the number of tokens.
        places: of a span without a pooling, and of `At` and `Each` of a response, which rows of the prompt or the
            response these are, in order; else None.
    """

    vector: torch.Tensor
    count: int
    places: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Holds the hidden states of N consecutive positions of one request, one row each.

    Args:
        first: the position of the first row, from 0 at the prompt's first token.
        rows_ND: ``[N, D]``; ``[N, K, D]`` where the layers were given as a tuple. float32, or the requested dtype
            where it is narrower.
    """

    first: int
    rows_ND: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenLogits:
    """Holds the logits of N consecutive tokens of one request: row n is what token n was drawn from.

    Args:
        values_NC: ``[N, C]``, float32 or bfloat16, as the `LogitsSpec` asks.
        token_ids_NC: int64 ``[N, C]``, the token id of each value, for ``top_k``. None otherwise: the columns are the
            spec's ``token_ids``, or the vocabulary in order.
    """

    values_NC: torch.Tensor
    token_ids_NC: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """The number of bytes of values and token ids together."""
        return self.values_NC.nbytes + (0 if self.token_ids_NC is None else self.token_ids_NC.nbytes)


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds one head's scores of one request.

    Args:
        prompt_P: float32 ``[P]``, of the prompt's positions; None where they were not asked for.
        response_T: float32 ``[T]``, each of the state that produced the response token; None where not asked for.
        version: of the head that gave them.
        pooled: of the segments that ``HeadSpec(pooling=…)`` pools, each one number, float32 ``[]``.
        spans: of its spans, ``[]`` each, or ``[S]`` of one without a pooling.
    """

    prompt_P: torch.Tensor | None
    response_T: torch.Tensor | None
    version: str
    pooled: Mapping[str, Pooled] = field(default_factory=dict)
    spans: Mapping[str, Pooled] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingMask:
    """Holds what each of T tokens was drawn from, after top-k, top-p and min-p: up to S tokens, the best first.

    Args:
        log_probs_T: float32 ``[T]``, the log-prob of each sampled token among these: the behaviour policy's.
        token_ids_TS: int64 ``[T, S]``, padded with -1.
        token_log_probs_TS: float32 ``[T, S]``, the log-probs of all of them, padded with ``-inf``.
    """

    log_probs_T: torch.Tensor
    token_ids_TS: torch.Tensor
    token_log_probs_TS: torch.Tensor


@dataclass(frozen=True, slots=True)
class Completion:
    """Holds what came back for one `Request`. All per-token fields were checked to have the same T.

    Args:
        prompt_ids: the P prompt ids, expanded where there are images.
        response_ids: the T sampled ids, with the one that ended the response. T ≥ 1; T = 0 where the request generates
            nothing.
        text: the response as text, without special tokens and without a matched stop string.
        log_probs_T: float32 ``[T]``, the log-prob of each sampled token; None where the request does not ask.
        hidden: the pooled segments that the request asks for.
        finish_reason: ``"stop"``, ``"length"``, or ``"head"`` where a head's score ended the response; ``"abort"`` of
            a response that the engine gave up on, and ``"error"`` of a request without a response, or one that cannot
            be gone on from, both with an ``error``.
        weight_version: the engine's name for the weights that sampled the last token.
        mixed_weights: whether earlier tokens were sampled with other weights, because of an update in between.
        versions: the versions of the weights that sampled the response, each with the number of its tokens, in order.
        prompt_log_probs_P: float32 ``[P - score_from]``, the log-prob of each prompt token given the tokens before it;
            NaN for token 0 and at every row of an image, where no token is, and None where the request does not ask.
            It is of the model's own distribution, without temperature or penalties. Inside ``response_ranges`` the
            request's constraints apply, and a token that they remove has ``-inf``.
        spans: the pooled spans that the request asks for, by name.
        token_rows: the states of every position that ``HiddenSpec(tokens=True)`` asks for, from the first position to
            the last; or None.
        logits: the logits of the T response tokens, or None.
        prompt_logits: the logits of the prompt tokens 1 … P-1, or None. Row p-1 is what the rows before p say of what
            stands at p, at image rows too, where nothing is predicted.
        error: what went wrong with this request alone, or None. The tokens and log-probs of an aborted response are
            those that were sampled before; states that are not there are missing in ``hidden`` and ``spans``.
        entropy_T: float32 ``[T]``, in nats, of the distribution that ``log_probs_T`` is of; None where it is not asked
            for. So are the next two, which an aborted response may lack.
        sampling_mask: the tokens that each token was drawn from.
        routed_experts: int32 ``[P+T-1, L, k]``, the k experts of each position and layer.
        cached_tokens: how many of the P prompt tokens the engine had in its prefix cache.
        scores: the scores of the heads that the request asks for, by name.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    log_probs_T: torch.Tensor | None
    hidden: Mapping[str, Pooled]
    finish_reason: str
    weight_version: str
    mixed_weights: bool = False
    prompt_log_probs_P: torch.Tensor | None = None
    spans: Mapping[str, Pooled] = field(default_factory=dict)
    token_rows: TokenRows | None = None
    logits: TokenLogits | None = None
    prompt_logits: TokenLogits | None = None
    error: SGLangHiddenError | None = None
    versions: tuple[tuple[str, int], ...] = ()
    entropy_T: torch.Tensor | None = None
    sampling_mask: SamplingMask | None = None
    routed_experts: torch.Tensor | None = None
    cached_tokens: int = 0
    scores: Mapping[str, Scores] = field(default_factory=dict)


def failed_completion(
    request: Request, error: SGLangHiddenError, weight_version: str, *, finish_reason: str = "error"
) -> Completion:
    """Return the completion of a request without a response: every count is 0, and a scored token's log-prob NaN.

    Args:
        request: what was asked.
        error: why there is no response.
        weight_version: the engine's.
        finish_reason: ``"abort"`` where the engine gave up on it, else ``"error"``.
    """
    num_scored = len(request.prompt_ids) - request.score_from
    return Completion(
        prompt_ids=request.prompt_ids,
        response_ids=(),
        text="",
        log_probs_T=torch.empty(0) if request.return_log_probs else None,
        hidden={},
        finish_reason=finish_reason,
        weight_version=weight_version,
        prompt_log_probs_P=torch.full((num_scored,), torch.nan) if request.score_prompt else None,
        error=error,
    )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Describes an engine, as read when a client connects.

    Args:
        model_path: where the engine read the weights from, in the engine's own file system.
        tokenizer_path: where the engine read the tokenizer from, in the engine's own file system.
        vocab_size: V; token ids are in ``[0, V)``.
        hidden_size: D.
        num_layers: the number of the model's decoder layers.
        layers: canonical ids of the layers whose states the engine gives. All of them, unless the engine runs CUDA
            graphs that record some only.
        context_length: most tokens of prompt and response together.
        max_prompt_tokens: most tokens of one prompt; less than the context length when the KV cache is small. A
            response ends where prompt and response together reach it, so that both can be scored and gone on from.
        weight_version: the engine's name for its weights at connect, or since the last update through this engine.
        pools_in_server: whether the server half runs there and speaks this version's protocol.
        returns_hidden_states: whether the engine serves stock ``return_hidden_states``.
        honours_seeds: whether a request's ``sampling_seed`` has an effect. SGLang reads it only under
            ``--enable-deterministic-inference``.
        honours_priorities: whether a request's ``priority`` has an effect. SGLang reads it only under
            ``--enable-priority-scheduling``.
        no_states_because: why the engine gives no hidden states, or not those of every layer. Empty where it gives
            them all.
        shares_memory: whether the engine is on this machine, so that large results can come through shared memory.
        constraints: the names of the constraints whose code the server half has.
        takes_processors: whether the engine takes native SGLang logit processors, under
            ``--enable-custom-logit-processor``.
        raw_log_probs: whether the log-probs of sampled tokens leave the temperature out, because the server was
            started with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``. Only the server half says so.
        max_sampling_mask: most tokens that one token is drawn from, for ``return_sampling_mask``; 0 where the engine
            does not give them.
        returns_routed_experts: whether the engine records experts, under ``--enable-return-routed-experts``.
        takes_images: whether the model reads images.
        max_images: most images of one prompt, as the server was started; None for no limit.
        image_token_id: the id that stands for an image in the ids that are sent; None where it is not known.
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
    raw_log_probs: bool = False
    max_sampling_mask: int = 0
    returns_routed_experts: bool = False
    takes_images: bool = False
    max_images: int | None = None
    image_token_id: int | None = None
