"""Pushing heads: what is checked before anything is sent, and the call that travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import heads_oracle
from helpers.fake_engine import HIDDEN_SIZE, NUM_LAYERS, RecordingEngine, make_info

from torchrl_sglang_hidden import (
    CapabilityError,
    Engine,
    Head,
    InputError,
    InputTypeError,
    ProtocolError,
    RequestRejectedError,
    WeightsError,
)
from torchrl_sglang_hidden.engines import BatchingEngine
from torchrl_sglang_hidden.engines.http import SGLangServer
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.server.weight_routes import after_get_weights
from torchrl_sglang_hidden.weights import heads

HEAD = heads_oracle.make_head("mlp", HIDDEN_SIZE, normalize="rms")


class Taking(RecordingEngine):
    """Takes heads as two servers do."""

    def __init__(self, answer: dict[str, Any] | None = None, **info: Any) -> None:
        super().__init__(**info)
        self.calls: list[HeadCall] = []
        self.answer_of_call = answer or {"success": True, "message": ""}

    def _control_calls(self) -> Any:
        def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
            assert route == "get_weights_by_name"
            assert HeadCall.is_packed(payload["name"])
            self.calls.append(HeadCall.unpack(payload["name"]))
            return self.answer_of_call

        return [call, call]


def test_a_head_goes_to_every_server(tmp_path: Path) -> None:
    engine = Taking()
    HEAD.save(tmp_path / "head.safetensors")
    versions = {engine.push_head("h", HEAD), BatchingEngine(engine).push_head("h", tmp_path / "head.safetensors")}
    (version,) = versions
    assert len(version) == 12, "named by its content"
    assert engine.push_head("h", heads_oracle.make_head("mlp", HIDDEN_SIZE, seed=1)) != version
    assert engine.push_head("h", str(tmp_path / "head.safetensors"), version="mine") == "mine"
    assert [call.version for call in engine.calls[::2]] == [call.version for call in engine.calls[1::2]]
    assert engine.calls[0] == HeadCall("h", version, HEAD.to_bytes())
    BatchingEngine(engine).drop_head("h")
    assert engine.calls[-2:] == [HeadCall("h")] * 2


def test_a_head_that_one_of_several_servers_does_not_have() -> None:
    """Such as one that was started again: it keeps none of the others from dropping it."""
    dropped: list[str] = []

    def server(name: str, has: bool) -> Any:
        def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
            dropped.extend([name] if has else [])
            return {"success": has, "message": "" if has else f"{name} has no head 'h'"}

        return call

    with pytest.raises(RequestRejectedError, match="refused to drop head 'h': b has no head 'h'"):
        heads.drop([server("a", True), server("b", False), server("c", True)], make_info(), "h")
    assert dropped == ["a", "c"]


def test_a_layer_that_counts_from_the_end() -> None:
    engine = Taking()
    engine.push_head("h", heads_oracle.make_head("linear", HIDDEN_SIZE, layer=-2))
    assert Head.from_bytes(engine.calls[0].data).layer == NUM_LAYERS - 2


@pytest.mark.parametrize(
    ("name", "head", "options", "error", "said"),
    [
        ("a b", HEAD, {}, InputError, "head name 'a b'"),
        (3, HEAD, {}, InputTypeError, "head name 3"),
        ("h", HEAD, {"version": " "}, InputTypeError, "version=' '"),
        ("h", HEAD, {"version": 2}, InputTypeError, "version=2"),
        ("h", object(), {}, InputTypeError, "expected a Head, or the path"),
        ("h", "/no/such/file", {}, WeightsError, "cannot be read"),
        ("h", heads_oracle.make_head("linear", 5), {}, WeightsError, "5 numbers, and the model's have 8"),
        ("h", heads_oracle.make_head("linear", HIDDEN_SIZE, layer=9), {}, InputError, "layers=9: the model has 4"),
        ("h", heads_oracle.make_head("linear", HIDDEN_SIZE, layer=3), {}, CapabilityError, r"layer 3, .* of \[-1, 0\]"),
    ],
)
def test_what_is_not_sent(name: Any, head: Any, options: Any, error: type[Exception], said: str) -> None:
    engine = Taking(layers=(-1, 0))
    with pytest.raises(error, match=said):
        engine.push_head(name, head, **options)
    assert engine.calls == []


def test_engines_that_take_none() -> None:
    stock = Taking(pools_in_server=False, no_states_because="a reason")
    for call in (lambda: stock.push_head("h", HEAD), lambda: stock.drop_head("h")):
        with pytest.raises(CapabilityError, match=r"heads run in the server half.* \(a reason\); start it with"):
            call()
    with pytest.raises(CapabilityError, match="RecordingEngine takes no heads; use SGLangServer"):
        RecordingEngine().push_head("h", HEAD)
    refusing = Taking({"success": False, "message": "no room"})
    with pytest.raises(RequestRejectedError, match="SGLang refused to take head 'h': no room"):
        refusing.push_head("h", HEAD)
    assert SGLangServer._control_calls is not Engine._control_calls
    assert make_info().pools_in_server


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda fields: fields.update(protocol=3), ProtocolError, "the client that pushes a head speaks protocol 3"),
        (lambda fields: fields.pop("protocol"), InputError, "cannot be read"),
        (lambda fields: fields.update(name="a b"), InputError, "head name"),
        (lambda fields: fields.update(version=1), InputError, "the version is 1"),
        (lambda fields: fields.update(version=""), InputError, "a head without a version"),
        (lambda fields: fields.update(data="%"), InputError, "cannot be read"),
        (lambda fields: fields.update(data=None), InputError, "cannot be read"),
    ],
)
def test_calls_that_cannot_be_read(change: Any, error: type[Exception], said: str) -> None:
    packed = HeadCall("h", "1", b"data").pack()
    prefix, fields = packed[: packed.index("{")], json.loads(packed[packed.index("{") :])
    change(fields)
    with pytest.raises(error, match=said):
        HeadCall.unpack(prefix + json.dumps(fields))
    with pytest.raises(InputError, match=r"use Engine\.push_head"):
        HeadCall.unpack(prefix + "[")


def test_the_tokenizer_manager_hands_a_call_on() -> None:
    import asyncio
    from types import SimpleNamespace

    async def control() -> list[float]:
        return []

    async def refused() -> list[float]:
        raise ValueError("no")

    call = SimpleNamespace(name=HeadCall("h").pack())
    assert asyncio.run(after_get_weights(control(), None, call)) == {"success": True, "message": ""}
    with pytest.raises(ValueError, match="no"):
        asyncio.run(after_get_weights(refused(), None, call))
