"""Checks generation options by TorchRL's, Hugging Face's and vLLM's names, and turns them into SGLang's.

Knows nothing of payloads and requests: it returns the dict of SGLang's sampling parameters.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torchrl_sglang_hidden.errors import InputError, UnknownOptionError
from torchrl_sglang_hidden.spec.request_rules import RECORDS, RULES, check_option

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


# Options that are no sampling parameters of SGLang. `policy.action_masks` reads the options for constraints.
NOT_OF_SAMPLING = RECORDS | {
    "lora_path", "priority", "return_hidden_states", "action_mask", "disallowed_tokens", "custom_logit_processor",
}  # fmt: skip
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
# An option of a call replaces every default in the same group.
_GROUPS = (_GRAMMARS, ("do_sample", "temperature"))


# SGLang's sampling parameters that a caller may set (sglang.srt.sampling.sampling_params.SamplingParams, 0.5.23; a test
# compares). Left out: `n` and `beam_width` (each request has one completion here), `stream_interval` and `watermark`
# (without effect on a finished response).
SGLANG_NAMES = (frozenset(RULES) - NOT_OF_SAMPLING - {"do_sample", "num_return_sequences", "stop_sequences"}) | {"stop"}


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
    rule = RULES.get(name)
    if rule is None:
        close = difflib.get_close_matches(str(name), sorted(RULES | _ALIASES), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(RULES))}"
        raise UnknownOptionError(f"unknown generation option {name!r}: {hint}")
    check_option(name, value, rule)


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
    for name, rule in RULES.items():
        if name in out and Real in rule.types:
            out[name] = float(out[name])  # JSON does not take numpy's numbers
    if "logit_bias" in out:
        out["logit_bias"] = {str(token_id): float(bias) for token_id, bias in out["logit_bias"].items()}
    return out
