"""Checks of single arguments of the policy that need more than a line, and which record an argument belongs to.

Knows nothing of rows or requests.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputError, InputTypeError, TokenIdError
from torchrl_sglang_hidden.policy.action_masks import read_action_ids
from torchrl_sglang_hidden.policy.sampled_turns import CHAT_MODES
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = [
    "check_choices",
    "check_logits",
    "check_samples",
    "field_names",
    "read_action_ids_early",
    "resolve_num_samples",
    "take_fields",
]


def resolve_num_samples(num_samples: int | None, options: Mapping[str, Any]) -> int | None:
    """Return the responses per prompt: ``num_samples``, or the option ``num_return_sequences``.

    Raises:
        InputError: no positive integer, or both and they differ.
    """
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise InputError(f"num_samples={num_samples!r}: expected an integer of at least 1, or None")
    option = options.get("num_return_sequences")
    if option is None:
        return num_samples
    if num_samples not in (None, option):
        raise InputError(f"num_samples={num_samples} and num_return_sequences={option} contradict each other; give one")
    # One response without a dimension of samples is what every other wrapper gives for 1.
    return num_samples if option == 1 else cast("int", option)


def check_samples(generate: bool, responses: int | None, inplace: object, extra_samples: int) -> bool:
    """Check what goes with several responses per prompt, or without.

    Args:
        generate: the wrapper's; a policy that scores has no responses.
        responses: per prompt; None for one without a dimension of its own.
        inplace: the wrapper's.
        extra_samples: the wrapper's.

    Returns:
        Whether the output has a dimension of responses.

    Raises:
        InputError: ``inplace`` beside several responses, or ``extra_samples`` beside one.
    """
    many = generate and responses is not None
    if many and inplace not in (None, False):
        raise InputError(
            f"inplace={inplace!r} with num_samples={responses}: the output has another batch size than the input; "
            "leave inplace out, or set it to False"
        )
    if generate and extra_samples and not many:
        raise InputError(
            f"extra_samples={extra_samples} without num_samples: expected the number of responses that are kept; give "
            "num_samples, or leave extra_samples out"
        )
    return many


def read_action_ids_early(ids: Any, key: NestedKey | None) -> tuple[int, ...] | None:
    """Read ``action_token_ids`` before the vocabulary is known; `PolicyConfig.resolve_for` compares them with it.

    Raises:
        InputError, TokenIdError: see `read_action_ids`.
    """
    try:
        return read_action_ids(ids, key, sys.maxsize)
    except TokenIdError as error:
        raise TokenIdError(
            f"action_token_ids={ids!r:.80}: ids are 0 or more, each once; leave the others out"
        ) from error


def check_logits(logits: LogitsSpec | None, vocab_size: int) -> None:
    """Check that the model has the tokens that a `LogitsSpec` names.

    Raises:
        InputError: it does not.
    """
    if logits is None:
        return
    if logits.top_k is not None and logits.top_k > vocab_size:
        raise InputError(f"LogitsSpec(top_k={logits.top_k}): the model has {vocab_size} tokens; ask for at most these")
    if logits.token_ids is not None and max(logits.token_ids) >= vocab_size:
        raise TokenIdError(
            f"LogitsSpec(token_ids={logits.token_ids!r:.80}): id {max(logits.token_ids)} is outside the vocabulary of "
            f"{vocab_size}; ids are 0..{vocab_size - 1}"
        )


def _check_tokenizer_kwargs(options: Any, input_mode: str) -> None:
    """Check the options of the tokenizer as far as is possible without it.

    Raises:
        InputTypeError: no dict.
        InputError: truncation in history mode.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InputTypeError(
            f"tokenizer_kwargs={options!r:.80}: expected a dict, such as {{'add_special_tokens': False}}"
        )
    truncation = options.get("truncation")
    if input_mode == "history" and truncation not in (None, False, "do_not_truncate"):
        raise InputError(
            f"tokenizer_kwargs={dict(options)!r:.80} with input_mode='history': truncation cuts the chat's frame, on "
            "the right its last message and the generation prompt; shorten the chat by whole messages, or cut its ids "
            "and use input_mode='tokens'"
        )


def check_choices(config: Any) -> None:
    """Check the arguments that take one of several values, and those that must not contradict each other.

    Args:
        config: a `PolicyConfig`.

    Raises:
        InputError: another value.
        InputTypeError: a value of another type.
    """
    for name in ("generate", "literal_content", "mark_end_of_turn"):
        if not isinstance(getattr(config, name), bool):
            raise InputTypeError(f"{name}={getattr(config, name)!r}: expected True or False")
    if config.pad_model_input:
        raise InputError("pad_model_input=True: pads are never sent to the engine; leave it out")
    if config.layout not in (None, torch.strided, torch.jagged):
        raise InputError(f"layout={config.layout!r}: expected torch.strided, torch.jagged or None")
    if config.inplace != "empty" and not any(config.inplace is value for value in (None, True, False)):
        raise InputError(f"inplace={config.inplace!r}: expected True, False or 'empty'")
    if config.logits is not None and not isinstance(config.logits, LogitsSpec):
        raise InputTypeError(f"logits={config.logits!r}: expected a LogitsSpec, such as LogitsSpec(top_k=8), or None")
    _check_tokenizer_kwargs(config.tokenizer_kwargs, config.input_mode)
    if (
        config.literal_content
        and config.input_mode == "history"
        and config.generate
        and (config.prefer_tokens or config.chat == "append")
    ):
        raise InputError(
            f"literal_content=True with prefer_tokens={config.prefer_tokens!r} and chat={config.chat!r}: what follows "
            "the ids of earlier turns is encoded as one text; keep one of them"
        )
    _check_chats(config)


def _check_chats(config: Any) -> None:
    """Check the arguments that say how chats become prompts; see `PolicyConfig`.

    Raises:
        InputError: an unknown mode, two templates, or no key for what is to be read of the turns before.
        InputTypeError: a template that is no string.
    """
    prefer_tokens, chat, name = config.prefer_tokens, config.chat, config.chat_template_name
    tokens_key, masks_key = config.keys.tokens_key, config.keys.masks_key
    if not any(prefer_tokens is value for value in (True, False)) and prefer_tokens != "strict":
        raise InputError(f"prefer_tokens={prefer_tokens!r}: expected True, False or 'strict'")
    if chat not in CHAT_MODES:
        raise InputError(f"chat={chat!r}: expected one of {CHAT_MODES}")
    if prefer_tokens and tokens_key is None:
        raise InputError(
            f"prefer_tokens={prefer_tokens!r} reads the tokens at tokens_key, which is None; give it a key"
        )
    if chat == "append" and None in (tokens_key, masks_key):
        raise InputError(
            f"chat='append' reads the turns before at tokens_key={tokens_key!r} and masks_key={masks_key!r}; give both "
            "a key"
        )
    if name is not None and config.chat_template is not None:
        raise InputError(f"chat_template and chat_template_name={name!r} are both given; keep one")
    if not isinstance(config.chat_template, (str, type(None))):
        raise InputTypeError(
            f"chat_template={config.chat_template!r:.80}: expected a Jinja template, a string; of several, give one"
        )


def field_names(kind: Any) -> set[str]:
    """Return the names of a record's fields that its constructor takes."""
    return {found.name for found in fields(kind) if found.init}


def take_fields(arguments: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Take the arguments that are fields of a record out of all arguments."""
    return {name: arguments.pop(name) for name in field_names(kind) & arguments.keys()}
