"""The names of weight transports and of `running`: each does its own thing, and a name without a case does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from torchrl_sglang_hidden import CapabilityError
from torchrl_sglang_hidden.weights import transports
from torchrl_sglang_hidden.weights.control import running_requests
from torchrl_sglang_hidden.weights.network import NetworkPath
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
NETWORK = NetworkPath(host="127.0.0.1", port=1, server_info=dict, timeout_s=1.0)


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
    monkeypatch.setattr(transports, "broadcast", lambda *arguments, **options: found.append("network"))
    return found


@pytest.mark.parametrize("name", get_args(Transport))
def test_every_transport_is_resolved(name: Any) -> None:
    chosen = choose_transport(name, TENSORS, receiver())
    assert chosen in get_args(ChosenTransport)
    assert chosen == name or name == "auto"


@pytest.mark.parametrize("name", get_args(ChosenTransport))
def test_every_chosen_transport_sends_its_own_way(name: Any, sent: list[str]) -> None:
    send(name, update(), receiver())
    assert sent == [name]


def test_a_transport_without_a_case_sends_nothing(sent: list[str]) -> None:
    name: Any = "nccl"
    with pytest.raises(AssertionError, match="nccl"):
        choose_transport(name, TENSORS, receiver())
    with pytest.raises(AssertionError, match="nccl"):
        send(name, update(), receiver())
    assert sent == []


def test_transports_that_cannot_work_are_refused(sent: list[str]) -> None:
    in_process = receiver(network=None)
    assert choose_transport("auto", TENSORS, in_process) == "disk"
    with pytest.raises(CapabilityError, match=r"transport='network' is for servers, .*use transport='disk'"):
        choose_transport("network", TENSORS, in_process)
    with pytest.raises(CapabilityError, match=r"transport='disk' for a dict: http://x .*pass a directory"):
        choose_transport("disk", TENSORS, receiver(has_server_half=False))
    # What `choose_transport` would have refused, or `open_update` would have written.
    with pytest.raises(AssertionError, match="'network'"):
        send("network", update(), in_process)
    with pytest.raises(AssertionError, match="'disk'"):
        send("disk", update(directory=None), receiver())
    assert sent == []


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
