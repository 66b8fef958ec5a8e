"""Writing prompts: one row of a TensorDict to a text, a chat or token ids.

Knows nothing of policies: whether a prompt fits the model is checked when it is sent.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDictBase, is_leaf_nontensor, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey, unravel_key
from torchrl.data.llm import History

from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.images.image_data import ImageData
from torchrl_sglang_hidden.images.messages import IMAGE_TYPES, take_images
from torchrl_sglang_hidden.policy.chat_template import messages_of
from torchrl_sglang_hidden.policy.images import read_images
from torchrl_sglang_hidden.policy.prompts import InputMode

__all__ = [
    "Field",
    "Prompt",
    "PromptSource",
    "PromptWriter",
    "image_keys",
    "keys_in",
    "leaf_keys",
    "name_of",
    "value_of",
]

PromptSource: TypeAlias = str | Callable[[TensorDictBase], Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked for one row.

    Args:
        mode: how a policy reads it.
        value: a text, a chat or token ids, as `ragged` takes them.
        images: those of the row, for placeholders and for parts of a chat that bring none of their own.
    """

    mode: InputMode
    value: Any
    images: tuple[ImageData, ...] = ()

    @property
    def key(self) -> Hashable:
        """What two equal prompts have in common, and no others."""
        digests = tuple(image.digest for image in self.images)
        match self.mode:
            case "text":
                return self.mode, self.value, digests
            case "tokens":
                return self.mode, tuple(self.value), digests
            case "history":
                messages = self.value.to_dict() if isinstance(self.value, History) else self.value
                return self.mode, json.dumps(messages, sort_keys=True, default=_plain_message), digests

    def check_unicode(self) -> None:
        """Refuse a text with half of a surrogate pair, which no tokenizer reads.

        Raises:
            InputError: there is one. The policy would say so too, and for the whole call.
        """
        messages = self.value if isinstance(self.value, list) and self.mode == "history" else []
        contents = [message.get("content") for message in messages] if self.mode == "history" else [self.value]
        for text in itertools.chain.from_iterable(map(_texts_in, contents)):
            found = re.search("[\ud800-\udfff]", text) if isinstance(text, str) else None
            if found:
                raise InputError(
                    f"{text!r:.80} has {found[0]!r} at character {found.start()}, half of a surrogate pair and no "
                    "character; remove it"
                )


@dataclass(frozen=True, slots=True)
class Field:
    """Reads the prompt of a row from one of its fields: a text, a chat or token ids.

    Args:
        name: the field's key, a nested one with dots between its parts, as in a format string.

    Raises:
        MissingKeyError: a row lacks it.
        InputError: it is None, as ``null`` in JSON lines.
    """

    name: str

    def __call__(self, row: TensorDictBase) -> Any:
        """Return the prompt of a row."""
        names = {name_of(key): key for key in leaf_keys(row)}
        value = row.get(names.get(self.name, self.name))
        if value is None:
            raise MissingKeyError(f"no {self.name!r}; it has {sorted(names)}: name one of them")
        found = value_of(value)
        if found is None:
            raise InputError(f"{self.name!r} is None; expected a text, a chat or token ids")
        return found


@dataclass(frozen=True, slots=True)
class PromptWriter:
    """Writes the prompt of a row.

    Args:
        source: a format string whose fields are the keys, such as ``"You see {observation}."``; or a function of one
            row, a TensorDict of the keys without batch dimensions, that returns a text, a chat or token ids.
        in_keys: the keys that are read. The field of a nested key is its parts with dots between them.
        images_keys: the keys of the images that go with the prompt, in their order.

    Raises:
        InputError: a format string that cannot be read, or whose fields are not exactly the keys; no keys.
        InputTypeError: a prompt of another type.
    """

    source: PromptSource
    in_keys: Sequence[NestedKey]
    images_keys: Sequence[NestedKey] = ()

    def __post_init__(self) -> None:
        if not (self.in_keys or self.images_keys):
            raise InputError("in_keys=[]: expected at least 1 key, such as in_keys=['observation']")
        if callable(self.source):
            return
        if not isinstance(self.source, str):
            raise InputTypeError(
                f"prompt={self.source!r:.80} is a {type(self.source).__name__}; expected a format string such as "
                "'You see {observation}.', or a function of one row"
            )
        names = [name_of(key) for key in self.in_keys]
        found = {_name_in(field, names) or field for field in _fields_of(self.source)}
        if found != set(names):
            raise InputError(
                f"prompt={self.source!r:.80} has the fields {sorted(found)} and in_keys are {names}; name each in_key "
                "in the prompt, and nothing else"
            )

    @classmethod
    def for_row(cls, source: PromptSource, row: TensorDictBase, images_keys: Sequence[NestedKey] = ()) -> PromptWriter:
        """Return the writer of rows like this one, whose keys are those that a format string names, or all of them.

        Raises:
            MissingKeyError: a field that is no key of the row.
            InputError, InputTypeError: a prompt that cannot be read.
        """
        keys, images = {name_of(key): key for key in leaf_keys(row)}, keys_in(row, images_keys)
        if not isinstance(source, str):
            return cls(source, list(keys.values()), images)
        fields = _fields_of(source)
        found = [_name_in(field, keys) for field in fields]
        if None in found or not (found or images):
            raise MissingKeyError(
                f"prompt={source!r:.80} has the fields {fields}; expected one or more of the rows' keys: name some of "
                f"{sorted(keys)}"
            )
        return cls(source, [keys[name] for name in dict.fromkeys(found) if name is not None], images)

    def write(self, label: str, row: TensorDictBase) -> Prompt:
        """Write the prompt of one row.

        Args:
            label: names the row in errors.
            row: a TensorDict without batch dimensions.

        Raises:
            MissingKeyError: the row lacks a key.
            InputTypeError: the function returned something that is no prompt, or an image's key has no image.
            ImageError: an image that cannot be read.
            PromptLengthError: it returned no messages or token ids.
            InputError: the function raised, or a value cannot be written into the format string.
        """
        values = {key: value_of(_value_at(label, row, key, "in_keys")) for key in self.in_keys}
        images: list[ImageData] = []
        for key in self.images_keys:
            _value_at(label, row, key, "the keys of images")
            images += read_images(f"{label},", row, key)
        try:
            if isinstance(self.source, str):
                text = _Formatter().vformat(self.source, (), {name_of(key): v for key, v in values.items()})
                prompt = Prompt("text", text, tuple(images))
            else:
                found = replace(_prompt_of(self.source(row.select(*self.in_keys))), images=tuple(images))
                prompt = _with_bare_parts(found)
            prompt.check_unicode()
            return prompt
        except SGLangHiddenError as error:
            raise type(error)(f"{label}: {error}") from error
        except Exception as error:  # a prompt function, and what a format string calls, is anybody's code
            raise InputError(
                f"{label}: the prompt cannot be written, {type(error).__name__}: {error}; it was given "
                f"{values!r:.200}. Change the prompt so that it reads them"
            ) from error


def _texts_in(content: Any) -> list[Any]:
    """Return the texts of a message's content: of its parts, where it is a list."""
    if not isinstance(content, list):
        return [content]
    return [part.get("text") for part in content if isinstance(part, Mapping)]


def _plain_message(part: Any) -> Any:
    """Return what JSON writes of a part of a message that it does not know."""
    if is_tensor_collection(part):
        return part.to_dict()
    raise InputTypeError(
        f"a message has {part!r:.80}, a {type(part).__name__}; expected strings and torchrl's ContentBase parts"
    )


def _with_bare_parts(prompt: Prompt) -> Prompt:
    """Return a chat whose parts of images say which they are, and have them in `Prompt.images`.

    Two chats that name one file are the same only while the file is.
    """
    if prompt.mode != "history":
        return prompt
    messages = messages_of(prompt.value) if isinstance(prompt.value, History) else prompt.value
    if not (prompt.images or any(map(_has_image, messages))):
        return prompt
    # torchrl's parts are TensorClasses.
    plain = [
        {**message, "content": [part.to_dict() if is_tensor_collection(part) else part for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    bare, images = take_images("the chat's", plain, prompt.images)
    return Prompt("history", bare, tuple(images))


def _has_image(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if not isinstance(content, list):
        return False
    kinds = [part.get("type") if isinstance(part, Mapping) else getattr(part, "type", None) for part in content]
    return not {*IMAGE_TYPES}.isdisjoint(kinds)


def _value_at(label: str, row: TensorDictBase, key: NestedKey, argument: str) -> Any:
    """Return what a row has at a key; ``argument`` says where the key was given."""
    value = row.get(key)
    if value is None:
        raise MissingKeyError(
            f"{label}: no {key!r}; it has {sorted(map(str, leaf_keys(row)))}: add it, or change {argument}"
        )
    return value


def leaf_keys(row: TensorDictBase) -> list[NestedKey]:
    """Return the keys of a row's leaves, those that are no tensors included."""
    return list(row.keys(True, True, is_leaf=is_leaf_nontensor))


def keys_in(row: TensorDictBase, keys: Sequence[NestedKey]) -> list[NestedKey]:
    """Return keys, nested ones for names with dots where a row has them; see `name_of`."""
    names = {name_of(key): key for key in leaf_keys(row)}
    return [names.get(key, key) if isinstance(key, str) else key for key in keys]


def image_keys(name: str, keys: Sequence[NestedKey] | None) -> tuple[NestedKey, ...]:
    """Return keys of images as the argument of this name has them.

    Raises:
        InputTypeError: a single key, whose letters would be taken for keys.
    """
    if isinstance(keys, str):
        raise InputTypeError(f"{name}={keys!r:.80} is a string; expected a list of keys: {name}=[{keys!r:.80}]")
    return () if keys is None else tuple(map(unravel_key, keys))


def name_of(key: NestedKey) -> str:
    """Return the field of a format string that stands for a key."""
    return key if isinstance(key, str) else ".".join(key)


def value_of(value: Any) -> Any:
    """Return what is in a leaf: a tensor as it is, or what its NonTensorData holds."""
    return value.data if is_non_tensor(value) else value


def _prompt_of(found: Any) -> Prompt:
    """Read what a prompt function returned."""
    if isinstance(found, str):
        return Prompt("text", found)
    if isinstance(found, History):
        return Prompt("history", found)
    if isinstance(found, (torch.Tensor, np.ndarray)):
        found = found.tolist()
    if isinstance(found, Iterable) and not isinstance(found, (bytes, Mapping)):
        parts = list(found)
        if not parts:
            raise PromptLengthError("an empty list, 0 messages or token ids; expected at least 1")
        if all(isinstance(part, Mapping) for part in parts):
            return Prompt("history", parts)
        if all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
            return Prompt("tokens", parts)
    raise InputTypeError(
        f"the prompt function returned {found!r:.80}, a {type(found).__name__}; expected a text, a chat (messages or a "
        "History) or a list of token ids"
    )


# --- format strings ---------------------------------------------------------------------------------------------------


def _fields_of(source: str) -> list[str]:
    """Return the replacement fields of a format string."""
    try:
        return [field for _, field, _, _ in string.Formatter().parse(source) if field is not None]
    except ValueError as error:
        raise InputError(f"prompt={source!r:.80}: {error}; write a brace that belongs to the text twice") from error


def _name_in(field: str, names: Iterable[str]) -> str | None:
    """Return the name that a replacement field such as ``agents.position[0]`` begins with."""
    fits = [name for name in names if field == name or field.startswith((f"{name}.", f"{name}["))]
    return max(fits, key=len, default=None)


class _Formatter(string.Formatter):
    """Formats with values by names that may have dots; a tensor is written as its numbers."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = _name_in(field_name, kwargs)
        if name is None:  # inside a format spec, such as {observation:{width}}
            raise InputError(f"the field {field_name!r} is none of in_keys; name one of {sorted(kwargs)}")
        value = kwargs[name]
        if isinstance(value, torch.Tensor):
            value = _numbers(name, value)
        return super().get_field(f"value{field_name[len(name) :]}", (), {"value": value})


class _Numbers(list[Any]):
    """Numbers that are written as the model should read them: a single one bare, a format applied to each."""

    def __format__(self, spec: str) -> str:
        parts = [format(part, spec) for part in self]
        return parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"


def _numbers(name: str, value: torch.Tensor) -> Any:
    """Return a tensor as a number or as nested `_Numbers`, floats with no more digits than their dtype has."""
    plain = value.detach().cpu()
    if plain.is_floating_point() and bool(plain.isnan().any()):
        raise InputError(f"{name!r} is {value!r:.80}; expected numbers: mend the environment, or use a prompt function")
    return _nested(plain.float().numpy() if plain.dtype == torch.bfloat16 else plain.numpy())


def _nested(array: Any) -> Any:
    if array.ndim:
        return _Numbers(_nested(part) for part in array)
    # str, and not item: item turns the float32 0.1 into 0.10000000149011612.
    return float(str(array[()])) if array.dtype.kind == "f" else array.item()
