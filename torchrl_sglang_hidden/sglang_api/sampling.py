"""Checks generation options by TorchRL's, Hugging Face's and vLLM's names, and turns them into SGLang's.

Knows nothing of payloads and requests: it returns the dict of SGLang's sampling parameters.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from torchrl_sglang_hidden.errors import InputError, InputTypeError, UnknownOptionError

__all__ = ["NOT_OF_SAMPLING", "RECORDS", "SGLANG_NAMES", "override", "standardize", "to_sglang"]

# Other projects' names for the same thing → the name kept in `generate_kwargs` (TorchRL's where it has one).
_ALIASES = {
    "max_tokens": "max_new_tokens",  # vLLM
    "stop": "stop_sequences",  # SGLang, vLLM
    "stop_strings": "stop_sequences",  # Hugging Face
    "eos_token_id": "stop_token_ids",  # Hugging Face
    "seed": "sampling_seed",  # vLLM
    "include_stop_str_in_output": "no_stop_trim",  # vLLM
    "n": "num_return_sequences",  # SGLang, vLLM
}


MAX_LOGIT_BIAS = 1e9
# What is recorded of sampled tokens, by SGLang's names.
RECORDS = frozenset({"return_entropy", "return_sampling_mask", "return_routed_experts"})
# Options that are no sampling parameters of SGLang. `policy.action_masks` reads the options for constraints.
NOT_OF_SAMPLING = RECORDS | {
    "lora_path", "priority", "return_hidden_states", "action_mask", "disallowed_tokens", "custom_logit_processor",
}  # fmt: skip
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
# An option of a call replaces every default in the same group.
_GROUPS = (_GRAMMARS, ("do_sample", "temperature"))


class _Rule(NamedTuple):
    types: tuple[type, ...]
    holds: Callable[[Any], bool]
    limit: str
    # How TorchRL's wrappers say it, which programs and tests look for.
    torchrl: str = ""


def _number(holds: Callable[[Any], bool], limit: str, torchrl: str = "") -> _Rule:
    return _Rule((Real,), lambda x: math.isfinite(x) and holds(x), limit, torchrl)


def _texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return all(isinstance(text, str) and text for text in texts)


def _is_token_id(value: Any) -> bool:
    # JSON's keys are strings.
    return (type(value) is int and value >= 0) or (isinstance(value, str) and value.isascii() and value.isdecimal())


def _is_bias(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) <= MAX_LOGIT_BIAS


_FLAG = _Rule((bool,), lambda x: True, "True or False")
_TEXTS = _Rule((str, list, tuple), _texts, "a non-empty string or a list of them")
_TEXT = _Rule((str,), bool, "a non-empty string")
_OF_CONSTRAINTS = _Rule((object,), lambda x: True, "a constraint or token ids")

_RULES: dict[str, _Rule] = {
    "max_new_tokens": _Rule((int,), lambda x: x >= 0, "an integer of at least 0 (0 reads the prompt only)"),
    "min_new_tokens": _Rule((int,), lambda x: x >= 0, "an integer of at least 0"),
    "temperature": _number(
        lambda x: x >= 0, "a finite number of at least 0 (0 is greedy)", "Temperature must be non-negative"
    ),
    "top_p": _number(lambda x: 0 < x <= 1, "in (0, 1]", "top_p must be between 0 and 1"),
    "min_p": _number(lambda x: 0 <= x <= 1, "in [0, 1]"),
    # Beyond these SGLang's scheduler overflows an int32 or a float32, and ends.
    "top_k": _Rule(
        (int,),
        lambda x: 1 <= x < 2**31 or x == -1,
        "an integer in 1..2147483647, or -1 for all",
        "top_k must be positive",
    ),
    "repetition_penalty": _number(
        lambda x: 0.01 <= x <= 2, "in [0.01, 2] (1 is none)", "repetition_penalty must be positive"
    ),
    "logit_bias": _Rule(
        (Mapping,),
        lambda x: all(_is_token_id(token_id) and _is_bias(bias) for token_id, bias in x.items()),
        "a dict of token id to a number in [-1e9, 1e9]",
    ),
    "frequency_penalty": _number(lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "presence_penalty": _number(lambda x: -2 <= x <= 2, "in [-2, 2]"),
    "num_return_sequences": _Rule((int,), lambda x: x >= 1, "an integer of at least 1"),
    "sampling_seed": _Rule((int,), lambda x: -(2**63) <= x < 2**63, "an integer of 64 bits"),
    "priority": _Rule((int,), lambda x: -(2**63) <= x < 2**63, "an integer of 64 bits"),
    "stop_sequences": _TEXTS,
    "stop_regex": _TEXTS,
    "stop_token_ids": _Rule(
        (int, list, tuple, set),
        lambda x: all(type(i) is int and i >= 0 for i in ([x] if isinstance(x, int) else x)),
        "a token id or a list of them, each an integer of at least 0",
    ),
    "do_sample": _FLAG, "ignore_eos": _FLAG, "skip_special_tokens": _FLAG, "spaces_between_special_tokens": _FLAG,
    "no_stop_trim": _FLAG,
    **dict.fromkeys(RECORDS, _FLAG),
    "return_hidden_states": _FLAG, "lora_path": _TEXT,
    "json_schema": _TEXT, "regex": _TEXT, "ebnf": _TEXT, "structural_tag": _TEXT,
    "custom_params": _Rule((Mapping,), lambda x: all(isinstance(name, str) for name in x), "a dict by names"),
    "action_mask": _OF_CONSTRAINTS, "disallowed_tokens": _OF_CONSTRAINTS, "custom_logit_processor": _OF_CONSTRAINTS,
}  # fmt: skip


# SGLang's sampling parameters that a caller may set (sglang.srt.sampling.sampling_params.SamplingParams, 0.5.23; a test
# compares). Left out: `n` and `beam_width` (each request has one completion here), `stream_interval` and `watermark`
# (without effect on a finished response).
SGLANG_NAMES = (frozenset(_RULES) - NOT_OF_SAMPLING - {"do_sample", "num_return_sequences", "stop_sequences"}) | {
    "stop"
}


def standardize(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Rename the options to their standard names and check every value.

    Where an alias and the standard name are both given, the alias wins, as in TorchRL's wrappers. None means "the
    engine's default" and drops the option.

    Args:
        options: values by TorchRL's standard names (``max_new_tokens``, ``temperature``, ``stop_sequences``,
            ``do_sample`` …), by Hugging Face's or vLLM's (``max_tokens``, ``stop_strings``, ``eos_token_id``, ``seed``
            …), or by the name of any sampling parameter of SGLang. Further options are ``return_hidden_states``,
            ``return_entropy``, ``return_sampling_mask``, ``return_routed_experts``, ``lora_path``, ``priority``,
            ``custom_logit_processor`` with its ``custom_params``, ``action_mask`` and ``disallowed_tokens``.

    Returns:
        A new dict by standard names.

    Raises:
        UnknownOptionError: an unknown name.
        InputError: a value outside its limits, or two options that contradict each other.
        InputTypeError: a value of the wrong type.
    """
    passed = {name: value for name, value in (options or {}).items() if value is not None}
    out = {name: value for name, value in passed.items() if name not in _ALIASES}
    out.update({_ALIASES[name]: value for name, value in passed.items() if name in _ALIASES})
    for name, value in out.items():
        _check(name, value)
    if out.get("do_sample") is False and out.get("temperature", 0) != 0:
        raise InputError(
            f"do_sample=False contradicts temperature={out['temperature']}. When do_sample=False (greedy decoding), "
            "temperature must be 0; leave one of the two out"
        )
    if out.get("min_new_tokens", 0) > out.get("max_new_tokens", math.inf):
        raise InputError(
            f"min_new_tokens={out['min_new_tokens']} is over max_new_tokens={out['max_new_tokens']}; lower it"
        )
    grammars = [name for name in _GRAMMARS if name in out]
    if len(grammars) > 1:
        raise InputError(f"{' and '.join(grammars)} are set, and SGLang follows one grammar per request; keep one")
    return out


def override(defaults: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the options of one call over standardised defaults.

    An option of the call replaces the default of the same name. It also replaces defaults that contradict it: a
    grammar replaces another grammar, and ``do_sample`` the ``temperature``. None removes a default, so that the
    engine's own default applies.

    Raises:
        InputError: see `standardize`.
    """
    named = {_ALIASES.get(name, name): value for name, value in call.items()}
    kept = dict(defaults)
    for name in named:
        for group in _GROUPS:
            if name in group:
                kept = {key: value for key, value in kept.items() if key not in group}
        kept.pop(name, None)
    return standardize({**kept, **standardize(call)})


def _check(name: str, value: Any) -> None:
    rule = _RULES.get(name)
    if rule is None:
        close = difflib.get_close_matches(str(name), sorted(_RULES | _ALIASES), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(_RULES))}"
        raise UnknownOptionError(f"unknown generation option {name!r}: {hint}")
    # bool is a subclass of int: temperature=True is a mistake, not 1.
    if not isinstance(value, rule.types) or (isinstance(value, bool) and bool not in rule.types):
        raise InputTypeError(f"{name}={value!r}: expected {rule.limit}")
    if not rule.holds(value):
        said = f"{rule.torchrl}, " if rule.torchrl else ""
        raise InputError(f"{name}={value!r}: {said}expected {rule.limit}")


def to_sglang(standard: Mapping[str, Any]) -> dict[str, Any]:
    """Turn standardised options into SGLang's sampling parameters, JSON-serialisable.

    ``do_sample=False`` and ``top_k=1`` become ``temperature=0``. ``skip_special_tokens`` keeps SGLang's default, True.
    Options that are no sampling parameters are left out.
    """
    out = {name: value for name, value in standard.items() if name not in NOT_OF_SAMPLING}
    if out.pop("do_sample", True) is False:
        out["temperature"] = 0.0
    if out.get("top_k") == 1:
        # The sampled token is the same. But at another temperature SGLang would divide the logits by it or not,
        # depending on the other requests in the batch.
        out["temperature"] = 0.0
    out.pop("num_return_sequences", None)
    if "stop_sequences" in out:
        stop = out.pop("stop_sequences")
        out["stop"] = stop if isinstance(stop, str) else list(stop)
    if "stop_token_ids" in out:
        ids = out["stop_token_ids"]
        out["stop_token_ids"] = [ids] if isinstance(ids, int) else sorted(ids)
    for name, rule in _RULES.items():
        if name in out and Real in rule.types:
            out[name] = float(out[name])  # JSON does not take numpy's numbers
    if "logit_bias" in out:
        out["logit_bias"] = {str(token_id): float(bias) for token_id, bias in out["logit_bias"].items()}
    return out
