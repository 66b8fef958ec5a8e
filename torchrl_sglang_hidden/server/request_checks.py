"""Checks SGLang's requests, in its tokenizer manager: what the scheduler could not read, or could not compute.

Each check raises an error of this package, or what SGLang's own objects raise where they are not what they should be:
`OF_BAD_REQUESTS`. Knows SGLang's requests by attribute name; imports of SGLang are inside functions.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from array import array
from typing import Any

import msgspec
import numpy as np
import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError
from torchrl_sglang_hidden.protocol import check_protocol
from torchrl_sglang_hidden.spec.request_rules import RULES, Rule, check_option, check_prompt_ids, check_token_ids

__all__ = [
    "MAX_REQUESTS",
    "MAX_SAMPLES",
    "OF_BAD_REQUESTS",
    "check_batch",
    "check_embeddings",
    "check_ids",
    "check_lists",
    "check_log_probs",
    "check_overrides",
    "check_places",
    "check_prompt",
    "check_sampling",
    "check_wire",
    "has_session",
    "message_of",
    "most_characters",
    "name_id",
]

# Most requests that one payload may come to, samples included: SGLang makes an object of each before it sends any, and
# takes all of them in before it sees that their client is gone.
MAX_REQUESTS = 2**14
# Most samples of one prompt.
MAX_SAMPLES = 4096
# Set on SGLang's tokenizer manager.
_MOST_CHARACTERS = "_torchrl_sglang_hidden_most_characters"
# What SGLang's own reading of a bad request raises.
OF_BAD_REQUESTS = (
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, re.error,
    msgspec.MsgspecError,
)  # fmt: skip
# By SGLang's names, the rules that this package has by others.
_SAMPLING: dict[str, Rule] = {**RULES, "stop": RULES["stop_sequences"], "n": RULES["num_return_sequences"]}
# An empty text means none to SGLang.
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
_START = Rule((int,), lambda x: x >= -1, "an integer of at least 0, or -1 for none of the prompt")


def message_of(error: BaseException) -> str:
    """Return what an error says of a bad request."""
    if isinstance(error, KeyError) and not isinstance(error, InputError):
        return f"the request has no {error}, or names one that is not there; look at its fields"
    # SGLang's are about its own variables where the type of a value was not expected.
    plain = isinstance(error, (ValueError, msgspec.MsgspecError))
    return str(error) if plain else f"the request cannot be read ({error}); look at the types of its fields"


# --- as it came -------------------------------------------------------------------------------------------------------


def check_batch(obj: Any, num_samples: int) -> None:
    """Check how many rows a payload has, with its samples."""
    text, ids = obj.text, obj.input_ids
    given = ids if text is None else text
    if isinstance(given, (list, tuple)) and not given and not has_session(obj):
        raise InputError("the batch has 0 rows, or a prompt of 0 tokens; pass at least 1 prompt with at least 1 token")
    num_rows = _num_rows(given)
    if num_rows * num_samples > MAX_REQUESTS:
        raise InputError(
            f"{num_rows} rows of n={num_samples} samples are {num_rows * num_samples} requests, over the limit of "
            f"{MAX_REQUESTS}; send fewer at a time"
        )
    if text is not None and ids is not None and _num_rows(text) != _num_rows(ids):
        raise InputError(
            f"text has {_num_rows(text)} rows and input_ids {_num_rows(ids)}; pass one of them, or the same prompts"
        )


def _num_rows(prompts: Any) -> int:
    several = isinstance(prompts, (list, tuple)) and all(isinstance(row, (str, list, tuple)) for row in prompts[:1])
    return len(prompts) if several else 1


def check_lists(obj: Any) -> None:
    """Check the lists with a value for each row that SGLang takes as they are, whatever their length."""
    num_rows = len(obj.rid)
    names = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask", "token_ids_logprob")
    for name in (*names, "sampling_params", "lora_path", "bootstrap_room", "bootstrap_host", "bootstrap_port"):
        values = getattr(obj, name, None)
        if isinstance(values, list) and len(values) < num_rows:
            raise InputError(f"{name} has {len(values)} values for {num_rows} rows; give one for each, or one for all")


def has_session(obj: Any) -> bool:
    """Return whether a request goes on from a session's history."""
    session = getattr(obj, "session_params", None)
    return isinstance(session, dict) and session.get("id") is not None


def check_prompt(manager: Any, obj: Any) -> None:
    """Check a row's prompt as it was sent."""
    if manager.mm_processor is None and obj.contains_mm_input():
        raise InputError("images, video or audio for a model that reads text alone; leave them out")
    if obj.input_ids is not None:
        if isinstance(obj.input_ids, (int, float, str, dict)):
            raise InputTypeError(f"input_ids={obj.input_ids!r:.200}: expected a list of token ids")
    elif obj.text is not None and obj.input_embeds is None:
        pieces = obj.text if getattr(obj, "is_cross_encoder_request", False) else [obj.text]
        for text in pieces:
            _check_text(text, most_characters(manager))


def most_characters(manager: Any) -> int:
    """Return how many characters no prompt has that fits: to tokenize 30 MB, all requests would wait for half a minute.

    Twice what the context has room for, where every token were the longest: some tokenizers drop characters.
    """
    most = getattr(manager, _MOST_CHARACTERS, None)
    if most is None:
        vocabulary: dict[str, int] = getattr(manager.tokenizer, "get_vocab", dict)()
        longest = max(map(len, vocabulary), default=0)
        most = sys.maxsize if manager.allow_auto_truncate or not longest else 2 * longest * manager.context_len
        setattr(manager, _MOST_CHARACTERS, most)
    return int(most)


def _check_text(text: Any, most: int) -> None:
    if isinstance(text, list):  # a pair for a cross-encoder
        for part in text:
            _check_text(part, most)
        return
    if not isinstance(text, str):
        raise InputTypeError(f"text={text!r:.200} is a {type(text).__name__}; expected a string")
    if len(text) > most:
        raise PromptLengthError(
            f"the text has {len(text)} characters, and no text of more than {most} fits the model's context; shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has the lone surrogate {text[error.start]!a} at position {error.start}, which is no character; "
            "remove it"
        ) from error


def check_sampling(row: str, options: dict[str, Any], vocab_size: int) -> None:
    """Check the options that the rules know; SGLang refuses names that it does not know."""
    for name, value in options.items():
        rule = _SAMPLING.get(name)
        # None is SGLang's own default everywhere.
        if rule is None or value is None or (name in _GRAMMARS and value == ""):
            continue
        if name == "stop_token_ids" and isinstance(value, (list, tuple, set)):
            value = [token_id for token_id in value if token_id is not None]
        check_option(name, value, rule)
        if name == "stop_token_ids" and isinstance(value, int):
            raise InputTypeError(f"stop_token_ids={value}: expected a list of token ids")
        # SGLang forbids these ids while fewer tokens were sampled, and otherwise compares them only.
        if name == "stop_token_ids" and options.get("min_new_tokens"):
            check_token_ids(row, name, value, vocab_size)
    check_protocol(options.get("custom_params"))


def check_log_probs(row: str, obj: Any, vocab_size: int) -> None:
    """Check what log-probs a row asks for."""
    num_top = getattr(obj, "top_logprobs_num", None)
    if num_top is not None:
        most = Rule((int,), lambda x: 0 <= x <= vocab_size, f"an integer in 0..{vocab_size}, the vocabulary's size")
        check_option("top_logprobs_num", num_top, most)
    start = getattr(obj, "logprob_start_len", None)
    if start is not None:
        check_option("logprob_start_len", start, _START)
    ids = getattr(obj, "token_ids_logprob", None)
    if ids:
        if not isinstance(ids, list) or set(map(type, ids)) != {int}:
            raise InputTypeError(f"token_ids_logprob={ids!r:.200}: expected a list of token ids")
        check_token_ids(row, "token_ids_logprob", ids, vocab_size)


# --- what the scheduler will get --------------------------------------------------------------------------------------


def check_ids(row: str, tokenized: Any, obj: Any, vocab_size: int) -> None:
    """Check the ids that the scheduler will get."""
    ids = tokenized.input_ids
    if tokenized.mm_inputs is not None:
        # SGLang has put rows of images in, which some models number below 0: what was sent is what can be wrong.
        ids = None if obj.input_ids is None else array("q", obj.input_ids)
    if ids is None or len(ids) == 0 or getattr(obj, "input_embeds", None) is not None:
        return
    # A copy of nothing: Python's own min and max look at each id as an object, and take ten times as long.
    ids_P = np.frombuffer(ids, dtype=np.int64)
    least = int(ids_P.min())
    check_prompt_ids(row, ids, vocab_size, (least, int(ids_P.max())))
    if least <= 1 and obj.input_ids is not None:
        # An array makes 0 and 1 of False and True, and only there can they have been.
        for position in np.flatnonzero(ids_P <= 1):
            _check_id(row, obj.input_ids[position])


def name_id(row: str, ids: Any, vocab_size: int) -> None:
    """Say which id no array takes."""
    for token_id in ids:
        _check_id(row, token_id)
    check_prompt_ids(row, ids, vocab_size)


def _check_id(row: str, token_id: Any) -> None:
    if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
        raise InputTypeError(f"{row} token id {token_id!r:.200} is a {type(token_id).__name__}; token ids are integers")


def check_places(tokenized: Any) -> None:
    """Check positions of the prompt, which SGLang's own routes for scores fill in."""
    length = 0 if tokenized.input_ids is None else len(tokenized.input_ids)
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        places = getattr(tokenized, name, None)
        wrong = [place for place in places or () if type(place) is not int or not 0 <= place < length]
        if wrong:
            raise InputError(
                f"{name} has {wrong[0]!r:.200}; the prompt's positions are 0..{length - 1}; pass these alone"
            )


def check_overrides(tokenized: Any, hidden_size: int) -> None:
    """Check embeddings that SGLang's routes for scores put in the place of some tokens'."""
    overrides = tokenized.positional_embed_overrides
    if overrides is None:
        return
    embeds_ND = getattr(overrides, "embeds", None)
    if embeds_ND is None:
        raise InputTypeError("positional_embed_overrides are tensors of the server's own; leave them out")
    # What stands for a tensor on an accelerator has no shape here.
    width = embeds_ND.shape[-1] if isinstance(embeds_ND, torch.Tensor) else hidden_size
    if width != hidden_size:
        raise InputError(f"the embeddings that override some tokens' have {width} numbers; expected {hidden_size}")


def check_embeddings(tokenized: Any, hidden_size: int) -> None:
    """Check embeddings that stand in the place of a prompt."""
    rows = getattr(tokenized, "input_embeds", None)
    if rows is None:
        return
    for position, row in enumerate(rows):
        if len(row) != hidden_size:
            raise InputError(f"input_embeds has {len(row)} numbers at position {position}; expected {hidden_size}")
        if not all(map(math.isfinite, row)):
            raise InputError(f"input_embeds has NaN or infinity at position {position}; expected finite numbers")


def check_wire(tokenized: Any) -> None:
    """Read a row back as the scheduler will, which ends on a field of the wrong type."""
    from sglang.srt.managers import io_struct

    # Without what is large, and is the server's own.
    probe = copy.copy(tokenized)
    probe.mm_inputs = probe.time_stats = probe.positional_embed_overrides = probe.input_ids = None
    try:
        io_struct.msgpack_decode(io_struct.msgpack_encode(probe))
    except OF_BAD_REQUESTS as error:
        raise InputTypeError(_name_field(probe) or message_of(error)) from error


def _name_field(probe: Any) -> str:
    """Say which field cannot be read, with its value; empty where it is none of them alone."""
    from sglang.srt.managers.io_struct import dec_hook, enc_hook, ext_hook

    inner = {
        f"{name}.": value
        for name in probe.__struct_fields__
        if isinstance(value := getattr(probe, name), msgspec.Struct)
    }
    # A request's options stand in its `sampling_params`; their names alone say where.
    inner = {"" if prefix == "sampling_params." else prefix: struct for prefix, struct in inner.items()}
    for prefix, struct in (*inner.items(), ("", probe)):
        for field in msgspec.structs.fields(struct):
            value = getattr(struct, field.name)
            try:
                written = msgspec.msgpack.encode(value, enc_hook=enc_hook)
                msgspec.msgpack.Decoder(field.type, dec_hook=dec_hook, ext_hook=ext_hook).decode(written)
            except OF_BAD_REQUESTS as error:
                return f"{prefix}{field.name}={value!r:.200}: {error}"
    return ""
