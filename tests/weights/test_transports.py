"""The names of weight transports and of `running`: each does its own thing, and a name without a case does nothing."""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from torchrl_sglang_hidden import CapabilityError, EngineTimeoutError
from torchrl_sglang_hidden.engines.loop_thread import LoopThread
from torchrl_sglang_hidden.engines.offline import SGLangOffline
from torchrl_sglang_hidden.protocol.served_weights import DRAIN, NOT_FLUSHED, WAS_PAUSED
from torchrl_sglang_hidden.weights import network, transports
from torchrl_sglang_hidden.weights.control import drained, finish_update, running_requests
from torchrl_sglang_hidden.weights.network import NetworkPath, broadcast
from torchrl_sglang_hidden.weights.trainers import LazyWeights
from torchrl_sglang_hidden.weights.transports import (
    ChosenTransport,
    Receiver,
    WeightUpdate,
    choose_transport,
    open_update,
    send,
)
from torchrl_sglang_hidden.weights.validation import Running, Transport

TENSORS = {"a": torch.ones(2)}
NETWORK = NetworkPath(host="127.0.0.1", port=1, server_info=lambda: {"device": "cuda"}, timeout_s=1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine pass for one with a GPU and NCCL."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def receiver(**changes: Any) -> Receiver:
    settings: dict[str, Any] = {
        "name": "http://x", "call": lambda route, payload: {"success": True}, "has_server_half": True,
        "reads_local_files": True, "network": NETWORK,
    }  # fmt: skip
    return Receiver(**settings | changes)


def update(**changes: Any) -> WeightUpdate:
    settings: dict[str, Any] = {"tensors": TENSORS, "version": "7", "running": "finish", "directory": Path("/w")}
    return WeightUpdate(**settings | changes)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what was sent, by the name of the function that sent it."""
    found: list[str] = []
    monkeypatch.setattr(transports, "load_from_disk", lambda *arguments: found.append("disk"))
    ways = {"gloo": "network", "nccl": "nccl"}
    monkeypatch.setattr(transports, "broadcast", lambda *arguments, backend, **options: found.append(ways[backend]))
    return found


@pytest.mark.parametrize("name", get_args(Transport))
@pytest.mark.usefixtures("gpu")
def test_every_transport_is_resolved(name: Any) -> None:
    chosen = choose_transport(name, TENSORS, receiver())
    assert chosen in get_args(ChosenTransport)
    assert chosen == name or name == "auto"


@pytest.mark.parametrize("name", get_args(ChosenTransport))
def test_every_chosen_transport_sends_its_own_way(name: Any, sent: list[str]) -> None:
    send(name, update(), receiver())
    assert sent == [name]


def test_a_transport_without_a_case_sends_nothing(sent: list[str]) -> None:
    name: Any = "pigeon"
    with pytest.raises(AssertionError, match="pigeon"):
        choose_transport(name, TENSORS, receiver())
    with pytest.raises(AssertionError, match="pigeon"):
        send(name, update(), receiver())
    assert sent == []


def test_transports_that_cannot_work_are_refused(sent: list[str]) -> None:
    in_process = receiver(network=None)
    assert choose_transport("auto", TENSORS, in_process) == "disk"
    with pytest.raises(CapabilityError, match=r"transport='network' is for servers, .*use transport='disk'"):
        choose_transport("network", TENSORS, in_process)
    with pytest.raises(CapabilityError, match=r"transport='nccl' is for servers"):
        choose_transport("nccl", TENSORS, in_process)
    with pytest.raises(CapabilityError, match=r"transport='disk' for a dict: http://x .*pass a directory"):
        choose_transport("disk", TENSORS, receiver(has_server_half=False))
    # What `choose_transport` would have refused, or `open_update` would have written.
    with pytest.raises(AssertionError, match="'network'"):
        send("network", update(), in_process)
    with pytest.raises(AssertionError, match="'disk'"):
        send("disk", update(directory=None), receiver())
    assert sent == []


def test_nccl_needs_a_gpu_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CapabilityError, match=r"transport='nccl': this process has no CUDA device; use"):
        choose_transport("nccl", TENSORS, receiver())
    on_cpu = NetworkPath(host="127.0.0.1", port=1, server_info=lambda: {"device": "cpu"}, timeout_s=1.0)
    with pytest.raises(CapabilityError, match=r"transport='nccl': the server runs on 'cpu', without NCCL; use"):
        choose_transport("nccl", TENSORS, receiver(network=on_cpu))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "disk"),
        ({"reads_local_files": False}, "network"),
        ({"has_server_half": False}, "network"),
        ({"has_server_half": False, "network": None}, "disk"),
    ],
)
def test_auto_reads_from_disk_where_that_surely_works(changes: dict[str, Any], chosen: str) -> None:
    assert choose_transport("auto", TENSORS, receiver(**changes)) == chosen


def test_a_checkpoint_is_written_only_where_a_transport_reads_one(tmp_path: Path) -> None:
    with open_update(["network"], TENSORS, TENSORS, version="7", running="finish") as ready:
        assert ready.directory is None
    with open_update(["network", "disk"], tmp_path, TENSORS, version="7", running="finish") as ready:
        assert ready.directory == tmp_path
    assert tmp_path.is_dir()
    with open_update(["disk"], TENSORS, TENSORS, version="7", running="continue") as ready:
        written = ready.directory
        assert written is not None
        assert (written / "model.safetensors").is_file()
        assert (ready.version, ready.running) == ("7", "continue")
    assert not written.exists()


@pytest.mark.parametrize("name", get_args(Running))
def test_every_name_of_running_is_handled(name: Any) -> None:
    seen: list[str] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(route)
        return {"success": True}

    with running_requests(name, call):
        seen.append("update")
    expected = {"finish": ["update"], "continue": ["pause_generation", "update", "continue_generation"]}
    assert seen == expected[name]


def test_a_name_of_running_without_a_case_is_not_taken_for_another() -> None:
    name: Any = "abort"
    with pytest.raises(AssertionError, match="abort"):
        running_requests(name, lambda route, payload: {"success": True})


def test_buckets_need_a_server_that_lets_requests_end() -> None:
    calls: list[str] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        calls.append(route)
        return {"success": True}

    with pytest.raises(CapabilityError, match=r"2 buckets of 8 bytes, .*or a larger bucket_bytes"):
        broadcast(call, {"a": torch.ones(2), "b": torch.ones(2)}, "7", path=NETWORK, running="finish", bucket_bytes=8)
    assert calls == []


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_whatever_breaks_an_update_off_between_buckets_names_the_mixture(
    bucket: int, stops: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or a weight that the trainer has no memory to merge: requests go on, with a part of the new weights."""
    seen: list[tuple[str, Any]] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append((route, payload.get("new_version")))
        return {"success": True}

    def fail() -> torch.Tensor:
        raise stops

    names = ["a", "b", "c"]
    monkeypatch.setattr(network, "_group", lambda *arguments: nullcontext((None, "group")))
    monkeypatch.setattr(network, "_send_bucket", lambda *arguments: {"success": True})
    weights = LazyWeights(dict.fromkeys(names, torch.ones(2)), {names[bucket]: fail})
    with pytest.raises(type(stops)):
        broadcast(call, weights, "7", path=NETWORK, running="continue", bucket_bytes=8)
    named = [] if bucket == 0 else [("update_weight_version", "7-incomplete")]
    assert [step for step in seen if step[0] == "update_weight_version"] == named
    assert [route for route, _ in seen][-2:] == ["end_weight_update", "continue_generation"]


def test_an_interrupt_while_the_first_of_several_buckets_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[Any] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        versions.extend([payload["new_version"]] if route == "update_weight_version" else [])
        return {"success": True}

    def interrupted(*arguments: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(network, "_group", lambda *arguments: nullcontext((None, "group")))
    monkeypatch.setattr(network, "_send_bucket", interrupted)
    for bucket_bytes, expected in ((8, ["7-incomplete"]), (16, [])):
        versions.clear()
        weights = {"a": torch.ones(2), "b": torch.ones(2)}
        with pytest.raises(KeyboardInterrupt):
            broadcast(call, weights, "7", path=NETWORK, running="continue", bucket_bytes=bucket_bytes)
        assert versions == expected


def test_requests_are_drained_and_let_go_on() -> None:
    seen: list[tuple[str, Any]] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append((route, payload.get("name", payload.get("mode"))))
        return {"success": True}

    with pytest.raises(KeyError), drained(call):
        raise KeyError
    expected = [("get_weights_by_name", DRAIN), ("pause_generation", "retract"), ("continue_generation", None)]
    assert seen == expected


@pytest.mark.parametrize("flushed", [True, False])
def test_an_engine_that_somebody_paused_stays_paused(flushed: bool) -> None:
    seen: list[str] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(route)
        return {"success": True, "message": "", WAS_PAUSED: True}

    with drained(call) as was_paused:
        pass
    message = "" if flushed else NOT_FLUSHED
    finish_update(call, {"success": True, "message": message}, "7", "load", stays_paused=was_paused)
    flush = ["pause_generation", "flush_cache", "update_weight_version"]
    assert seen == ["get_weights_by_name", *([] if flushed else flush)]


class Inputs:
    """SGLang's classes of requests, which take seconds to import."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace


def test_the_engine_in_this_process_says_that_it_was_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang.srt.managers", SimpleNamespace(io_struct=Inputs()))

    async def get_weights_by_name(asked: Any) -> dict[str, Any]:
        return {"success": True, "message": "", WAS_PAUSED: asked.name == DRAIN}

    loop = asyncio.new_event_loop()
    offline = object.__new__(SGLangOffline)
    offline._loop = LoopThread(loop)
    offline.engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(get_weights_by_name=get_weights_by_name))
    with drained(offline._call) as was_paused:
        assert was_paused
    loop.close()


def test_a_drain_whose_answer_does_not_come_is_lifted() -> None:
    seen: list[str] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(route)
        if route == "get_weights_by_name":
            raise EngineTimeoutError("no answer")
        return {"success": True}

    with pytest.raises(EngineTimeoutError), drained(call):
        raise AssertionError("the block must not run")
    assert seen == ["get_weights_by_name", "continue_generation"]
