"""Reads the body of a request for vectors: its fields, and what they ask of each prompt.

Knows nothing of HTTP, of tokenizers, or of what the server can do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torchrl_sglang_hidden.errors import InputError, InputTypeError, UnknownOptionError
from torchrl_sglang_hidden.service.image_prompts import split_images
from torchrl_sglang_hidden.service.prompts import split_rows
from torchrl_sglang_hidden.sglang_api.sampling import SGLANG_NAMES, standardize, to_sglang
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

__all__ = ["ENCODINGS", "Encoding", "VectorRequest", "read_body"]

Encoding = Literal["float", "bytes"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

_FIELDS = (
    "input", "images", "model", "segments", "pooling", "layers", "max_new_tokens", "sampling_params", "lora_path",
    "priority", "encoding_format",
)  # fmt: skip
# What other routes take for pictures and the like.
_MEDIA = ("image", "image_data", "image_url", "video", "video_data", "audio", "audio_data")
# Options of sampling, by the names that `standardize` gives them. The others have fields of their own, or none.
_SAMPLING = (SGLANG_NAMES | {"do_sample", "stop_sequences"}) - {"max_new_tokens", "custom_params"}


@dataclass(frozen=True, slots=True)
class VectorRequest:
    """What one request for vectors asks for.

    Args:
        rows: one prompt for each row, as it was sent: a text, token ids or messages.
        hidden: the states that come back.
        sampling: SGLang's sampling parameters; ``max_new_tokens=0`` reads the prompts and generates nothing.
        lora: the name of a LoRA adapter that the server has loaded, or None.
        priority: the place in the server's queue, or None.
        encoding: how the vectors come back: ``"float"`` as numbers in JSON, ``"bytes"`` as raw float32.
        model: the name of the model that is asked, or None for the one that is served.
        images: the data URIs that go with each row, as they were sent; empty where none go with any.
    """

    rows: tuple[Any, ...]
    hidden: HiddenSpec
    sampling: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    priority: int | None = None
    encoding: Encoding = "float"
    model: str | None = None
    images: tuple[tuple[Any, ...], ...] = ()


def read_body(data: bytes, encoding: Encoding = "float") -> VectorRequest:
    """Read the body of one request.

    Args:
        data: JSON, an object of the fields that ``docs/serving.md`` lists.
        encoding: how the vectors come back where the body does not say.

    Raises:
        InputError: no JSON, a field that is missing or has a value outside its limits.
        InputTypeError: a field of the wrong type.
        UnknownOptionError: an unknown field or sampling parameter.
    """
    try:
        return _read(_read_fields(data), encoding)
    except RecursionError as error:
        raise InputError(
            "the body is nested too deeply; send a text, token ids, messages, or a list of these"
        ) from error


def _read_fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise InputError(f'the body is no JSON ({error}); send an object such as {{"input": "a text"}}') from error
    if not isinstance(fields, dict):
        raise InputTypeError(f'the body is a {type(fields).__name__}; expected an object such as {{"input": "a text"}}')
    for name, value in fields.items():
        if name in _MEDIA:
            raise InputError(
                f"{name}: images go into the parts of messages, or into images, a list of data URIs for each row; "
                "leave other media out"
            )
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_FIELDS)}"
            hint = "put it into sampling_params" if name in _SAMPLING else hint
            raise UnknownOptionError(f"unknown field {name!r}: {hint}")
        if value is None:
            raise InputTypeError(f"{name} is null; give a value, or leave the field out for its default")
    if "input" not in fields:
        raise InputError("the body has no 'input'; give a text, token ids, messages, or a list of these")
    return fields


def _read(fields: Mapping[str, Any], encoding: Encoding) -> VectorRequest:
    encoding = fields.get("encoding_format", encoding)
    if encoding not in ENCODINGS:
        raise InputError(f"encoding_format={encoding!r:.80}: expected one of {ENCODINGS}")
    model = fields.get("model")
    if not isinstance(model, str | None):
        raise InputTypeError(f"model={model!r:.80}: expected the name of the served model, or leave it out")
    options = standardize({name: fields[name] for name in ("lora_path", "priority") if name in fields})
    rows = split_rows(fields["input"])
    return VectorRequest(
        rows=rows,
        hidden=HiddenSpec(
            segments=fields.get("segments", ("prompt",)),
            pooling=fields.get("pooling", "mean"),
            layers=fields.get("layers", -1),
        ),
        sampling=_read_sampling(fields.get("sampling_params", {}), fields.get("max_new_tokens", 0)),
        lora=options.get("lora_path"),
        priority=options.get("priority"),
        encoding=encoding,
        model=model,
        images=split_images(fields["images"], rows) if "images" in fields else (),
    )


def _read_sampling(given: object, max_new_tokens: object) -> dict[str, Any]:
    """Return SGLang's sampling parameters, checked by the same rules as a policy's."""
    if not isinstance(given, dict):
        raise InputTypeError(
            f"sampling_params={given!r:.80} is a {type(given).__name__}; expected an object such as "
            '{"temperature": 0}'
        )
    standard = standardize(given)
    foreign = sorted(standard.keys() - _SAMPLING)
    if foreign:
        raise UnknownOptionError(
            f"sampling_params has {foreign}, which are no sampling parameters of this route; leave them out: "
            "max_new_tokens, lora_path and priority are fields of the body"
        )
    sampling = standardize({**standard, "max_new_tokens": max_new_tokens})
    if standard and sampling["max_new_tokens"] == 0:
        raise InputError(
            f"sampling_params has {sorted(standard)} and max_new_tokens=0, which samples nothing; leave them out, or "
            "raise max_new_tokens"
        )
    return to_sglang(sampling)
