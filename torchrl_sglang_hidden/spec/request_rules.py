"""Says which values a request may have, whoever sends it: the client checks them first, and the server half again.

By SGLang's names of the options, and by those that TorchRL's wrappers and this package's have instead. Knows nothing of
requests, of payloads or of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError, TokenIdError

__all__ = ["MAX_LOGIT_BIAS", "RECORDS", "RULES", "Rule", "check_option", "check_prompt_ids", "check_token_ids"]

MAX_LOGIT_BIAS = 1e9
# What is recorded of sampled tokens, by SGLang's names.
RECORDS = frozenset({"return_entropy", "return_sampling_mask", "return_routed_experts"})


class Rule(NamedTuple):
    """What one option may be.

    Args:
        types: of its value.
        holds: returns whether a value of these types is within the limits.
        limit: says what is expected.
        torchrl: how TorchRL's wrappers say it, which programs and tests look for.
    """

    types: tuple[type, ...]
    holds: Callable[[Any], bool]
    limit: str
    torchrl: str = ""


def _number(holds: Callable[[Any], bool], limit: str, torchrl: str = "") -> Rule:
    return Rule((Real,), lambda x: _is_finite(x) and holds(x), limit, torchrl)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return all(isinstance(text, str) and text for text in texts)


def _is_token_id(value: Any) -> bool:
    # JSON's keys are strings.
    return (type(value) is int and value >= 0) or (isinstance(value, str) and value.isascii() and value.isdecimal())


def _is_bias(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and _is_finite(value) and abs(float(value)) <= MAX_LOGIT_BIAS


_FLAG = Rule((bool,), lambda x: True, "True or False")
_TEXTS = Rule((str, list, tuple), _texts, "a non-empty string or a list of them")
_TEXT = Rule((str,), bool, "a non-empty string")
_OF_CONSTRAINTS = Rule((object,), lambda x: True, "a constraint or token ids")

RULES: dict[str, Rule] = {
    "max_new_tokens": Rule((int,), lambda x: x >= 0, "an integer of at least 0 (0 reads the prompt only)"),
    "min_new_tokens": Rule((int,), lambda x: x >= 0, "an integer of at least 0"),
    "temperature": _number(
        lambda x: x >= 0, "a finite number of at least 0 (0 is greedy)", "Temperature must be non-negative"
    ),
    "top_p": _number(lambda x: 0 < x <= 1, "in (0, 1]", "top_p must be between 0 and 1"),
    "min_p": _number(lambda x: 0 <= x <= 1, "in [0, 1]"),
    # Beyond these SGLang's scheduler overflows an int32 or a float32, and ends.
    "top_k": Rule(
        (int,),
        lambda x: 1 <= x < 2**31 or x == -1,
        "an integer in 1..2147483647, or -1 for all",
        "top_k must be positive",
    ),
    "repetition_penalty": _number(
        lambda x: 0.01 <= x <= 2, "in [0.01, 2] (1 is none)", "repetition_penalty must be positive"
    ),
    "logit_bias": Rule(
        (Mapping,),
        lambda x: all(_is_token_id(token_id) and _is_bias(bias) for token_id, bias in x.items()),
        "a dict of token id to a number in [-1e9, 1e9]",
    ),
    "frequency_penalty": _number(lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "presence_penalty": _number(lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "num_return_sequences": Rule((int,), lambda x: x >= 1, "an integer of at least 1"),
    "sampling_seed": Rule((int,), lambda x: -(2**63) <= x < 2**63, "an integer of 64 bits"),
    "priority": Rule((int,), lambda x: -(2**63) <= x < 2**63, "an integer of 64 bits"),
    "stop_sequences": _TEXTS,
    "stop_regex": _TEXTS,
    "stop_token_ids": Rule(
        (int, list, tuple, set),
        lambda x: all(type(i) is int and i >= 0 for i in ([x] if isinstance(x, int) else x)),
        "a token id or a list of them, each an integer of at least 0",
    ),
    "do_sample": _FLAG, "ignore_eos": _FLAG, "skip_special_tokens": _FLAG, "spaces_between_special_tokens": _FLAG,
    "no_stop_trim": _FLAG,
    **dict.fromkeys(RECORDS, _FLAG),
    "return_hidden_states": _FLAG, "lora_path": _TEXT,
    "json_schema": _TEXT, "regex": _TEXT, "ebnf": _TEXT, "structural_tag": _TEXT,
    "custom_params": Rule((Mapping,), lambda x: all(isinstance(name, str) for name in x), "a dict by names"),
    "action_mask": _OF_CONSTRAINTS, "disallowed_tokens": _OF_CONSTRAINTS, "custom_logit_processor": _OF_CONSTRAINTS,
}  # fmt: skip


def check_option(name: str, value: Any, rule: Rule) -> None:
    """Check an option's value.

    Args:
        name: of the option.
        value: what was given.
        rule: what it may be.

    Raises:
        InputError: a value outside the limits.
        InputTypeError: a value of the wrong type.
    """
    # bool is a subclass of int: temperature=True is a mistake, not 1.
    if not isinstance(value, rule.types) or (isinstance(value, bool) and bool not in rule.types):
        raise InputTypeError(f"{name}={_shown(value)}: expected {rule.limit}")
    if not rule.holds(value):
        said = f"{rule.torchrl}, " if rule.torchrl else ""
        raise InputError(f"{name}={_shown(value)}: {said}expected {rule.limit}")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except (RecursionError, ValueError):  # deep lists, and integers of thousands of digits, have no repr
        return f"a {type(value).__name__} that cannot be written"


def check_prompt_ids(name: str, ids: Sequence[int], vocab_size: int, extremes: tuple[int, int] | None = None) -> None:
    """Check the ids of one prompt: there are some, and the model has each.

    Args:
        name: stands before the error, such as ``"row 2:"``.
        ids: integers.
        vocab_size: V.
        extremes: the least and the greatest id, where they are known.

    Raises:
        PromptLengthError: there are none. SGLang ends when it gets an empty prompt.
        TokenIdError: an id is outside ``[0, vocab_size)``. SGLang ends when it looks one up.
    """
    if len(ids) == 0:
        raise PromptLengthError(f"{name} the prompt has 0 tokens; SGLang needs at least 1")
    least, greatest = (min(ids), max(ids)) if extremes is None else extremes
    for extreme in (least, greatest):
        if not 0 <= extreme < vocab_size:
            raise TokenIdError(
                f"{name} token id {_shown(extreme)} at position {ids.index(extreme)} is outside the vocabulary of "
                f"{vocab_size}; ids are 0..{vocab_size - 1}. Was it made by another model's tokenizer?"
            )


def check_token_ids(name: str, option: str, ids: Sequence[int], vocab_size: int) -> None:
    """Check the ids that an option names.

    Args:
        name: stands before the error, such as ``"row 2:"``.
        option: which names them.
        ids: integers.
        vocab_size: V.

    Raises:
        TokenIdError: an id is outside ``[0, vocab_size)``.
    """
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if unknown:
        raise TokenIdError(
            f"{name} {option} has id {_shown(unknown[0])}, outside the vocabulary of {vocab_size}; "
            f"ids are 0..{vocab_size - 1}"
        )
