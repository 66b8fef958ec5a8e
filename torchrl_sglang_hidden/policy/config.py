"""The constructor arguments of `SGLangHiddenWrapper` that need a check or depend on one another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict.utils import NestedKey, unravel_key
from torchrl.data.llm.history import _CHAT_TEMPLATES as CHAT_TEMPLATES
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchrl_sglang_hidden.engines import BatchingEngine, Engine, check_batching
from torchrl_sglang_hidden.errors import InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.policy.outputs import OutputKeys
from torchrl_sglang_hidden.policy.prompts import INPUT_MODES
from torchrl_sglang_hidden.sglang_api.sampling import standardize
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, Role, TokenMask, Turn

__all__ = [
    "changed_config",
    "check_arguments",
    "check_chat_template",
    "default_key",
    "in_keys",
    "logits_of_given",
    "make_batcher",
    "of_given",
    "only_logits",
    "out_keys",
    "read_hidden",
    "read_logits",
    "read_num_samples",
    "read_tokenizer",
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


def in_keys(input_key: NestedKey, hidden: HiddenSpec | None, action_mask_key: NestedKey | None) -> list[NestedKey]:
    """The keys that must be there: the prompt's, those of the spans' masks, and the action mask's."""
    masks = [span.key for span in hidden.spans.values() if isinstance(span, TokenMask)] if hidden is not None else []
    actions = [] if action_mask_key is None else [action_mask_key]
    return list(dict.fromkeys([input_key, *masks, *actions]))


def out_keys(keys: OutputKeys, hidden: HiddenSpec | None, logits: LogitsSpec | None, generate: bool) -> list[NestedKey]:
    """The keys that are written, each once, with the states and logits by leaf."""
    states = (keys.hidden_states, keys.token_hidden_states)
    if not generate and (keys.log_probs, *states, keys.logits) == (None,) * 4:
        raise InputError(
            "generate=False with neither log-probs, hidden states nor logits: there is nothing to compute; leave "
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
    # A module that reads ("hidden_states", "prompt") is fed by this one only if it says so.
    leaves: dict[NestedKey | None, list[NestedKey]] = {}
    if hidden is not None:
        segments = hidden.segments if generate else ("full",)
        pooled: list[NestedKey] = [f"{segment}{suffix}" for segment in segments for suffix in ("", "_count")]
        pooled += [(suffix, name) for name in hidden.spans for suffix in ("spans", "span_counts")]
        leaves |= {keys.hidden_states: pooled, keys.token_hidden_states: list(segments)}
    if logits is not None:
        fields = logits.segments if generate else ("full",)
        ids = {"prompt": "prompt_token_ids", "response": "token_ids", "full": "full_token_ids"}
        leaves[keys.logits] = [*fields, *(ids[name] for name in fields if logits.top_k is not None)]
    return [key for key in written if key not in leaves] + [
        unravel_key((key, leaf)) for key, found in leaves.items() if key is not None for leaf in found
    ]


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


def read_hidden(hidden: HiddenSpec | bool | None, wanted: bool | None, input_mode: str) -> HiddenSpec | None:
    """The states that are returned, which two arguments may say: SGLang's own ``return_hidden_states`` wins."""
    if hidden is not None and not isinstance(hidden, (bool, HiddenSpec)):
        raise InputTypeError(f"hidden={hidden!r}: expected a HiddenSpec, True, False or None")
    asked = bool(hidden) if wanted is None else wanted
    spec = hidden if isinstance(hidden, HiddenSpec) else HiddenSpec()
    if not asked:
        return None
    of_chats = [name for name, span in spec.spans.items() if isinstance(span, (Turn, Role))]
    if of_chats and input_mode != "history":
        raise InputError(
            f"the span {of_chats[0]!r}, {spec.spans[of_chats[0]]}, with input_mode={input_mode!r}: only history mode "
            "has messages; use TokenMask or Between"
        )
    return spec


def of_given(spec: HiddenSpec | None) -> HiddenSpec | None:
    """What is asked of a given sequence that is scored: all its tokens, and the spans that are not of a response."""
    if spec is None:
        return None
    spans = {
        name: span
        for name, span in spec.spans.items()
        if not (isinstance(span, (LastTokens, Between)) and span.segment == "response")
    }
    return replace(spec, segments=("prompt",), spans=spans)


def read_logits(logits: LogitsSpec | None, vocab_size: int) -> LogitsSpec | None:
    """The logits that are returned, held against the model."""
    if logits is None:
        return None
    if not isinstance(logits, LogitsSpec):
        raise InputTypeError(f"logits={logits!r}: expected a LogitsSpec, such as LogitsSpec(top_k=8), or None")
    if logits.top_k is not None and logits.top_k > vocab_size:
        raise InputError(f"LogitsSpec(top_k={logits.top_k}): the model has {vocab_size} tokens; ask for at most these")
    if logits.token_ids is not None and max(logits.token_ids) >= vocab_size:
        raise TokenIdError(
            f"LogitsSpec(token_ids={logits.token_ids!r:.80}): id {max(logits.token_ids)} is outside the vocabulary of "
            f"{vocab_size}; ids are 0..{vocab_size - 1}"
        )
    return logits


def logits_of_given(logits: LogitsSpec | None) -> LogitsSpec | None:
    """What is asked of a given sequence that is scored: the logits of all its tokens."""
    return None if logits is None else replace(logits, segments=("prompt",))


def only_logits(logits: LogitsSpec | None) -> LogitsSpec:
    """What ``logits_only`` asks for: all columns or the wrapper's own, and those whose softmax has the log-probs."""
    own = LogitsSpec(full=True) if logits is None or logits.token_ids is None else logits
    dtype = torch.float32 if logits is None else logits.dtype
    return replace(own, stage="processed", segments=("prompt",), dtype=dtype)


def changed_config(
    config: Mapping[str, Any], changes: Mapping[str, Any], *, default_input_key: bool, batched: bool
) -> dict[str, Any]:
    """The arguments of a changed wrapper: all of the old one's but those that are changed, and what hangs on them."""
    new = {**config, **changes}
    # The default input key belongs to its mode; a key of the user's own is kept.
    if default_input_key and "input_key" not in changes:
        new["input_key"] = None
    # The number of samples has two names, and so has whether there are states. The one that is changed wins.
    options = standardize(new["generate_kwargs"])
    if "generate_kwargs" not in changes:
        for name, option in (("num_samples", "num_return_sequences"), ("hidden", "return_hidden_states")):
            if name in changes:
                options.pop(option, None)
        new["generate_kwargs"] = options
    elif "num_samples" not in changes and "num_return_sequences" in options:
        new["num_samples"] = None
    # Whether to batch has two names too: the sizes switch it on.
    sizes = {"min_batch_size", "max_batch_size"}
    if changes.get("batching") is False:
        new |= dict.fromkeys(sizes - changes.keys())
    elif "batching" not in changes and not batched and sizes & changes.keys():
        new["batching"] = None
    return new


def read_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | None, engine_path: str, vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer to use: the one given, or the engine's own.

    Args:
        tokenizer: a tokenizer, a name or path of one, or None for the engine's.
        engine_path: where the engine read its own.
        vocab_size: the engine's.

    Raises:
        InputError: it cannot be read; or it gives a token another id than the engine's own does, where that can be read
            from here; or ids outside the engine's vocabulary. A padding token may be outside: pads are never sent.
    """
    if not isinstance(tokenizer, (str, type(None))):
        _check_vocabulary(tokenizer, engine_path, vocab_size)
        return tokenizer
    path = engine_path if tokenizer is None else tokenizer
    try:
        found = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer can be read at {path!r}; pass tokenizer=, a tokenizer or a path of one"
        ) from error
    return read_tokenizer(found, engine_path, vocab_size) if path != engine_path else found


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, engine_path: str, vocab_size: int) -> None:
    vocabulary, expected = tokenizer.get_vocab(), _vocabulary(engine_path)
    other = [token for token, token_id in vocabulary.items() if expected.get(token, token_id) != token_id]
    if other:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} is not the engine's: {len(other)} tokens have other ids than in "
            f"{engine_path!r}, such as {other[0]!r}, {vocabulary[other[0]]} and not {expected[other[0]]}; pass the "
            "model's own, or leave tokenizer out"
        )
    outside = {token: i for token, i in vocabulary.items() if i >= vocab_size and token != tokenizer.pad_token}
    if outside:
        token, token_id = min(outside.items(), key=lambda item: item[1])
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} is not the engine's: {len(outside)} ids are outside the "
            f"engine's vocabulary of {vocab_size}, such as {token_id} for {token!r}; pass the model's own, or leave "
            "tokenizer out"
        )


@functools.lru_cache(maxsize=8)
def _vocabulary(path: str) -> dict[str, int]:
    """The ids of a served model's tokens; none where they cannot be read from this machine."""
    # Of directories only: a model hub's name would be looked up in the network.
    if not Path(path).is_dir():
        return {}
    try:
        return dict(AutoTokenizer.from_pretrained(path).get_vocab())
    except (OSError, ValueError):
        return {}
