"""The wrapper's tokenizer: reading it, holding it against the engine's vocabulary, and a copy that nobody else changes.

Knows nothing of prompts.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.sglang_api.prompt_text import check_unicode, special_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "OwnTokenizer", "read_tokenizer"]


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
        found = _load(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer can be read at {path!r}; pass tokenizer=, a tokenizer or a path of one"
        ) from error
    return read_tokenizer(found, engine_path, vocab_size) if path != engine_path else found


def _load(path: str) -> PreTrainedTokenizerBase:
    # Here and not above: transformers takes longer to import than the rest of this package together.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


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
        return dict(_load(path).get_vocab())
    except (OSError, ValueError):
        return {}


# --- a tokenizer of one's own ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as token ids.

    Args:
        ids: the ids, without padding.
        before: how many of the first ids the tokenizer wrote by itself, such as a BOS.
        after: how many of the last.
        text: what the ids stand for: the text, or what truncation left of it.
    """

    ids: tuple[int, ...]
    before: int
    after: int
    text: str


class OwnTokenizer:
    """The copies of a tokenizer that a policy reads with.

    Truncation, padding and ``split_special_tokens`` are state of a fast tokenizer, not of a call: a call sets them, and
    a call in another thread that comes between tokenizes with them. So a policy owns two copies: one that never
    truncates or pads, and one whose state is that of ``tokenizer_kwargs`` and stays so. Both are safe to call from
    several threads.

    A copy shares the vocabulary, and takes 10 ms for 150,000 tokens. Pickled, it is the tokenizer it was made of.

    Args:
        given: the user's tokenizer. A chat template or tokens that it gets later are followed.
        options: ``tokenizer_kwargs``.

    Raises:
        InputError: the tokenizer cannot be copied, or does not take the options.
    """

    def __init__(self, given: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
        self.given, self.options, self._lock = given, dict(options), threading.Lock()
        _check_options(given, self.options)
        self._make()

    def _make(self) -> None:
        self._bare: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None
        self._plain = self._configured = _unshared_copy(self.given)
        if self.options:
            self._configured = _unshared_copy(self.given)
            # Sets the state, so that no call has to while another one tokenizes.
            self._call(self._configured, "a", {})

    def __getstate__(self) -> dict[str, Any]:
        """Return what the copies are made of, and not them: a vocabulary is the most of what a policy pickles."""
        return {"given": self.given, "options": self.options}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make the copies again."""
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._make()

    @property
    def plain(self) -> PreTrainedTokenizerBase:
        """The copy that never truncates or pads. It must be called without such options."""
        if len(self._plain) != len(self.given):
            with self._lock:
                self._make()
        if self._plain.chat_template is not self.given.chat_template:
            self._plain.chat_template = self.given.chat_template
        return self._plain

    def bare(self) -> PreTrainedTokenizerBase:
        """Return a copy without added tokens, to which every text is plain text.

        Raises:
            InputError: a tokenizer of Python's own, which has none.
        """
        plain = self.plain
        if self._bare is None or self._bare[0] is not plain:
            if not plain.is_fast:
                raise InputError(
                    f"literal_content=True with the tokenizer {plain.name_or_path!r}: it is none of the fast ones, "
                    "whose added tokens can be taken away; give a fast tokenizer, or leave it out"
                )
            copied = copy.copy(plain)
            copied.__dict__["_tokenizer"] = _unshared_backend(plain.backend_tokenizer, added=False)
            self._bare = plain, copied
        return self._bare[1]

    def encode(self, text: str, **defaults: Any) -> Encoded:
        """Tokenize a text with ``tokenizer_kwargs``, over some defaults.

        Raises:
            InputError: a text that is no Unicode, the tokenizer does not take the options, or a call with them gives
                something else than ids.
        """
        check_unicode("the text", text)
        plain = self.plain
        encoded = self._call(self._configured, text, defaults)
        real = [i for i, is_real in enumerate(encoded["attention_mask"]) if is_real]
        ids = tuple(encoded["input_ids"][i] for i in real)
        before, after = special_ends([bool(encoded["special_tokens_mask"][i]) for i in real])
        if self.options.get("truncation"):
            special = {**defaults, **self.options}.get("add_special_tokens", True)
            if ids != tuple(plain(text, add_special_tokens=special)["input_ids"]):
                text = str(plain.decode(ids[before : len(ids) - after]))
        return Encoded(ids, before, after, text)

    def _call(self, tokenizer: PreTrainedTokenizerBase, text: str, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = {"return_attention_mask": True, "return_special_tokens_mask": True, "return_tensors": None}
        try:
            encoded: Mapping[str, Any] = tokenizer(text, **{**defaults, **self.options, **asked})
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"tokenizer_kwargs={self.options}: the tokenizer {tokenizer.name_or_path!r} refuses them: {error}; "
                "leave them out"
            ) from error
        if any(not isinstance(token_id, int) for token_id in encoded["input_ids"]):
            raise InputError(
                f"tokenizer_kwargs={self.options}: the tokenizer returns {encoded['input_ids']!r:.80} for one text, "
                "and no ids; leave out what changes the form of its output"
            )
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the exact text of ids: with special tokens, and with every blank."""
        return str(self._plain.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuse options that transformers would ignore, or that are a second text."""
    if not tokenizer.is_fast:
        return  # Python's own take options of their own
    calls: list[Any] = [tokenizer.__call__, tokenizer._encode_plus]
    known = {name for call in calls for name in inspect.signature(call).parameters}
    known = {name for name in known if not name.startswith("text")} - {"kwargs", "tokenizer_kwargs"}
    unknown = sorted(options.keys() - known)
    if unknown:
        side = "; a side is an attribute of the tokenizer" if "truncation_side" in unknown else ""
        raise InputError(
            f"tokenizer_kwargs={dict(options)}: a call of the tokenizer does not take {unknown}; leave them out{side}"
        )


def _unshared_copy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that tokenizes the same way, without truncation and padding, and shares no state."""
    # Here and not above: importing the package is to load no library that a user may not need.
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return copy.deepcopy(tokenizer)  # Python's own, which takes what a call says from the call
    own = copy.copy(tokenizer)
    # Containers too, one level deep: tokenizers hold their vocabularies in some.
    own.__dict__.update({name: copy.copy(value) for name, value in vars(tokenizer).items() if _is_container(value)})
    own.__dict__["_tokenizer"] = _unshared_backend(backend)
    return own


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def _unshared_backend(backend: Any, *, added: bool = True) -> Any:
    """Return a fast tokenizer of the same model and steps, without truncation and padding; with its tokens, if `added`.

    ``copy.deepcopy`` writes and reads the whole vocabulary as JSON: half a second for 150,000 tokens.
    """
    own = type(backend)(backend.model)
    own.normalizer, own.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    own.post_processor, own.decoder = backend.post_processor, backend.decoder
    tokens = backend.get_added_tokens_decoder() if added else {}
    for _, token in sorted(tokens.items()):
        (own.add_special_tokens if token.special else own.add_tokens)([token])
    if own.get_added_tokens_decoder() != tokens:  # ids that are not in the order of their making
        own = copy.deepcopy(backend)
        own.no_truncation()
        own.no_padding()
    own.encode_special_tokens = backend.encode_special_tokens
    return own
