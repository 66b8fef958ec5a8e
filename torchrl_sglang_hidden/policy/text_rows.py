"""Reading rows of text: to token ids, each special token that the tokenizer adds written once.

Knows nothing of chats; of ids it knows those that may stand beside a text that was rolled out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError, PromptLengthError
from torchrl_sglang_hidden.images.expansion import RowImages
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer
from torchrl_sglang_hidden.sglang_api.prompt_text import written_once

__all__ = ["TextReader", "TextRow"]


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text that was read.

    Args:
        ids: P ids.
        text: what they stand for: the text, or what truncation left of it.
    """

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads rows of text. Arguments that are not described here are those of `PolicyConfig`.

    Args:
        own: the policy's copies of its tokenizer.
        generate: True reads prompts, False whole sequences to score.
    """

    own: OwnTokenizer
    input_key: NestedKey
    tokens_key: NestedKey | None
    masks_key: NestedKey | None
    generate: bool

    def read(self, name: str, row: TensorDictBase, text: Any, images: RowImages | None = None) -> TextRow:
        """Read one text.

        Args:
            name: of the row and its key, for errors.
            row: a TensorDict without batch dimensions.
            text: what stands at the input key.
            images: those of its placeholders, or None.

        Raises:
            InputTypeError: something that is not a string.
            PromptLengthError: an empty string.
            InputError: a string that the tokenizer cannot read.
        """
        if not isinstance(text, str):
            raise InputTypeError(f"{name} a {type(text).__name__}, {text!r:.80}; expected a string: use ragged(text=…)")
        if not text:
            raise PromptLengthError(f"{name} an empty string, 0 tokens; SGLang needs at least 1")
        try:
            encoded = self.own.encode(text)
        except InputError as error:
            raise type(error)(f"{name} {error}") from error
        ids = written_once(encoded.ids, encoded.before, encoded.after)
        if self.generate and len(ids) > 1 and encoded.after:
            warnings.warn(
                f"the tokenizer writes {self.own.decode(ids[-encoded.after :])!r} behind every prompt, as after a text "
                "that ended, and the model goes on from there; to leave out what it adds, pass "
                "tokenizer_kwargs={'add_special_tokens': False}",
                stacklevel=2,
            )
        head = self.own.decode(ids[: encoded.before])
        twice = encoded.before and ids[0] in ids[encoded.before :]
        if twice and encoded.text[:1].isspace() and encoded.text.lstrip().startswith(head):
            warnings.warn(
                f"{name} begins with a blank before {head!r}, which the tokenizer writes before every text, so that "
                "the ids have it twice; remove the blank",
                stacklevel=2,
            )
        if not self.generate:
            self._compare(name, row, ids, images)
        return TextRow(ids, encoded.text)

    def _compare(self, name: str, row: TensorDictBase, ids: tuple[int, ...], images: RowImages | None) -> None:
        """Warn if the ids of a text are not those of the rollout that it stands in.

        A rollout's text leaves out the token that ended the response, and the ids that a tokenizer writes for a text
        may be others than those that were sampled.
        """
        sampled = self._sampled(row)
        kept = None if sampled is None or images is None else images.fold(sampled)
        if sampled is not None and kept is not None:
            sampled = tuple(sampled[i] for i in kept)  # a text has one placeholder for each image
        if sampled is not None and sampled != ids:
            warnings.warn(
                f"{name} the tokenizer writes this text as {len(ids)} ids, and they are not the {len(sampled)} that "
                f"stand at {unravel_key((self.tokens_key, 'full'))!r} beside it, such as the token that ended the "
                "response; to score what was sampled, use get_new_version(input_mode='tokens')",
                stacklevel=3,
            )

    def _sampled(self, row: TensorDictBase) -> tuple[int, ...] | None:
        """Return the ids of the rollout that a text ``full`` stands in, without pads; None if it stands in none."""
        if self.tokens_key is None or not isinstance(self.input_key, tuple) or self.input_key[-1] != "full":
            return None
        try:
            ids = row.get(unravel_key((self.tokens_key, "full")))
            response = row.get(unravel_key((self.tokens_key, "response")))
            keys = None if self.masks_key is None else unravel_key((self.masks_key, "all_attention_mask"))
            real = None if keys is None else row.get(keys)
        except ValueError:  # a tensor of the user's where the key's path has a container
            return None
        # Scoring writes no response.
        if not isinstance(ids, torch.Tensor) or ids.ndim != 1 or response is None:
            return None
        if isinstance(real, torch.Tensor) and real.shape == ids.shape:
            ids = ids[real.bool()]
        return tuple(ids.tolist())
