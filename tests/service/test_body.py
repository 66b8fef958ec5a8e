"""Bodies of requests for vectors: what each field asks for, and what is refused by name, value and limit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchrl_sglang_hidden import HiddenSpec, InputError, InputTypeError, PromptLengthError, UnknownOptionError
from torchrl_sglang_hidden.service.body import ENCODINGS, VectorRequest, read_body
from torchrl_sglang_hidden.sglang_api.sampling import RECORDS

PROMPT = HiddenSpec(("prompt",))
READS = {"max_new_tokens": 0}
CHAT = [{"role": "user", "content": "hi"}]


def read(**fields: Any) -> VectorRequest:
    return read_body(json.dumps({"input": "hi", **fields}).encode())


def test_a_text_alone_asks_for_the_mean_of_its_prompt_at_the_last_layer() -> None:
    assert read() == VectorRequest(("hi",), PROMPT, READS, encoding="float")


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ("hi", ("hi",)),
        (["hi", "ho"], ("hi", "ho")),
        ([5, 6], ([5, 6],)),
        ([[5, 6], [7]], ([5, 6], [7])),
        (CHAT, (CHAT,)),
        ([CHAT, CHAT], (CHAT, CHAT)),
        (["hi", [5, 6], CHAT], ("hi", [5, 6], CHAT)),
    ],
)
def test_every_form_of_input(given: Any, rows: tuple[Any, ...]) -> None:
    assert read(input=given).rows == rows


def test_every_field_has_its_place() -> None:
    found = read(
        model="m",
        segments=["full", "response"],
        pooling="max",
        layers=[7, -1],
        max_new_tokens=3,
        sampling_params={"temperature": 0.5, "stop": ["x"], "top_k": None},
        lora_path="a",
        priority=2,
        encoding_format="bytes",
    )
    assert found == VectorRequest(
        rows=("hi",),
        hidden=HiddenSpec(("full", "response"), "max", (7, -1)),
        sampling={"max_new_tokens": 3, "temperature": 0.5, "stop": ["x"]},
        lora="a",
        priority=2,
        encoding="bytes",
        model="m",
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_body_says_how_vectors_come_back_or_else_the_header(encoding: Any) -> None:
    assert read_body(b'{"input": "hi"}', encoding).encoding == encoding
    for said in ENCODINGS:
        assert read_body(json.dumps({"input": "hi", "encoding_format": said}).encode(), encoding).encoding == said


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"inputs": "a"}, UnknownOptionError, ["'inputs'", "did you mean 'input'?"]),
        ({"dimensions": 64}, UnknownOptionError, ["'dimensions'", "known: input, images, model, segments"]),
        ({"temperature": 0}, UnknownOptionError, ["'temperature'", "put it into sampling_params"]),
        ({"image": ["a"]}, InputError, ["image:", "parts of messages", "data URIs for each row"]),
        ({"image_data": "a"}, InputError, ["image_data:", "leave other media out"]),
        ({"images": "a"}, InputTypeError, ["images='a'", "a list of data URIs for each row"]),
        ({"images": [5]}, InputTypeError, ["images, row 0: 5", "a list of data URIs"]),
        ({"images": [[], []]}, InputError, ["2 lists for 1 rows", "one for each"]),
        ({"images": None}, InputTypeError, ["images is null"]),
        ({"input": []}, PromptLengthError, ["0 rows", "at least 1"]),
        ({"input": 5}, InputTypeError, ["input=5", "expected a text"]),
        ({"input": {"role": "user"}}, InputTypeError, ["dict", "expected a text"]),
        ({"model": 5}, InputTypeError, ["model=5"]),
        ({"pooling": None}, InputTypeError, ["pooling is null", "leave the field out"]),
        ({"pooling": "median"}, InputError, ["'median'", "'mean'", "'last'", "'max'", "'sum'"]),
        ({"segments": "prompt"}, InputTypeError, ["'prompt'", "tuple of names"]),
        ({"segments": ["answer"]}, InputError, ["'answer'", "'response'"]),
        ({"segments": []}, InputError, ["segments=()", "one or more"]),
        ({"layers": "all"}, InputTypeError, ["'all'", "an integer"]),
        ({"layers": [-1, -1]}, InputError, ["(-1, -1)", "each once"]),
        ({"layers": True}, InputTypeError, ["True", "an integer"]),
        ({"max_new_tokens": -1}, InputError, ["max_new_tokens=-1", "at least 0"]),
        ({"max_new_tokens": "8"}, InputTypeError, ["max_new_tokens='8'", "an integer"]),
        ({"sampling_params": [1]}, InputTypeError, ["[1]", "expected an object"]),
        ({"sampling_params": {"temperature": 0}}, InputError, ["['temperature']", "raise max_new_tokens"]),
        ({"max_new_tokens": 1, "sampling_params": {"temprature": 0}}, UnknownOptionError, ["'temperature'?"]),
        ({"max_new_tokens": 1, "sampling_params": {"top_p": 2}}, InputError, ["top_p=2", "(0, 1]"]),
        ({"max_new_tokens": 1, "sampling_params": {"max_tokens": 5}}, UnknownOptionError, ["['max_new_tokens']"]),
        ({"max_new_tokens": 1, "sampling_params": {"lora_path": "a"}}, UnknownOptionError, ["['lora_path']"]),
        ({"max_new_tokens": 1, "sampling_params": {"n": 2}}, UnknownOptionError, ["['num_return_sequences']"]),
        ({"max_new_tokens": 1, "sampling_params": {"custom_params": {}}}, UnknownOptionError, ["['custom_params']"]),
        ({"lora_path": 5}, InputTypeError, ["lora_path=5", "a non-empty string"]),
        ({"priority": 2**63}, InputError, [f"priority={2**63}", "64 bits"]),
        ({"encoding_format": "base64"}, InputError, ["'base64'", "('float', 'bytes')"]),
        ({"encoding_format": {}}, InputError, ["{}", "('float', 'bytes')"]),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        read(**fields)
    assert type(caught.value) is error
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("record", sorted(RECORDS))
def test_what_this_route_does_not_return_cannot_be_asked_for(record: str) -> None:
    with pytest.raises(UnknownOptionError, match=record):
        read(max_new_tokens=1, sampling_params={record: True})


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", InputError, "no JSON"),
        (b"input=hi", InputError, "no JSON"),
        (b'{"input": "\xff"}', InputError, "no JSON"),
        (b'"hi"', InputTypeError, "the body is a str; expected an object"),
        (b"{}", InputError, "no 'input'; give a text"),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", InputError, "nested too deeply"),
        (b'{"input": ["hi"], "layers": ' + b"[" * 900 + b"]" * 900 + b"}", InputError, "nested|an integer"),
    ],
    ids=["empty", "form", "latin", "text", "object", "deep", "deep-layers"],
)
def test_what_is_no_such_body(data: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_body(data)
