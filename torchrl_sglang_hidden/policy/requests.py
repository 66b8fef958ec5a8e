"""One call of `SGLangHiddenWrapper`: what its options mean, the requests that its rows become, and where results go.

Knows nothing of wire formats or padding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import AlignmentError, InputError, SpanError
from torchrl_sglang_hidden.policy.action_masks import native_processor, option_constraints, read_options, responses_of
from torchrl_sglang_hidden.policy.chat_text import decode_all
from torchrl_sglang_hidden.policy.config import logits_of_given, of_given, only_logits, read_hidden, read_num_samples
from torchrl_sglang_hidden.policy.prompts import InputMode, Row
from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, READING, Completion, Request
from torchrl_sglang_hidden.sglang_api.sampling import NOT_OF_SAMPLING, override, standardize, to_sglang
from torchrl_sglang_hidden.spec.constraints import LogitConstraint
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, find_between

__all__ = ["Call", "check_responses", "read_call", "read_target", "to_requests", "write"]


@dataclass(frozen=True, slots=True)
class Call:
    """What one call asks for.

    Args:
        generate: whether it samples, or scores given sequences.
        hidden: the states that come back, or None. Of a given sequence: what `of_given` leaves.
        sampling: SGLang's sampling parameters.
        lora: the name of a LoRA adapter, or None.
        priority: in the server's queue, or None.
        logits: the logits that come back, or None. Of a given sequence: those of its tokens.
        logits_only: whether these come back without log-probs and states, as one tensor.
        constraints: those of the wrapper, then those of the call. The row's own come behind them.
        response_limit: ``max_new_tokens`` of what is sampled, or of what was.
        processor: SGLang's own, in their place and in that of the rows' masks; or None.
    """

    generate: bool
    hidden: HiddenSpec | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    priority: int | None = None
    logits: LogitsSpec | None = None
    logits_only: bool = False
    constraints: tuple[LogitConstraint, ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS
    processor: str | None = None

    @property
    def reads_masks(self) -> bool:
        """Whether the rows' action masks have tokens to act on, and nothing stands in their place."""
        return self.processor is None and self.sampling.get("max_new_tokens") != 0


def read_call(
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    hidden: HiddenSpec | None,
    logits: LogitsSpec | None,
    logits_only: bool,
    constraints: tuple[LogitConstraint, ...],
    action_mask_key: NestedKey | None,
    generate: bool,
    input_mode: InputMode,
    num_samples: int | None,
    vocab_size: int,
) -> Call:
    """Reads the options of one call.

    Args:
        defaults: the wrapper's options, standardised.
        given: those of the call, as the user wrote them.
        hidden: the wrapper's.
        logits: likewise.
        logits_only: of the call.
        constraints: the wrapper's.
        action_mask_key: likewise.
        generate: likewise.
        input_mode: likewise.
        num_samples: likewise.
        vocab_size: the engine's.

    Raises:
        InputError: options that cannot be served, or contradict what the wrapper is.
        ConstraintError: an action mask that allows nothing.
    """
    named = standardize(given)
    if generate and logits_only:
        raise InputError(
            "logits_only=True with generate=True: it is of given sequences; use get_new_version(generate=False), or "
            "logits=LogitsSpec(…) for those of what is sampled"
        )
    if not generate and named.keys() - NOT_OF_SAMPLING:
        names = ", ".join(sorted(named.keys() - NOT_OF_SAMPLING))
        raise InputError(f"generate=False scores and samples nothing; leave {names} out of the call")
    options = override(defaults, read_options(given, vocab_size))
    if "return_hidden_states" in named:
        hidden = read_hidden(hidden, named["return_hidden_states"], input_mode)
    lora, priority = options.get("lora_path"), options.get("priority")
    constraints = (*constraints, *option_constraints(options))
    processor = native_processor(options)
    if processor is None and "custom_params" in options:
        raise InputError(
            f"custom_params={options['custom_params']!r:.80} without SGLang's own custom_logit_processor, which alone "
            "reads them; give both, or leave them out"
        )
    if not generate:
        if processor is not None:
            raise InputError(
                f"custom_logit_processor={processor!r:.60} in scoring, of given sequences or of candidates: SGLang's "
                "own acts on tokens that are sampled; give a LogitConstraint, or generate_kwargs without it"
            )
        # A prompt that is only read was followed by nothing.
        limit = options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        if logits_only:
            return Call(False, None, READING, lora, priority, only_logits(logits), True, constraints, limit)
        states, logits = of_given(hidden), logits_of_given(logits)
        return Call(False, states, READING, lora, priority, logits, False, constraints, limit)
    if read_num_samples(num_samples, options) != num_samples:
        raise InputError(
            f"num_return_sequences={options['num_return_sequences']} in a call, and no num_samples in the wrapper, "
            "whose output would have another shape; use get_new_version(num_samples=…)"
        )
    if options.get("max_new_tokens") == 0:
        _check_reading(hidden, logits, num_samples)
        # Nothing is chosen, so that nothing constrains it.
        return Call(True, hidden, to_sglang(options), lora, priority, logits)
    left_out = [type(constraint).__name__ for constraint in constraints]
    left_out += [f"the masks at {action_mask_key!r}"] if action_mask_key is not None else []
    if processor is not None and left_out:
        constraints = ()
        warnings.warn(
            f"custom_logit_processor is SGLang's own, and is used alone; left out: {', '.join(left_out)}", stacklevel=3
        )
    sampling = to_sglang(options)
    limit = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    return Call(True, hidden, sampling, lora, priority, logits, False, constraints, limit, processor)


def _check_reading(hidden: HiddenSpec | None, logits: LogitsSpec | None, num_samples: int | None) -> None:
    """Refuses a call that generates nothing and wants what only a response has, or nothing at all."""
    if num_samples is not None:
        raise InputError(
            f"max_new_tokens=0 with num_samples={num_samples}: a prompt that is only read has no samples; leave one of "
            "the two out"
        )
    if hidden is None and logits is None:
        raise InputError(
            "max_new_tokens=0 without hidden states or logits: there is nothing to compute; pass "
            "hidden=HiddenSpec(('prompt',)), or raise max_new_tokens"
        )
    if logits is not None and logits.of_response:
        raise InputError(
            f"max_new_tokens=0 with LogitsSpec(segments={logits.segments}): a prompt that is only read has no "
            "response, and no 'full'; ask for segments=('prompt',), or raise max_new_tokens"
        )
    if hidden is not None and hidden.needs_response:
        raise InputError(
            f"max_new_tokens=0 with segments={hidden.segments} and spans={dict(hidden.spans)}: a prompt that is only "
            "read has no response, and no 'full'; ask for segments=('prompt',) and spans of the prompt, or raise "
            "max_new_tokens"
        )


def to_requests(rows: Sequence[Row], call: Call, *, return_log_probs: bool) -> list[Request]:
    """The requests that rows become, one each.

    Raises:
        InputError: a row wants states, and the call returns none; or nothing says which tokens constraints act on.
    """
    requests = []
    for index, row in enumerate(rows):
        constraints = (*call.constraints, *(() if row.action_mask is None else (row.action_mask,)))
        responses = _responses(index, row) if constraints and not call.generate else ()
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
                lora=call.lora,
                priority=call.priority,
                logits=call.logits,
                constraints=constraints if call.generate or responses else (),
                response_ranges=responses,
                response_limit=call.response_limit,
                processor=call.processor,
            )
        )
    return requests


def _responses(index: int, row: Row) -> tuple[tuple[int, int], ...]:
    """The parts of a given sequence that constraints act on as if they were being sampled."""
    if row.assistant_mask is None:
        raise InputError(
            f"row {index}: nothing says which tokens of a given sequence the constraints act on; score in history mode "
            "or give 'all_assistant_mask' under masks_key in tokens mode, or leave the constraints out, those of "
            "generate_kwargs too: get_new_version(constraints=(), action_mask_key=None, action_token_ids=None)"
        )
    return responses_of(row.assistant_mask)


def check_responses(
    completions: Sequence[Completion],
    hidden: HiddenSpec | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int = 1,
) -> None:
    """Holds the engine's reading of markers in the responses against this side's.

    Raises:
        AlignmentError: a span has another number of rows than there are tokens between its markers.
    """
    spans = {} if hidden is None else hidden.spans
    decode = functools.partial(decode_all, tokenizer)
    for name, span in spans.items():
        if not isinstance(span, Between) or span.segment != "response":
            continue
        for index, completion in enumerate(completions):
            pooled = completion.spans.get(name)
            if pooled is None:  # a row that wanted no states
                continue
            try:
                first, stop = find_between(span, completion.response_ids, decode)
            except SpanError:
                first = stop = 0
            if pooled.count != stop - first:
                row, sample = divmod(index, num_samples)
                raise AlignmentError(
                    f"row {row}, sample {sample}, span {name!r}: {pooled.count} rows of states for the {stop - first} "
                    f"tokens between {span.start!r} and {span.end!r}; start the server with the wrapper's tokenizer"
                )


def read_target(
    tensordict: TensorDictBase,
    given: TensorDictBase | None,
    inplace: bool | str,
    keys: Sequence[NestedKey],
    batch_size: torch.Size,
) -> TensorDictBase | None:
    """What the outputs are written to, None for a new TensorDict; checked before the engine has worked for it.

    Args:
        tensordict: the input.
        given: where the call says to write.
        inplace: True, False or ``"empty"``, where it does not.
        keys: what will be written.
        batch_size: of the output.

    Raises:
        InputError: it is locked, has another batch size, or something in the place of a key's container.
    """
    target = given
    if target is None:
        if inplace is False:
            return None
        target = tensordict if inplace is True else tensordict.empty()
    if target.is_locked:
        raise InputError("the TensorDict to write to is locked; unlock_() it, or use inplace=False")
    _check_room(target, keys)
    if target.batch_size != batch_size:
        raise InputError(
            f"tensordict_out has batch size {tuple(target.batch_size)} and the output has {tuple(batch_size)}; give "
            "both the same"
        )
    return target


def write(
    target: TensorDictBase,
    out: TensorDictBase,
    keys: Sequence[NestedKey],
    owned: Sequence[NestedKey],
    layout: torch.layout | None,
) -> TensorDictBase:
    """Writes an output into a target of its batch size.

    Args:
        target: what `read_target` gave.
        out: the output.
        keys: those to write.
        owned: those that a call of this wrapper may write. What a turn before left there would pass for this one's.
        layout: of the nested tensor that a ragged leaf becomes where the target holds no ragged stacks.
    """
    # set, not update: update would merge into a TensorClass of the previous step and keep its stale fields.
    for key in keys:
        _write(target, out, key, layout)
    for key in owned:
        if key not in keys and target.get(key, None) is not None:
            target.del_(key)
    return target


def _write(target: TensorDictBase, out: TensorDictBase, key: NestedKey, layout: torch.layout | None) -> None:
    try:
        value = out.get(key)
    except RuntimeError:  # rows of several lengths
        if isinstance(target, LazyStackedTensorDict) and target.stack_dim == 0:
            for row, found in zip(target.tensordicts, out.unbind(0), strict=True):
                _write(row, found, key, layout)
            return
        value = out.get(key, as_nested_tensor=True, layout=layout or torch.jagged)
    target.set(key, value)


def _check_room(target: TensorDictBase, keys: Sequence[NestedKey]) -> None:
    """Refuses a target where a key's path leads through something that is no TensorDict."""
    while target.ndim:
        target = target[0]
    for key in keys:
        path = key if isinstance(key, tuple) else (key,)
        for length in range(1, len(path)):
            found = target.get(path[:length], None)
            if found is None:
                break
            if not is_tensor_collection(found) or is_non_tensor(found):
                raise InputError(
                    f"{key!r} cannot be written: there is a {type(found).__name__} at {path[:length]!r}; give the "
                    "output another key, or use inplace=False"
                )
