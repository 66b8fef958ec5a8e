"""Pushing heads: what is checked before anything is sent, and the call that travels."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import heads_oracle
from helpers.fake_engine import HIDDEN_SIZE, NUM_LAYERS, RecordingEngine, make_info

from torchrl_sglang_hidden import (
    CapabilityError,
    Engine,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
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
from torchrl_sglang_hidden.weights.heads import HeadServer, PushedHeads

HEAD = heads_oracle.make_head("mlp", HIDDEN_SIZE, normalize="rms")


class Taking(RecordingEngine):
    """Takes heads as two servers do."""

    def __init__(self, answer: dict[str, Any] | None = None, **info: Any) -> None:
        super().__init__(**info)
        self.calls: list[HeadCall] = []
        self.answer_of_call = answer or {"success": True, "message": ""}
        self.heads = PushedHeads([HeadServer(name, lambda: self.info, self.call) for name in ("one", "two")])

    def call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        assert route == "get_weights_by_name"
        assert HeadCall.is_packed(payload["name"])
        self.calls.append(HeadCall.unpack(payload["name"]))
        return self.answer_of_call

    def _pushed_heads(self) -> PushedHeads:
        return self.heads


class Site:
    """A server that keeps heads as the server half does, and fails the calls that it is told to, by their number.

    Attributes:
        heads: what it has, by name: version and file.
        failures: what its next calls raise, before they change anything or after; None for nothing.
    """

    def __init__(self, name: str, **info: Any) -> None:
        self.name, self.info = name, make_info(**info)
        self.heads: dict[str, tuple[str, bytes]] = {}
        self.failures: list[tuple[str, BaseException] | None] = []
        self.count = 0

    def call(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        when, error = (self.failures.pop(0) if self.failures else None) or ("never", None)
        if error is not None and when == "before":
            raise error
        call = HeadCall.unpack(payload["name"])
        if call.data:
            self.heads[call.name] = call.version, call.data
        elif self.heads.pop(call.name, None) is None:
            raise RequestRejectedError(f"{self.name} answered 400: the server has no head {call.name!r}")
        if error is not None:
            raise error
        return {"success": True, "message": ""}


def _call(site: Site, route: str, payload: dict[str, Any]) -> dict[str, Any]:
    return site.call(route, payload)


def sites_of(count: int = 3) -> tuple[list[Site], PushedHeads]:
    sites = [Site(f"http://s{number}") for number in range(count)]
    return sites, PushedHeads(
        [HeadServer(site.name, partial(getattr, site, "info"), partial(_call, site)) for site in sites]
    )


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


OTHER = heads_oracle.make_head("mlp", HIDDEN_SIZE, seed=5)
REFUSED = RequestRejectedError("no room; drop one")
GONE = EngineUnreachableError("went away while answering; look at the server's log")
LATE = EngineTimeoutError("did not answer in time; raise read_timeout_s")
BROKEN = EngineError("answered 500: broken; look at the server's log")


@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(("when", "error"), [("before", REFUSED), ("before", GONE), ("after", GONE), ("after", BROKEN)])
def test_all_servers_take_a_head_or_none(before: str | None, failing: int, when: str, error: EngineError) -> None:
    """Also where one took the head, and its answer did not come."""
    sites, heads = sites_of()
    if before is not None:
        heads.push("h", OTHER, before)
    sites[failing].failures = [(when, error)]
    had = "no head of that name" if before is None else "version '1'"
    words = (
        rf"http://s{failing} did not take head 'h' of version '2': {error}\. The servers have what they had of .*{had}"
    )
    with pytest.raises(type(error), match=words) as caught:
        heads.push("h", HEAD, "2")
    assert caught.value.__cause__ is error
    assert [site.heads for site in sites] == [{} if before is None else {"h": ("1", OTHER.to_bytes())}] * 3
    heads.push("h", HEAD, "2")
    assert [site.heads["h"][0] for site in sites] == ["2"] * 3


def test_what_each_server_has_where_one_cannot_be_put_back() -> None:
    sites, heads = sites_of()
    heads.push("h", OTHER, "1")
    sites[0].failures = [None, ("before", GONE)]
    sites[1].failures = [None, ("before", REFUSED)]
    sites[2].failures = [("before", REFUSED)]
    words = (
        r"http://s2 did not take head 'h' of version '2': no room.* Not all servers could be put back: "
        r"http://s0 has version '2' or what it had \(went away.*\); http://s1 has version '2' \(no room.*\); "
        r"http://s2 has version '1'; push it again, or drop it"
    )
    with pytest.raises(RequestRejectedError, match=words):
        heads.push("h", HEAD, "2")
    # The servers were put back in thought: who comes back gets what the others have.
    heads.push_again("http://s0")
    assert sites[0].heads == {"h": ("1", OTHER.to_bytes())}


def test_a_server_that_hangs_does_not_hold_up_the_way_back() -> None:
    sites, heads = sites_of()
    sites[1].failures = [("after", LATE)]
    with pytest.raises(EngineTimeoutError, match=r"s0 has no head of that name; http://s1 has version '2' or what"):
        heads.push("h", HEAD, "2")
    assert [site.count for site in sites] == [2, 1, 0]
    assert sites[0].heads == {}


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_the_middle_of_a_push(when: str) -> None:
    """The server that it met may have the head; it may hang, and is not asked again."""
    sites, heads = sites_of()
    heads.push("h", OTHER, "1")
    sites[1].failures = [(when, KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt) as caught:
        heads.push("h", HEAD, "2")
    assert [site.heads["h"][0] for site in sites] == ["1", "1" if when == "before" else "2", "1"]
    assert caught.value.__notes__ == [
        "http://s1 did not take head 'h' of version '2': KeyboardInterrupt. Not all servers could be put back: "
        "http://s0 has version '1'; http://s1 has version '2' or what it had; http://s2 has version '1'; push it "
        "again, or drop it"
    ]
    (site,), heads = sites_of(1)
    site.failures = [(when, KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt) as caught:
        heads.push("h", HEAD, "2")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("does", ["push", "drop", "push_again"])
def test_two_threads_leave_all_servers_with_the_same_head(does: str) -> None:
    """The second begins when the first has reached one of the servers, and waits for it."""
    sites, heads = sites_of(2)
    heads.push("h", OTHER, "1")
    other = threading.Thread(target=heads.push, args=("h", HEAD, "2"), daemon=True)
    take = sites[1].call

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        if other.ident is None:
            other.start()
            other.join(timeout=0.2)  # without the lock it ends now
        return take(route, payload)

    sites[1].call = call  # type: ignore[method-assign]
    first: dict[str, Callable[[], object]] = {
        "push": lambda: heads.push("h", OTHER, "1"),
        "drop": lambda: heads.drop("h"),
        "push_again": lambda: heads.push_again("http://s1"),
    }
    first[does]()
    other.join()
    assert [site.heads for site in sites] == [{"h": ("2", HEAD.to_bytes())}] * 2


def test_one_server_alone_says_what_it_says() -> None:
    (site,), heads = sites_of(1)
    site.failures = [("before", REFUSED)]
    with pytest.raises(RequestRejectedError) as caught:
        heads.push("h", HEAD, "2")
    assert caught.value is REFUSED
    with pytest.raises(RequestRejectedError, match=r"^http://s0 answered 400: the server has no head 'h'$"):
        heads.drop("h")
    heads.push("h", HEAD, "2")
    assert (site.count, heads.kept.calls) == (3, {}), "nothing is kept where nothing is left out"


def test_a_head_that_one_of_several_servers_does_not_have() -> None:
    """Such as one that was started again: it keeps none of the others from dropping it."""
    sites, heads = sites_of()
    heads.push("h", HEAD, None)
    sites[1].heads.clear()
    words = r"^http://s1 did not drop head 'h': .*no head 'h'; every other server has dropped it"
    with pytest.raises(RequestRejectedError, match=words):
        heads.drop("h")
    assert [site.heads for site in sites] == [{}] * 3
    heads.push_again("http://s1")
    assert sites[1].heads == {}


def test_what_one_of_several_servers_cannot_serve_is_sent_to_none() -> None:
    for changes, said in (
        ({"layers": (-1, 0)}, r"reads layer 2, and http://s1 gives the states of \[-1, 0\]"),
        ({"pools_in_server": False}, r"which http://s1 does not have"),
    ):
        sites, heads = sites_of()
        sites[1].info = make_info(**changes)
        with pytest.raises(CapabilityError, match=said):
            heads.push("h", heads_oracle.make_head("linear", HIDDEN_SIZE, layer=2), None)
        assert [site.count for site in sites] == [0, 0, 0]


def test_a_server_that_came_back_without_the_server_half() -> None:
    sites, heads = sites_of()
    sites[1].info = make_info(pools_in_server=False)
    heads.push_again("http://s1")
    sites[1].info = make_info()
    heads.push("h", HEAD, None)
    sites[1].info = make_info(pools_in_server=False)
    with pytest.raises(CapabilityError, match="which http://s1 does not have"):
        heads.push_again("http://s1")


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
    assert SGLangServer._pushed_heads is not Engine._pushed_heads
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
