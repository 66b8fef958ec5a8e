"""One call of `SGLangHiddenWrapper`: what its options mean, and the engine requests that its rows become.

The options of a call are read into `CallOptions`, and `to_requests` fills the fields of a `Request`; candidates fill
theirs in ``candidates.py``. Knows nothing of wire formats or padding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torchrl_sglang_hidden.errors import AlignmentError, InputError, SpanError
from torchrl_sglang_hidden.policy.action_masks import native_processor, option_constraints, read_options, responses_of
from torchrl_sglang_hidden.policy.argument_checks import resolve_num_samples
from torchrl_sglang_hidden.policy.chat_text import decode_all
from torchrl_sglang_hidden.policy.config import PolicyConfig
from torchrl_sglang_hidden.policy.returned import (
    resolve_hidden,
    resolve_records,
    scored_heads,
    scored_hidden,
    scored_logits,
)
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, NO_RECORDS, READING, Completion, Request, SamplingRecords
from torchrl_sglang_hidden.sglang_api.sampling import NOT_OF_SAMPLING, RECORDS, override, standardize, to_sglang
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.places import At, Each
from torchrl_sglang_hidden.spec.span_search import find_rows
from torchrl_sglang_hidden.spec.spans import Between

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CallOptions", "check_responses", "read_call", "read_scoring", "to_requests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What one call asks for: the wrapper's configuration under the call's own options.

    Args:
        generate: whether the call samples, or scores sequences.
        hidden: the states that come back, or None. Of a scored sequence: see `scored_hidden`.
        sampling: SGLang's sampling parameters.
        lora: the name of a LoRA adapter, or None.
        priority: the request's priority in the server's queue, or None.
        logits: the logits that come back, or None. Of a scored sequence: see `scored_logits`.
        heads: the scores of heads that come back, or None. Of a scored sequence: see `scored_heads`.
        logits_only: whether the logits come back without log-probs and states, as one tensor.
        constraints: the wrapper's, then the call's. A row's own mask is appended to them.
        response_limit: ``max_new_tokens`` of the response that is sampled; of a scored sequence, of the response in it.
        processor: a serialised native SGLang logit processor. If set, it replaces `constraints` and the rows' action
            masks.
        records: what is recorded of the sampling.
    """

    generate: bool
    hidden: HiddenSpec | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    priority: int | None = None
    logits: LogitsSpec | None = None
    heads: HeadSpec | None = None
    logits_only: bool = False
    constraints: tuple[LogitConstraint, ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS
    processor: str | None = None
    records: SamplingRecords = NO_RECORDS

    @property
    def reads_masks(self) -> bool:
        """Whether the rows' action masks have tokens to act on, and no native processor replaces them."""
        return self.processor is None and self.sampling.get("max_new_tokens") != 0


def read_call(
    config: PolicyConfig, options: Mapping[str, Any], *, vocab_size: int, logits_only: bool = False
) -> CallOptions:
    """Read the options of one call.

    Args:
        config: the wrapper's configuration, after `PolicyConfig.resolve_for`.
        options: the call's generation options, as the user wrote them.
        vocab_size: the engine's.
        logits_only: the call's.

    Raises:
        InputError: options that cannot be served, or contradict the configuration.
        ConstraintError: an action mask that allows nothing.
    """
    if not config.generate:
        return read_scoring(config, options, vocab_size=vocab_size, logits_only=logits_only)
    if logits_only:
        raise InputError(
            "logits_only=True with generate=True: only scoring returns logits alone; use "
            "get_new_version(generate=False), or logits=LogitsSpec(…) for the logits of a response"
        )
    return _read_generation(config, options, vocab_size)


def _read_generation(config: PolicyConfig, options: Mapping[str, Any], vocab_size: int) -> CallOptions:
    """Read the options of a call that generates."""
    merged = _merge(config, options, standardize(options), vocab_size)
    if resolve_num_samples(config.num_responses, merged.options) != config.num_responses:
        raise InputError(
            f"num_return_sequences={merged.options['num_return_sequences']} in a call, and no num_samples in the "
            "wrapper, whose output would have another shape; use get_new_version(num_samples=…)"
        )
    call = CallOptions(
        generate=True,
        hidden=merged.hidden,
        sampling=to_sglang(merged.options),
        lora=merged.options.get("lora_path"),
        priority=merged.options.get("priority"),
        logits=_readable_logits(config),
        heads=config.returned_heads,
        records=resolve_records(merged.options),
    )
    if call.sampling.get("max_new_tokens") == 0:
        # Nothing is sampled, so constraints have nothing to act on.
        _check_reading(call, config.num_responses)
        return call
    constraints = merged.constraints
    if merged.processor is not None:
        replaced = [type(constraint).__name__ for constraint in constraints]
        replaced += [f"the masks at {config.action_mask_key!r}"] if config.action_mask_key is not None else []
        constraints = ()
        if replaced:
            warnings.warn(
                f"custom_logit_processor is SGLang's own, and is used alone; left out: {', '.join(replaced)}",
                stacklevel=4,
            )
    limit = call.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    return replace(call, constraints=constraints, response_limit=limit, processor=merged.processor)


def read_scoring(
    config: PolicyConfig, options: Mapping[str, Any], *, vocab_size: int, logits_only: bool = False
) -> CallOptions:
    """Read the options of a call that scores sequences or candidates, whether or not the wrapper generates.

    Args:
        config: the wrapper's configuration, after `PolicyConfig.resolve_for`.
        options: the call's generation options, as the user wrote them.
        vocab_size: the engine's.
        logits_only: the call's.

    Raises:
        InputError: a sampling option in the call, or a native logit processor.
        ConstraintError: an action mask that allows nothing.
    """
    own = standardize(options)
    sampling = own.keys() - (NOT_OF_SAMPLING - RECORDS)
    if sampling:
        raise InputError(
            f"generate=False scores and samples nothing; leave {', '.join(sorted(sampling))} out of the call"
        )
    merged = _merge(config, options, own, vocab_size)
    if merged.processor is not None:
        raise InputError(
            f"custom_logit_processor={merged.processor!r:.60} in scoring, of given sequences or of candidates: "
            "SGLang's own acts on tokens that are sampled; give a LogitConstraint, or generate_kwargs without it"
        )
    return CallOptions(
        generate=False,
        hidden=None if logits_only else scored_hidden(merged.hidden),
        sampling=READING,
        lora=merged.options.get("lora_path"),
        priority=merged.options.get("priority"),
        logits=scored_logits(_readable_logits(config), logits_only=logits_only),
        heads=None if logits_only else scored_heads(config.returned_heads),
        logits_only=logits_only,
        constraints=merged.constraints,
        # max_new_tokens=0 reads a prompt, which no response follows.
        response_limit=merged.options.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
    )


class _Merged(NamedTuple):
    """The wrapper's options under the call's: standardised, and what they say of states and constraints."""

    options: dict[str, Any]
    hidden: HiddenSpec | None
    constraints: tuple[LogitConstraint, ...]
    processor: str | None


def _merge(config: PolicyConfig, options: Mapping[str, Any], own: Mapping[str, Any], vocab_size: int) -> _Merged:
    """Merge the options of a call, as the user wrote them and (``own``) standardised, over the wrapper's."""
    merged = override(config.generate_kwargs, read_options(options, vocab_size))
    hidden = config.hidden
    if "return_hidden_states" in own:
        hidden = resolve_hidden(hidden, own["return_hidden_states"], config.input_mode)
    processor = native_processor(merged)
    if processor is None and "custom_params" in merged:
        raise InputError(
            f"custom_params={merged['custom_params']!r:.80} without SGLang's own custom_logit_processor, which alone "
            "reads them; give both, or leave them out"
        )
    return _Merged(merged, hidden, (*config.constraints, *option_constraints(merged)), processor)


def _readable_logits(config: PolicyConfig) -> LogitsSpec | None:
    """Return the wrapper's logits, or None where they have no key, so that nobody would see them."""
    return None if config.keys.logits_key is None else config.logits


def _check_reading(call: CallOptions, num_samples: int | None) -> None:
    """Refuse a call that generates nothing and wants what only a response has, or nothing at all."""
    hidden, logits, heads = call.hidden, call.logits, call.heads
    if num_samples is not None:
        raise InputError(
            f"max_new_tokens=0 with num_samples={num_samples}: a prompt that is only read has no samples; leave one of "
            "the two out"
        )
    if hidden is None and logits is None and heads is None:
        raise InputError(
            "max_new_tokens=0 without hidden states, logits or scores of heads: there is nothing to compute; pass "
            "hidden=HiddenSpec(('prompt',)), or raise max_new_tokens"
        )
    if logits is not None and logits.of_response:
        raise InputError(
            f"max_new_tokens=0 with LogitsSpec(segments={logits.segments}): a prompt that is only read has no "
            "response, and no 'full'; ask for segments=('prompt',), or raise max_new_tokens"
        )
    if heads is not None and heads.of_response:
        raise InputError(
            f"max_new_tokens=0 with HeadSpec(segments={heads.segments}, spans={dict(heads.spans)}): a prompt that is "
            "only read has no response, and no 'full'; ask for segments=('prompt',) and spans of the prompt, or raise "
            "max_new_tokens"
        )
    if hidden is not None and hidden.needs_response:
        raise InputError(
            f"max_new_tokens=0 with segments={hidden.segments} and spans={dict(hidden.spans)}: a prompt that is only "
            "read has no response, and no 'full'; ask for segments=('prompt',) and spans of the prompt, or raise "
            "max_new_tokens"
        )


# --- requests --------------------------------------------------------------------------------------------------------


def to_requests(
    rows: Sequence[Row], call: CallOptions, *, return_log_probs: bool, return_errors: bool = False
) -> list[Request]:
    """Return one request for each prompt row.

    Raises:
        InputError: a row wants states, and the call returns none; or nothing says which tokens constraints act on.
    """
    requests = []
    for index, row in enumerate(rows):
        constraints = (*call.constraints, *(() if row.action_mask is None else (row.action_mask,)))
        responses = _responses(index, row) if constraints and not (call.generate or row.error) else ()
        if row.wants_states and call.hidden is None and not call.logits_only:
            raise InputError(
                f"row {index}: 'return_hidden_states' is True, and this call returns no hidden states; pass "
                "hidden=True to the wrapper, or leave the key out"
            )
        requests.append(
            Request(
                row.prompt_ids,
                sampling=call.sampling,
                return_log_probs=return_log_probs and call.generate,
                hidden=None if row.wants_states is False else call.hidden,
                score_prompt=return_log_probs and not call.generate and not call.logits_only,
                spans=row.spans,
                images=row.placed,
                lora=call.lora,
                priority=call.priority,
                logits=call.logits,
                heads=call.heads,
                head_spans=row.head_spans,
                constraints=constraints if call.generate or responses else (),
                response_ranges=responses,
                response_limit=call.response_limit,
                processor=call.processor,
                records=call.records,
                return_errors=return_errors,
            )
        )
    return requests


def _responses(index: int, row: Row) -> tuple[tuple[int, int], ...]:
    """Return the parts of a scored sequence that constraints act on as if their tokens were being sampled."""
    if row.assistant_mask is None:
        raise InputError(
            f"row {index}: nothing says which tokens of a given sequence the constraints act on; score in history mode "
            "or give 'all_assistant_mask' under masks_key in tokens mode, or leave the constraints out, those of "
            "generate_kwargs too: get_new_version(constraints=(), action_mask_key=None, action_token_ids=None)"
        )
    return responses_of(row.assistant_mask)


def check_responses(
    rows: Sequence[Row], completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, *, num_samples: int = 1
) -> None:
    """Check that the engine found the markers of spans in the responses where this side's tokenizer finds them.

    Args:
        rows: the prompt rows, with the spans that were asked for.
        completions: ``num_samples`` for each row.
        tokenizer: the wrapper's.
        num_samples: responses per row.

    Raises:
        AlignmentError: a span has other rows than its markers say here, or another number of them.
    """
    decode = functools.partial(decode_all, tokenizer)
    for index, completion in enumerate(completions):
        row, sample = divmod(index, num_samples)
        scores = next(iter(completion.scores.values()), None)
        of_heads = {} if scores is None else scores.spans
        spans = [(name, span, completion.spans.get(name)) for name, span in rows[row].spans.items()]
        spans += [(name, span, of_heads.get(name)) for name, span in rows[row].head_spans.items()]
        for name, span, pooled in spans:
            if not isinstance(span, (Between, At, Each)) or span.segment == "prompt" or pooled is None:
                continue  # nothing to search for, or a row that wanted no states
            try:
                here = tuple(find_rows(span, completion.response_ids, decode))
            except SpanError:
                here = ()
            if pooled.count != len(here) or pooled.places not in (None, here):
                said = "" if pooled.places is None else f", {pooled.places!s:.80} there and {here!s:.80} here"
                raise AlignmentError(
                    f"row {row}, sample {sample}, span {name!r}: {pooled.count} rows of states or scores for the "
                    f"{len(here)} rows of {span!r}{said}; start the server with the wrapper's tokenizer"
                )
