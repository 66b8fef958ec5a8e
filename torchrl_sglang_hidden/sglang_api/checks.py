"""Checks `Request`s against an engine's description before they become a payload.

Knows nothing of TensorDicts, nor of how a payload is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrl_sglang_hidden.errors import (
    CapabilityError,
    ConstraintError,
    InputError,
    InputTypeError,
    PromptLengthError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.protocol import FALLBACK_REMEDY, MAX_CONSTRAINTS
from torchrl_sglang_hidden.protocol.tensors import MAX_TEXT_BYTES
from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, MAX_ANSWER_BYTES, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.images import check_images
from torchrl_sglang_hidden.sglang_api.payload import wanted_of
from torchrl_sglang_hidden.sglang_api.scores import check_heads
from torchrl_sglang_hidden.spec.constraints import check_constraints
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, canonical_layer, reads_prompt
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.places import At, Each
from torchrl_sglang_hidden.spec.request_rules import check_prompt_ids, check_token_ids
from torchrl_sglang_hidden.spec.span_base import MAX_SPAN_ROWS
from torchrl_sglang_hidden.spec.spans import (
    Between,
    LastTokens,
    PromptSpan,
    ResolvedSpan,
    ResponseSpan,
    may_be_empty,
)

__all__ = ["check_requests"]

MAX_SHARED_BYTES = MAX_ANSWER_BYTES // 2
# SGLang samples greedily below it.
GREEDY_TEMPERATURE = 1e-6


def check_requests(requests: Sequence[Request], info: EngineInfo) -> None:
    """Refuse requests that the server would refuse, or that would take the whole server down, before any is sent.

    SGLang 0.5.23's scheduler ends on an id outside the vocabulary and on an empty prompt.

    Args:
        requests: one for each row of the batch.
        info: the engine's description.

    Raises:
        PromptLengthError: no rows, a row without tokens, or a prompt over `EngineInfo.max_prompt_tokens`.
        TokenIdError: an id outside ``[0, vocab_size)``.
        InputTypeError: an id that is no Python int.
        InputError: a value outside its limits, or more bytes than a result may have.
        ConstraintError: constraints that leave no token to choose.
        SpanError: a span outside its prompt.
        CapabilityError: hidden states, logits, constraints, images, seeds or priorities that this engine does not
            serve.
    """
    if not requests:
        raise PromptLengthError("the batch has 0 rows; pass at least 1 prompt")
    priorities = {request.priority for request in requests}
    if len(priorities) > 1:
        raise InputError(f"the rows have priorities {priorities}, and SGLang takes one per batch; send them apart")
    if priorities != {None} and not info.honours_priorities:
        raise CapabilityError(
            f"priority={requests[0].priority}, which this engine does not read; start SGLang with "
            "--enable-priority-scheduling, or leave it out"
        )
    for row, request in enumerate(requests):
        _check_prompt(row, request.prompt_ids, info)
        check_images(row, request, info)
        _check_sampling(row, request, info)
        if request.hidden is not None:
            _check_hidden(row, request, request.hidden, info)
        _check_constraints_and_logits(row, request, info)
        _check_records(row, request, info)
        check_heads(row, request, info)
        if request.heads is not None:
            # Scores are pooled as states are; without anything to pool there are no spans.
            pooled = request.heads.pooled or HiddenSpec()
            _check_spans(row, "head_spans", request.head_spans, pooled, request, info)
    sizes = [_logits_bytes(request, info) for request in requests]
    if sum(sizes) > MAX_ANSWER_BYTES:
        raise InputError(
            f"the logits of {len(requests)} rows are up to {sum(sizes) / 2**20:.0f} MiB, over the limit of "
            f"{MAX_ANSWER_BYTES // 2**20} MiB for one batch; send fewer rows at a time, or ask for fewer tokens, top_k "
            "or token_ids"
        )


def _check_prompt(row: int, ids: tuple[int, ...], info: EngineInfo) -> None:
    if not set(map(type, ids)) <= {int}:
        wrong = next(token_id for token_id in ids if type(token_id) is not int)
        raise InputTypeError(f"row {row}: token id {wrong!r} is a {type(wrong).__name__}; token ids are integers")
    check_prompt_ids(f"row {row}:", ids, info.vocab_size)
    if len(ids) > info.max_prompt_tokens:
        raise PromptLengthError(
            f"row {row}: the prompt has {len(ids)} tokens, over the engine's limit of {info.max_prompt_tokens} "
            f"(context length {info.context_length}); shorten it, or start the server with a larger context or KV "
            "cache"
        )


def _check_sampling(row: int, request: Request, info: EngineInfo) -> None:
    for name in ("stop_token_ids", "logit_bias"):
        ids = list(map(int, request.sampling.get(name) or ()))
        check_token_ids(f"row {row}:", name, ids, info.vocab_size)
    if "sampling_seed" in request.sampling and not info.honours_seeds:
        raise CapabilityError(
            f"row {row}: sampling_seed={request.sampling['sampling_seed']}, which this engine does not read; start "
            "SGLang with --enable-deterministic-inference (an accelerator's attention backend), or leave it out"
        )
    temperature = request.sampling.get("temperature", 1.0)
    tempered = temperature >= GREEDY_TEMPERATURE and temperature != 1
    if info.raw_log_probs and request.return_log_probs and tempered and not request.reads_only:
        raise CapabilityError(
            f"row {row}: log-probs at temperature={temperature} of a server that was started with "
            "SGLANG_RETURN_ORIGINAL_LOGPROB=1, whose log-probs are those of temperature 1; start it without, pass "
            "return_log_probs=False, or use temperature=1 with constraints=TemperatureScale("
            f"{temperature}), which log-probs of such a server have in them"
        )
    num_prompt = len(request.prompt_ids)
    # Reading a prompt generates a token too: SGLang samples at least one.
    total = num_prompt + (request.sampling.get("max_new_tokens", 1) or 1)
    if total > info.context_length:
        raise PromptLengthError(
            f"row {row}: {num_prompt} prompt tokens and max_new_tokens={total - num_prompt} are {total} together, over "
            f"the context length of {info.context_length}; lower max_new_tokens to {info.context_length - num_prompt}"
        )


def _check_records(row: int, request: Request, info: EngineInfo) -> None:
    """Refuse records of the sampling that the engine does not make, or not of this request."""
    records, top_k = request.records, request.sampling.get("top_k", -1)
    if records.entropy and not info.pools_in_server:
        raise CapabilityError(
            f"row {row}: return_entropy is asked of a server without the server half, and SGLang's own return_entropy "
            "returns nothing; start it with torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`"
        )
    if records.routed_experts and not info.returns_routed_experts:
        raise CapabilityError(
            f"row {row}: return_routed_experts is asked of a server that was started without "
            "--enable-return-routed-experts; start a mixture of experts with it"
        )
    if not records.sampling_mask:
        return
    if not info.max_sampling_mask:
        raise CapabilityError(
            f"row {row}: return_sampling_mask is asked of an engine that does not give it (`sglang.Engine` has no "
            "argument for it); use a server: launch(…)"
        )
    greedy = top_k == 1 or request.sampling.get("temperature", 1.0) < GREEDY_TEMPERATURE
    if not greedy and not 1 < top_k <= info.max_sampling_mask:
        raise InputError(
            f"row {row}: return_sampling_mask with top_k={top_k}: SGLang takes 1..{info.max_sampling_mask}; lower "
            "top_k, or start the server with --sampling-mask-max-tokens"
        )
    if request.processor is not None:
        raise InputError(
            f"row {row}: return_sampling_mask together with SGLang's own custom_logit_processor, which it does not "
            "take; use ActionMask, DisallowedTokens and the like"
        )


def _check_constraints_and_logits(row: int, request: Request, info: EngineInfo) -> None:
    """Refuse constraints and logits that the engine cannot serve, or that are too many bytes for it."""
    name, num_prompt = f"row {row}:", len(request.prompt_ids)
    if request.processor is not None and not info.takes_processors:
        raise CapabilityError(
            f"{name} custom_logit_processor is given, and the server takes none of SGLang's own; start it with "
            "--enable-custom-logit-processor (who may call it can then run code in it), or use ActionMask, "
            "DisallowedTokens and the like, which need nothing"
        )
    if not 0 <= request.score_from < num_prompt:
        raise InputError(f"{name} score_from={request.score_from}: the prompt's tokens are 0..{num_prompt - 1}")
    if (request.constraints or request.logits is not None) and not info.pools_in_server:
        because = f" ({info.no_states_because})" if info.no_states_because else ""
        asked = "logits" if request.logits is not None else "constraints"
        raise CapabilityError(
            f"{name} {asked} are asked of a server without the server half{because}; start it with "
            "torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`"
        )
    if len(request.constraints) > MAX_CONSTRAINTS:
        raise InputError(
            f"{name} {len(request.constraints)} constraints, over the limit of {MAX_CONSTRAINTS}; put masks together"
        )
    unknown = [constraint.name for constraint in request.constraints if constraint.name not in info.constraints]
    if unknown:
        raise CapabilityError(
            f"{name} the server has no code of the constraint {unknown[0]!r}; it has {list(info.constraints)}. Start "
            "it with the module that defines it: launch(constraint_modules=('my.module',)), or `serve --constraints`"
        )
    _check_response_ranges(name, request)
    longest = max((stop - start for start, stop in request.response_ranges), default=0)
    most = longest if request.score_prompt else request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    try:
        check_constraints(request.constraints, info.vocab_size, most)
    except (TokenIdError, ConstraintError) as error:
        raise type(error)(f"{name} {error}") from error
    if request.logits is not None:
        _check_logits(name, request, request.logits, info)


def _check_response_ranges(name: str, request: Request) -> None:
    ranges, num_prompt = request.response_ranges, len(request.prompt_ids)
    bounds = [bound for start_and_stop in ranges for bound in start_and_stop]
    if bounds != sorted(bounds) or any(start == stop for start, stop in ranges):
        raise InputError(f"{name} response_ranges={ranges}: expected parts of the prompt, in order and apart")
    if bounds and not 1 <= bounds[0] < bounds[-1] <= num_prompt:
        raise InputError(
            f"{name} response_ranges={ranges}: they are within tokens 1..{num_prompt}, for nothing is before token 0"
        )
    if request.score_prompt and request.constraints and not request.response_ranges:
        raise InputError(
            f"{name} constraints on a scored prompt without responses: nothing says which of its tokens they act on; "
            "pass response_ranges"
        )


def _check_logits(name: str, request: Request, spec: LogitsSpec, info: EngineInfo) -> None:
    if spec.top_k is not None and spec.top_k > info.vocab_size:
        raise InputError(
            f"{name} LogitsSpec(top_k={spec.top_k}): the vocabulary has {info.vocab_size} tokens; lower it"
        )
    if spec.token_ids is not None and max(spec.token_ids) >= info.vocab_size:
        raise TokenIdError(
            f"{name} LogitsSpec(token_ids=…): id {max(spec.token_ids)} is outside the vocabulary of {info.vocab_size}; "
            f"ids are 0..{info.vocab_size - 1}"
        )
    if request.reads_only and spec.of_response:
        raise InputError(
            f"{name} max_new_tokens=0 generates nothing, and LogitsSpec(segments={spec.segments}) are not all of the "
            "prompt; ask for segments=('prompt',)"
        )
    rows, columns, size = _num_rows(request, spec), spec.num_columns(info.vocab_size), _logits_bytes(request, info)
    limit = MAX_SHARED_BYTES if info.shares_memory else MAX_TEXT_BYTES
    if size > limit:
        raise InputError(
            f"{name} logits of {columns} columns for up to {rows} tokens are {size / 2**20:.0f} MiB, over the limit of "
            f"{limit / 2**20:.0f} MiB; ask for fewer tokens, top_k or token_ids, or dtype=torch.bfloat16"
            + ("" if info.shares_memory else ", or run on the server's machine")
        )


def _num_rows(request: Request, spec: LogitsSpec) -> int:
    num_new = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    return (num_new if spec.of_response else 0) + (len(request.prompt_ids) - 1 if spec.of_prompt else 0)


def _logits_bytes(request: Request, info: EngineInfo) -> int:
    """Return the most bytes that the logits of a request may have."""
    spec = request.logits
    if spec is None:
        return 0
    per_column = spec.dtype.itemsize + (4 if spec.top_k is not None else 0)
    return _num_rows(request, spec) * spec.num_columns(info.vocab_size) * per_column


def _check_hidden(row: int, request: Request, spec: HiddenSpec, info: EngineInfo) -> None:
    if not (info.pools_in_server or info.returns_hidden_states):
        because = f", which gives none: {info.no_states_because}" if info.no_states_because else ""
        raise CapabilityError(
            f"row {row}: hidden states are asked of a server that was started without them{because}; "
            f"{FALLBACK_REMEDY}, start SGLang with --enable-return-hidden-states, or pass hidden=None"
        )
    canonical = [canonical_layer(layer, info.num_layers) for layer in spec.layer_ids]
    wanted = set(canonical)
    if len(wanted) < len(canonical):
        raise InputError(
            f"row {row}: layers={spec.layers}: two of them are the same layer of {info.num_layers}; ask for each once"
        )
    if not wanted <= set(info.layers):
        # The server's reason says what would help. A server that has none lacks the server half.
        remedy = (
            f" ({info.no_states_because}); ask for others"
            if info.no_states_because
            else f"; start it with launch(layers={tuple(sorted({*wanted, *info.layers} - {-1}))}), or `serve --layers`"
        )
        raise CapabilityError(
            f"row {row}: layers={spec.layers}: the server gives the states of layers {list(info.layers)}, and not of "
            f"{sorted(wanted - set(info.layers))}{remedy}"
        )
    if request.reads_only and spec.needs_response:
        raise InputError(
            f"row {row}: max_new_tokens=0 generates nothing, and segments={spec.segments}, spans={list(spec.spans)} "
            "are not all of the prompt; ask for the prompt's, or for tokens"
        )
    _check_spans(row, "spans", request.spans, spec, request, info)
    if spec.tokens:
        _check_token_bytes(row, request, spec, info)


def _check_spans(
    row: int, field: str, spans: Mapping[str, ResolvedSpan], spec: HiddenSpec, request: Request, info: EngineInfo
) -> None:
    if spans.keys() != spec.spans.keys():
        owner = "HiddenSpec" if field == "spans" else "HeadSpec"
        raise InputError(
            f"row {row}: {field} {sorted(spans)} are resolved, and {sorted(spec.spans)} are asked for; pass in "
            f"Request.{field} what {owner}.spans asks for"
        )
    for name, span in spans.items():
        _check_span(f"row {row}, span {name!r}:", name, span, spec, request, info)


def _check_span(name: str, key: str, span: ResolvedSpan, spec: HiddenSpec, request: Request, info: EngineInfo) -> None:
    if span.pooling != spec.spans[key].pooling:
        raise InputError(
            f"{name} pooling={span.pooling!r} is resolved, and pooling={spec.spans[key].pooling!r} asked for; pass "
            f"{type(span).__name__}(…, pooling={spec.spans[key].pooling!r})"
        )
    if isinstance(span, PromptSpan):
        if not span.count and not may_be_empty(spec.spans[key]):
            raise SpanError(f"{name} {spec.spans[key]!r} has 0 positions, and an empty span has no state; pass some")
        if spec.pooling_of(key) is None and span.count > MAX_SPAN_ROWS:
            raise InputError(
                f"{name} {span.count} rows, over the limit of {MAX_SPAN_ROWS} for a span with pooling=None; pool it, "
                "or ask for tokens=True"
            )
        if span.end > len(request.prompt_ids):
            raise SpanError(
                f"{name} ends at {span.end} in a prompt of {len(request.prompt_ids)} tokens; pass positions within it"
            )
        return
    if not isinstance(span, ResponseSpan) or span.segment != "response":
        raise InputTypeError(
            f"{name} {span!r} is not resolved; pass what is of the prompt as a PromptSpan of positions, which "
            "SGLangHiddenWrapper makes of it"
        )
    most = request.sampling.get("max_new_tokens")
    if isinstance(span, LastTokens) and not span.allow_fewer and most is not None and span.count > most:
        raise SpanError(
            f"{name} LastTokens({span.count}) of a response of at most max_new_tokens={most}; raise that, or pass "
            "allow_fewer=True"
        )
    if isinstance(span, (Between, At, Each)) and not info.pools_in_server:
        raise CapabilityError(f"{name} markers are found by the server half; {FALLBACK_REMEDY}")


def _check_token_bytes(row: int, request: Request, spec: HiddenSpec, info: EngineInfo) -> None:
    """Refuse token states of too many bytes: they pass through all of SGLang's processes, and block them."""
    num_new = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    rows = num_new if not reads_prompt(spec.segments) else len(request.prompt_ids) + num_new
    size = rows * len(spec.layer_ids) * info.hidden_size * wanted_of(request, spec, info).row_dtype.itemsize
    limit = MAX_SHARED_BYTES if info.shares_memory else MAX_TEXT_BYTES
    if size > limit:
        raise InputError(
            f"row {row}: tokens=True for up to {rows} positions and {len(spec.layer_ids)} layers is {size / 2**20:.0f} "
            f"MiB, over the limit of {limit / 2**20:.0f} MiB; ask for fewer tokens or layers, dtype=torch.bfloat16, or "
            "segments=('response',)" + ("" if info.shares_memory else ", or run on the server's machine")
        )
