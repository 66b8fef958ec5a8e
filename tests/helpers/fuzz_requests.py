"""Targets of fuzzing: everything that reads what a client sends.

Each spoils a good request, reads it, and checks what comes out. In the server half an exception would end the server of
everybody, so that there even this package's own errors are none that may leave a reader.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from helpers.fake_engine import WORDS, make_info, tiny_tokenizer
from helpers.fake_scheduler import Req, Scheduler
from helpers.sample_requests import EVERY, MASKED, PROMPTS, TOP, asks, request, scores, spanned
from helpers.spoiling import Choices, spoil
from helpers.vector_site import Service
from helpers.word_processor import WordProcessor
from torchrl_sglang_hidden import HiddenSpec
from torchrl_sglang_hidden.errors import InputError, SGLangHiddenError
from torchrl_sglang_hidden.images.expansion import ImageProcessor
from torchrl_sglang_hidden.images.image_data import ImageData, read_image
from torchrl_sglang_hidden.protocol import CHANNEL, Options, unpack_options
from torchrl_sglang_hidden.protocol.update_lease import LOST_S, LeaseCall
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server.weight_routes import after_get_weights, after_model_path, read_adapters
from torchrl_sglang_hidden.service.body import VectorRequest, read_body
from torchrl_sglang_hidden.service.image_prompts import image_prompt
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    DisallowedTokens,
    ExponentialSchedule,
    LinearSchedule,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.constraints.base import ConstraintStep
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan


@functools.cache
def _custom_params() -> list[dict[str, Any]]:
    """Return what requests of every kind ask of the server half."""
    between = HiddenSpec(("response",), spans={"b": Between("w", "x", unclosed="end")})
    single = {"a": At("w"), "e": Each("w", "before", pooling="max"), "w": Window(1, 3), "n": Every(2, pooling=None)}
    requests = [
        request(HiddenSpec(("prompt", "full"), "max", layers=(0, -1), tokens=True)),
        spanned(tokens=True, dtype=torch.bfloat16),
        request(between, spans=dict(between.spans)),
        request(HiddenSpec(("response",), "last", spans=single), spans=single),
        asks(*MASKED, spec=TOP),
        asks(DisallowedTokens((3,), first_tokens=2), TemperatureScale(LinearSchedule(1.0, 0.5))),
        asks(spec=EVERY),
        scores(*MASKED, spec=PROMPTS),
    ]
    payload = to_payload(requests, make_info(), binary=False)
    return [params["custom_params"] for params in payload["sampling_params"]]


@functools.cache
def _scheduler() -> Scheduler:
    """Return one server for all: what a request leaves behind in it is there for the next."""
    return Scheduler()


def read_options(choices: Choices) -> None:
    """Read what a request asks of the server half, and do it for a prompt and a few tokens, as a scheduler would."""
    custom = spoil(choices.pick(_custom_params()), choices)
    found = unpack_options(custom)
    assert isinstance(found, Options | None)
    if found is None:
        return
    _check_wanted(found.wanted)
    _check_logits(found.logits)
    scheduler = _scheduler()
    req = Req([1, 2, 0, 2], custom=custom)
    scheduler.prefill(req)
    for _ in range(choices.below(3)):
        scheduler.decode(req)
    answer = scheduler.finish(req)
    assert answer is None or all(isinstance(one, dict) for one in answer)


def _check_wanted(wanted: Wanted) -> None:
    assert wanted.layers
    assert all(type(layer) is int for layer in wanted.layers)
    for name, span in wanted.spans.items():
        assert isinstance(name, str)
        match span:
            case PromptSpan(intervals):
                assert all(type(end) is int and end >= 0 for interval in intervals for end in interval)
            case LastTokens(count):
                assert type(count) is int
            case Between() | At() | Each():
                pass
            case Window(start, stop):
                assert 0 <= start < stop
            case Every(n):
                assert n >= 1
            case _:
                raise AssertionError(span)
    assert isinstance(wanted.tokens, bool)
    assert wanted.row_dtype in (torch.float32, torch.bfloat16, torch.float16)


def _check_logits(logits: WantedLogits) -> None:
    assert logits.prompt_from is None or (type(logits.prompt_from) is int and logits.prompt_from >= 1)
    assert type(logits.response_limit) is int
    assert all(isinstance(constraint, LogitConstraint) for constraint in logits.constraints)
    assert all(type(end) is int and end >= 0 for part in logits.response_ranges for end in part)


CONSTRAINTS = (
    ActionMask((3, 4, 5, 9)),
    ActionMask(range(1, 90, 2), positions=(0, 3)),
    DisallowedTokens((1, 7), first_tokens=3),
    TemperatureScale(0.5),
    TemperatureScale((1.0, 0.5)),
    TemperatureScale(LinearSchedule(1.0, 2.0, 5)),
    TemperatureScale(ExponentialSchedule(1.0, 2.0)),
)


def read_a_constraint(choices: Choices) -> None:
    """Read the text of a constraint, and constrain a few tokens with it."""
    name, _, fields = choices.pick(CONSTRAINTS).to_str().partition(":")
    changed = json.dumps(spoil(json.loads(fields), choices), default=str)
    text = choices.pick((f"{name}:{changed}", f"{name}{changed}", changed, spoil(f"{name}:{fields}", choices)))
    if not isinstance(text, str):
        return
    try:
        found = LogitConstraint.from_str(text)
    except InputError:
        return
    assert isinstance(found, LogitConstraint)
    assert LogitConstraint.from_str(found.to_str()) == found
    try:
        found.check(len(WORDS))
    except SGLangHiddenError:
        return
    for index in range(4):
        if found.acts_on(index):
            step = ConstraintStep(index, 8, (1, 2), torch.zeros(index, dtype=torch.int64))
            assert found.apply(torch.zeros(len(WORDS)), step).shape == (len(WORDS),)


BODIES: tuple[dict[str, Any], ...] = (
    {"input": "w1 w2"},
    {"input": ["w1", "w2 w3"], "segments": ["prompt", "response", "full"], "max_new_tokens": 3, "layers": [0, -1]},
    {"input": [5, 6, 7], "pooling": "max", "model": "tiny", "encoding_format": "bytes"},
    {"input": [[5, 6], [7]], "sampling_params": {"temperature": 0.5, "top_p": 0.9, "stop": ["x"]}, "max_new_tokens": 2},
    {"input": [{"role": "user", "content": "w3"}], "lora_path": None, "priority": 1},
    {"input": [[{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]], "priority": 3},
    {"input": "w1", "images": ["data:image/png;base64,AAAA"]},
)


def _body(choices: Choices) -> bytes:
    fields = spoil(choices.pick(BODIES), choices)
    data = json.dumps(fields, default=str, ensure_ascii=bool(choices.below(2))).encode("utf-8", "surrogatepass")
    place = choices.below(len(data) + 1)
    odd = choices.pick((b"", b",", b"\xff", b"\x00", b"[" * 3000, b"9" * 5000, b"NaN", b'{"input":'))
    return choices.pick((data, data, data, data[:place], data[:place] + odd + data[place:], odd + data, odd))


def read_the_body(choices: Choices) -> None:
    """Read the body of a request for vectors."""
    try:
        found = read_body(_body(choices))
    except InputError:
        return
    assert isinstance(found, VectorRequest)
    assert found.rows
    assert isinstance(found.hidden, HiddenSpec)
    assert found.encoding in ("float", "bytes")
    assert isinstance(found.model, str | None)
    assert isinstance(found.lora, str | None)


@functools.cache
def _service() -> Service:
    return Service()


def ask_for_vectors(choices: Choices) -> None:
    """Answer a request for vectors over HTTP: with vectors, or with a status of the 400s and what is wrong."""
    header = choices.pick(("application/json", "application/json; charset=x", "text/plain", ""))
    response = _service().send(content=_body(choices), headers={"content-type": header})
    assert response.status_code in (200, 400, 415), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@functools.cache
def _files() -> list[bytes]:
    """Return small files of every kind of image."""
    found = []
    for mode in ("RGB", "L", "RGBA", "P"):
        image = Image.new("RGB", (5, 3), (200, 30, 9)).convert(mode)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind)
            except (OSError, ValueError):  # not every kind has every mode
                continue
            found.append(buffer.getvalue())
    return found


def read_a_picture(choices: Choices) -> None:
    """Read a file of an image, as bytes and as a data URI."""
    data = bytearray(choices.pick(_files()))
    for _ in range(1 + choices.below(4)):
        place = choices.below(len(data) + 1)
        match choices.below(5):
            case 0:
                del data[place:]
            case 1:
                data[place : place + 4] = choices.pick(
                    (b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x00\x10\x00\x00")
                )
            case 2:
                data[place:place] = bytes(data[: choices.below(32)])
            case _:
                data[place : place + 1] = bytes([choices.below(256)])
    text = base64.b64encode(data).decode()
    uri = (
        choices.pick(("data:image/png;base64,", "data:image/x;base64,", "data:image/png,", "data:,", "data:image/"))
        + text
    )
    value: Any = choices.pick((bytes(data), uri, spoil(uri, choices)))
    if isinstance(value, str) and not value.startswith("data:"):
        return  # a path, which is the user's own
    try:
        found = read_image("x", value)
    except InputError:
        return
    assert isinstance(found, ImageData)
    assert found.open().mode == "RGB"


@functools.cache
def _processor() -> ImageProcessor:
    return ImageProcessor(WordProcessor(tiny_tokenizer()), "m", takes_images=True, max_images=2)


def read_an_image_prompt(choices: Choices) -> None:
    """Read a prompt with images, as the vector service does."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    place = WORDS[-1]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "w1"}]
    good: list[Any] = choices.pick(
        (
            [f"w1 {place} w2", [uri]],
            [[6, 95, 7], [uri]],
            [[{"role": "user", "content": parts}], []],
            [[{"role": "user", "content": [{"type": "image", "image": uri}]}], []],
        )
    )
    row, images = (spoil(good, choices), [])[:2] if choices.below(4) == 0 else (spoil(good[0], choices), good[1])
    try:
        ids, found = image_prompt(0, row, images, _processor())
    except SGLangHiddenError:
        return
    assert isinstance(ids, tuple)
    assert found is None or len(found.data) == len(found.ranges)


async def _nothing() -> None:
    return None


def _check_lease(name: str) -> None:
    found = LeaseCall.unpack(name)
    if found is not None:
        assert found.step in ("take", "hold", "give_back")
        assert isinstance(found.holder, str)
        assert isinstance(found.version, str)
        assert 0 <= found.hold_s <= LOST_S
        assert LeaseCall.unpack(found.pack()) == found


def call_weight_routes(choices: Choices) -> None:
    """Call SGLang's routes for weights with any names, paths and options."""
    name, path, options = (spoil(good, choices) for good in ("lm_head.weight", "/models/m", {"load_config": None}))
    prefix, word, fields = LeaseCall("hold", "7f", "v8", 2.5).pack().partition("lease:")
    changed = json.dumps(spoil(json.loads(fields), choices), default=str)
    _check_lease(f"{prefix}{word}{choices.pick((changed, spoil(fields, choices)))}")
    coroutine = _nothing()
    if isinstance(name, str) and name not in (CHANNEL, "torchrl_sglang_hidden:drain"):
        assert after_get_weights(coroutine, SimpleNamespace(), SimpleNamespace(name=name)) is None
    coroutine.close()
    if isinstance(path, str):
        after_model_path(None, SimpleNamespace(), path, "auto")
    if isinstance(options, dict) and options.get("load_config") is None:
        assert read_adapters(options) is options


REQUESTS: dict[str, Callable[[Choices], None]] = {
    "options": read_options,
    "constraint": read_a_constraint,
    "body": read_the_body,
    "service": ask_for_vectors,
    "picture": read_a_picture,
    "image_prompt": read_an_image_prompt,
    "weight_routes": call_weight_routes,
}
