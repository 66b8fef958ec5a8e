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


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4, 5, 6, 8, "7"])
def test_a_status_of_another_protocol(protocol: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"{protocol!r} and this client {PROTOCOL}; install the same version"):
        Status.unpack({**STATUS.pack(), "protocol": protocol})


@pytest.mark.parametrize("gone", Status.__slots__)
def test_a_status_that_lacks_something(gone: str) -> None:
    fields = STATUS.pack()
    del fields[gone]
    with pytest.raises(ProtocolError, match=rf"lacks '{gone}'"):
        Status.unpack(fields)
