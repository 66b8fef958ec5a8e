"""Frozen records: what the user asks for, what is sent to an engine, what comes back.

Axes, here and in every name of the package:

    B  rows of a batch             T  response tokens
    P  prompt tokens               D  hidden size
    N  any run of positions        K  layers
    V  vocabulary                  C  the columns of the logits that were asked for

    name_BD is a tensor of shape [B, D]; a name without axes is a scalar or a record.

Which rows are pooled (positions are those of the tokens fed to the model, 0 … P+T-2; the last sampled token is never
fed back, so it has no state):

    prompt     0 … P-1        P rows
    response   P-1 … P+T-2    T rows; row t is the state that produced response token t
    full       0 … P+T-2      P+T-1 rows, each position once

``response`` is the convention of Hugging Face ``generate(output_hidden_states=True)``: entry t, last position.

Logits stand at the token that was drawn from them, as log-probs do: row t of the response's produced response token t,
row p of the prompt's is what the tokens before p say of token p. Nothing is before token 0, so it has no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, Span

ResolvedSpan: TypeAlias = PromptSpan | LastTokens | Between
Segment = Literal["prompt", "response", "full"]
Pooling = Literal["mean", "last"]
Stage = Literal["raw", "processed"]

SEGMENTS: tuple[Segment, ...] = get_args(Segment)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
STAGES: tuple[Stage, ...] = get_args(Stage)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# SGLang's own default for max_new_tokens.
DEFAULT_NEW_TOKENS = 128
# The sampling of a prompt that is only read: SGLang must sample a token, which is dropped.
READING: Mapping[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}


def rows_expected(segment: Segment, num_prompt: int, num_response: int) -> int:
    """How many positions a segment has, for P prompt and T response tokens (see the module's table)."""
    return {"prompt": num_prompt, "response": num_response, "full": num_prompt + num_response - 1}[segment]


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """Which hidden states a policy returns.

    Args:
        segments: any of ``"prompt"``, ``"response"``, ``"full"``; none where spans are enough. A policy that reads
            ``V(s)`` wants ``"prompt"``: the response is the action, not the state.
        pooling: ``"mean"`` averages a segment's or span's rows, accumulated in float32 whatever the model's dtype;
            ``"last"`` takes its last row; None pools nothing, for ``tokens=True``.
        layers: ``-1``, what the language-model head reads (after the final norm; Hugging Face ``hidden_states[-1]``);
            ``k ≥ 0``, the output of decoder layer k with the residual, before the final norm (Hugging Face
            ``hidden_states[k + 1]``; of the last layer, which Hugging Face gives after the norm only, before it);
            other negative ids count the decoder layers from the end, as in Python. One id gives vectors ``[D]``, a
            tuple of K ids ``[K, D]`` in its order. The server must have been started with them: ``launch(layers=…)``.
        tokens: also return every token's state of the segments, unpooled.
        dtype: floating dtype of what is returned. float32 goes into ``ValueOperator`` and GAE as it is. Token states
            of a float32 model travel as bfloat16 where this says so, half the bytes.
        spans: places inside the prompt or the response to pool as well, by names of yours: `LastTokens`, `TokenMask`,
            `Turn`, `Role`, `Between`.

    Raises:
        InputError: a value outside these.
        InputTypeError: a value of the wrong type.
    """

    segments: tuple[Segment, ...] = ("response",)
    pooling: Pooling | None = "mean"
    layers: int | tuple[int, ...] = -1
    tokens: bool = False
    dtype: torch.dtype = torch.float32
    spans: Mapping[str, Span] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # A bare string is a sequence of letters; a list is what JSON and YAML configs give.
        if isinstance(self.segments, str) or not isinstance(self.segments, (tuple, list)):
            raise InputTypeError(
                f"HiddenSpec(segments={self.segments!r}): expected a tuple of names, such as ('response',)"
            )
        object.__setattr__(self, "segments", tuple(self.segments))
        unknown = [segment for segment in self.segments if segment not in SEGMENTS]
        if unknown or len(set(self.segments)) != len(self.segments):
            raise InputError(f"HiddenSpec(segments={self.segments!r}): expected one or more of {SEGMENTS}, each once")
        if self.pooling not in (*POOLINGS, None):
            raise InputError(f"HiddenSpec(pooling={self.pooling!r}): expected one of {(*POOLINGS, None)}")
        if not isinstance(self.tokens, bool):
            raise InputTypeError(f"HiddenSpec(tokens={self.tokens!r}): expected True or False")
        self._check_layers()
        if not isinstance(self.dtype, torch.dtype):
            raise InputTypeError(f"HiddenSpec(dtype={self.dtype!r}): expected a torch.dtype, such as torch.float32")
        if self.dtype not in FLOAT_DTYPES:
            raise InputError(f"HiddenSpec(dtype={self.dtype}): expected one of {FLOAT_DTYPES}")
        self._check_spans()
        if self.pooling is None and (self.spans or not self.tokens):
            raise InputError(
                f"HiddenSpec(pooling=None, tokens={self.tokens}, spans={list(self.spans)}): without pooling there are "
                "the segments' token states only; pass tokens=True and no spans, or a pooling"
            )
        if not self.segments and (self.tokens or not self.spans):
            raise InputError(
                f"HiddenSpec(segments=(), tokens={self.tokens}, spans={list(self.spans)}): expected one or more of "
                f"{SEGMENTS}; none only beside spans, and without tokens=True"
            )

    def _check_layers(self) -> None:
        layers = self.layers
        if isinstance(layers, list):
            layers = tuple(layers)
            object.__setattr__(self, "layers", layers)
        ids = layers if isinstance(layers, tuple) else (layers,)
        if any(type(layer) is not int for layer in ids):
            raise InputTypeError(f"HiddenSpec(layers={layers!r}): expected an integer, or a tuple of them")
        if not ids or len(set(ids)) != len(ids):
            raise InputError(f"HiddenSpec(layers={layers!r}): expected one or more layer ids, each once")

    def _check_spans(self) -> None:
        if not isinstance(self.spans, Mapping):
            raise InputTypeError(f"HiddenSpec(spans={self.spans!r}): expected a dict of names to spans")
        object.__setattr__(self, "spans", dict(self.spans))
        for name, span in self.spans.items():
            if not isinstance(name, str) or not name:
                raise InputTypeError(f"HiddenSpec(spans={{{name!r}: …}}): a span's name is a non-empty string")
            if not isinstance(span, Span):
                raise InputTypeError(
                    f"HiddenSpec(spans={{{name!r}: {span!r}}}): expected LastTokens, TokenMask, Turn, Role or Between"
                )

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The layers as a tuple, K of them."""
        return self.layers if isinstance(self.layers, tuple) else (self.layers,)

    @property
    def needs_response(self) -> bool:
        """Whether anything asked for is of the response, so that a prompt alone does not do."""
        return self.segments not in ((), ("prompt",)) or any(
            isinstance(span, (LastTokens, Between)) and span.segment == "response" for span in self.spans.values()
        )


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
    segments: tuple[Segment, ...] = ("response",)
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
        return "response" in self.segments or "full" in self.segments

    @property
    def of_prompt(self) -> bool:
        """Whether the prompt's are wanted."""
        return "prompt" in self.segments or "full" in self.segments


def canonical_layer(layer: int, num_layers: int) -> int:
    """A layer's one name: -1 for what the head reads, else ``0 … num_layers-1``.

    Raises:
        InputError: the model has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise InputError(
            f"layers={layer}: the model has {num_layers} layers; use 0..{num_layers - 1}, -1 for the final norm's "
            f"output, or -2..{-num_layers} to count from the end"
        )
    return layer if layer >= -1 else num_layers + layer


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
