"""The constructor arguments of `SGLangHiddenWrapper` that need a check or depend on one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict.utils import NestedKey, unravel_key
from torchrl.data.llm.history import _CHAT_TEMPLATES as CHAT_TEMPLATES

from torchrl_sglang_hidden.assemble import OutputKeys
from torchrl_sglang_hidden.engines import BatchingEngine, Engine, check_batching
from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.prompts import INPUT_MODES
from torchrl_sglang_hidden.specs import HiddenSpec

__all__ = [
    "check_arguments",
    "check_chat_template",
    "default_key",
    "make_batcher",
    "out_keys",
    "read_hidden",
    "read_num_samples",
]


def check_chat_template(template: str | None, name: str | None) -> None:
    """Refuses two templates, and names that torchrl does not know."""
    if name is None:
        return
    if template is not None:
        raise InputError(f"chat_template and chat_template_name={name!r} are both given; keep one")
    if name not in CHAT_TEMPLATES:
        raise InputError(
            f"chat_template_name={name!r}: expected one of {sorted(CHAT_TEMPLATES)}; or give chat_template"
        )


def check_arguments(input_mode: object, generate: object, pad_model_input: object, layout: Any, inplace: Any) -> None:
    if input_mode not in INPUT_MODES:
        raise InputError(f"input_mode={input_mode!r}: expected one of {INPUT_MODES}")
    if not isinstance(generate, bool):
        raise InputTypeError(f"generate={generate!r}: expected True or False")
    if pad_model_input:
        raise InputError("pad_model_input=True: pads are never sent to the engine; leave it out")
    if layout not in (None, torch.strided, torch.jagged):
        raise InputError(f"layout={layout!r}: expected torch.strided, torch.jagged or None")
    if inplace != "empty" and not any(inplace is value for value in (None, True, False)):
        raise InputError(f"inplace={inplace!r}: expected True, False or 'empty'")


def out_keys(keys: OutputKeys, hidden: HiddenSpec | None, generate: bool) -> list[NestedKey]:
    """The keys that are written, each once, with the states by leaf."""
    if not generate and keys.log_probs is None and keys.hidden_states is None:
        raise InputError(
            "generate=False with neither log-probs nor hidden states: there is nothing to compute; leave "
            "return_log_probs out, or pass hidden=True"
        )
    written = keys.present()
    twice = [key for key in written if written.count(key) > 1]
    if twice:
        raise InputError(f"{twice[0]!r} is the key of {len(twice)} outputs; give each its own, or None to leave it out")
    paths = [key if isinstance(key, tuple) else (key,) for key in written]
    for path in paths:
        inside = next((other for other in paths if other != path and other[: len(path)] == path), None)
        if inside is not None:
            raise InputError(f"{inside!r} is inside {path!r}, the key of another output; give each a place of its own")
    if keys.hidden_states is None or hidden is None:
        return written
    # A module that reads ("hidden_states", "prompt") is fed by this one only if it says so.
    leaves = [
        f"{segment}{suffix}" for segment in (hidden.segments if generate else ("full",)) for suffix in ("", "_count")
    ]
    others = [key for key in written if key != keys.hidden_states]
    return others + [unravel_key((keys.hidden_states, leaf)) for leaf in leaves]


def make_batcher(
    engine: Engine, batching: bool | None, min_batch_size: int | None, max_batch_size: int | None, timeout_s: float
) -> BatchingEngine | None:
    if batching is not None and not isinstance(batching, bool):
        raise InputTypeError(f"batching={batching!r}: expected True, False or None")
    minimum = 1 if min_batch_size is None else min_batch_size
    check_batching(minimum, max_batch_size, timeout_s)
    sizes = (min_batch_size, max_batch_size) != (None, None)
    if batching is False and sizes:
        raise InputError(
            f"batching=False with min_batch_size={min_batch_size} and max_batch_size={max_batch_size}: leave the sizes "
            "out, or batching"
        )
    if not batching and not sizes:
        return None
    return BatchingEngine(engine, min_batch_size=minimum, max_batch_size=max_batch_size, timeout_s=timeout_s)


def default_key(input_mode: str, generate: bool) -> NestedKey:
    return (input_mode, "prompt" if generate else "full")


def read_num_samples(num_samples: int | None, options: Mapping[str, Any]) -> int | None:
    """Samples per prompt, which either argument may say."""
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise InputError(f"num_samples={num_samples!r}: expected an integer of at least 1, or None")
    given = options.get("num_return_sequences")
    if given is None:
        return num_samples
    if num_samples not in (None, given):
        raise InputError(f"num_samples={num_samples} and num_return_sequences={given} contradict each other; give one")
    # One response without a dimension of samples is what every other wrapper gives for 1.
    return num_samples if given == 1 else given


def read_hidden(hidden: HiddenSpec | bool | None) -> HiddenSpec | None:
    if hidden is True:
        return HiddenSpec()
    if hidden is False or hidden is None or isinstance(hidden, HiddenSpec):
        return hidden or None
    raise InputTypeError(f"hidden={hidden!r}: expected a HiddenSpec, True, False or None")
