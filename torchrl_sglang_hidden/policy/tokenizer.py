"""Reading the wrapper's tokenizer, and holding it against the engine's vocabulary.

Knows nothing of prompts.
"""

from __future__ import annotations

import functools
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchrl_sglang_hidden.errors import InputError

__all__ = ["read_tokenizer"]


def read_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | None, engine_path: str, vocab_size: int
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the argument names, or the engine's own.

    Args:
        tokenizer: a tokenizer, the name or path of one, or None for the engine's.
        engine_path: where the engine read its own tokenizer.
        vocab_size: the engine's.

    Raises:
        InputError: the tokenizer cannot be read; or it gives a token another id than the engine's tokenizer does (as
            far as that can be read from this machine), or an id outside the engine's vocabulary. A padding token may be
            outside, because pads are never sent.
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
    """Return the ids of a served model's tokens; an empty dict where they cannot be read from this machine."""
    # Directories only: the name of a model on a hub would be looked up on the network.
    if not Path(path).is_dir():
        return {}
    try:
        return dict(AutoTokenizer.from_pretrained(path).get_vocab())
    except (OSError, ValueError):
        return {}
