"""The status of a scheduler: what goes in comes out, and what lacks something is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchrl_sglang_hidden.errors import ProtocolError
from torchrl_sglang_hidden.protocol import (
    PROTOCOL,
    Status,
)

STATUS = Status(
    vocab_size=96, hidden_size=8, num_layers=4, context_length=64, layers=(0, -1), because="", normed=True, shared="",
    open_pools=0, prefix_bytes=0, constraints=("action_mask",), raw_log_probs=False,
    image_token_id=None,
)  # fmt: skip


@pytest.mark.parametrize("layers", [None, (), (0, 2, -1)])
def test_a_status_round_trip(layers: tuple[int, ...] | None) -> None:
    values = {**{name: getattr(STATUS, name) for name in Status.__slots__}, "layers": layers}
    status = Status(**values)
    assert Status.unpack(json.loads(json.dumps(status.pack()))) == status


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, "10"])
def test_a_status_of_another_protocol(protocol: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"{protocol!r} and this client {PROTOCOL}; install the same version"):
        Status.unpack({**STATUS.pack(), "protocol": protocol})


@pytest.mark.parametrize("gone", Status.__slots__)
def test_a_status_that_lacks_something(gone: str) -> None:
    fields = STATUS.pack()
    del fields[gone]
    with pytest.raises(ProtocolError, match=rf"lacks '{gone}'"):
        Status.unpack(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", "96"), ("vocab_size", -1), ("hidden_size", 8.0), ("num_layers", True), ("context_length", None),
        ("layers", 3), ("layers", "01"), ("layers", [0.0]), ("layers", [-2]), ("layers", [[0]]), ("layers", {}),
        ("because", None), ("normed", 1), ("shared", 7), ("shared", None), ("open_pools", "0"), ("prefix_bytes", []),
        ("constraints", None), ("constraints", [7]), ("constraints", [{}]), ("constraints", "ab"),
        ("raw_log_probs", None), ("image_token_id", -1), ("image_token_id", "9"), ("image_token_id", True),
    ],
)  # fmt: skip
def test_a_status_of_other_types(name: str, value: Any) -> None:
    """Each of these went on into the client, and failed there as a bare error."""
    with pytest.raises(ProtocolError, match=rf"has {name}=.*; use the same version"):
        Status.unpack({**STATUS.pack(), name: value})


def test_a_protocol_nested_without_end_is_shown_in_short() -> None:
    spoken: Any = 7
    for _ in range(900):
        spoken = [spoken]
    with pytest.raises(ProtocolError, match=r"protocol \[\[\[\[\[\[\.\.\.\]\]\]\]\]\] and this client"):
        Status.unpack({**STATUS.pack(), "protocol": spoken})
