"""One call of `SGLangHiddenWrapper`: what its options mean, the requests that its rows become, and where results go.

Knows nothing of wire formats or padding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import AlignmentError, InputError, SpanError
from torchrl_sglang_hidden.options import of_given, read_hidden, read_num_samples
from torchrl_sglang_hidden.places import decode_all
from torchrl_sglang_hidden.prompts import InputMode, Row
from torchrl_sglang_hidden.sampling import NOT_OF_SAMPLING, override, standardize, to_sglang
from torchrl_sglang_hidden.spans import Between, find_between
from torchrl_sglang_hidden.specs import Completion, HiddenSpec, Request

__all__ = ["Call", "check_responses", "read_call", "read_target", "to_requests"]

# The engine must sample one token, which is dropped.
SCORING = {"max_new_tokens": 1, "temperature": 0.0}


@dataclass(frozen=True, slots=True)
class Call:
    """What one call asks for.

    Args:
        generate: whether it samples, or scores given sequences.
        hidden: the states that come back, or None. Of a given sequence: what `of_given` leaves.
        sampling: SGLang's sampling parameters.
        lora: the name of a LoRA adapter, or None.
        priority: in the server's queue, or None.
    """

    generate: bool
    hidden: HiddenSpec | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    priority: int | None = None


def read_call(
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    hidden: HiddenSpec | None,
    generate: bool,
    input_mode: InputMode,
    num_samples: int | None,
) -> Call:
    """Reads the options of one call.

    Args:
        defaults: the wrapper's options, standardised.
        given: those of the call, as the user wrote them.
        hidden: the wrapper's.
        generate: likewise.
        input_mode: likewise.
        num_samples: likewise.

    Raises:
        InputError: options that cannot be served, or contradict what the wrapper is.
    """
    named = standardize(given)
    if not generate and named.keys() - NOT_OF_SAMPLING:
        names = ", ".join(sorted(named.keys() - NOT_OF_SAMPLING))
        raise InputError(f"generate=False scores and samples nothing; leave {names} out of the call")
    options = override(defaults, given)
    if "return_hidden_states" in named:
        hidden = read_hidden(hidden, named["return_hidden_states"], input_mode)
    lora, priority = options.get("lora_path"), options.get("priority")
    if not generate:
        return Call(False, of_given(hidden), SCORING, lora, priority)
    if read_num_samples(num_samples, options) != num_samples:
        raise InputError(
            f"num_return_sequences={options['num_return_sequences']} in a call, and no num_samples in the wrapper, "
            "whose output would have another shape; use get_new_version(num_samples=…)"
        )
    if options.get("max_new_tokens") == 0:
        _check_reading(hidden, num_samples)
    return Call(True, hidden, to_sglang(options), lora, priority)


def _check_reading(hidden: HiddenSpec | None, num_samples: int | None) -> None:
    """Refuses a call that generates nothing and wants what only a response has, or nothing at all."""
    if num_samples is not None:
        raise InputError(
            f"max_new_tokens=0 with num_samples={num_samples}: a prompt that is only read has no samples; leave one of "
            "the two out"
        )
    if hidden is None:
        raise InputError(
            "max_new_tokens=0 without hidden states: there is nothing to compute; pass hidden=HiddenSpec(('prompt',)), "
            "or raise max_new_tokens"
        )
    if hidden.needs_response:
        raise InputError(
            f"max_new_tokens=0 with segments={hidden.segments} and spans={dict(hidden.spans)}: a prompt that is only "
            "read has no response, and no 'full'; ask for segments=('prompt',) and spans of the prompt, or raise "
            "max_new_tokens"
        )


def to_requests(rows: Sequence[Row], call: Call, *, return_log_probs: bool) -> list[Request]:
    """The requests that rows become, one each.

    Raises:
        InputError: a row wants states, and the call returns none.
    """
    requests = []
    for index, row in enumerate(rows):
        if row.wants_states and call.hidden is None:
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
                score_prompt=return_log_probs and not call.generate,
                spans=row.spans,
                lora=call.lora,
                priority=call.priority,
            )
        )
    return requests


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
