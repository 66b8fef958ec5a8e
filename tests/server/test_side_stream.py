"""The side stream of a device, with streams and events that note what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden.reduce.reducers import reducer_of
from torchrl_sglang_hidden.server import side_stream
from torchrl_sglang_hidden.server.side_stream import SideStream, side_stream_of
from torchrl_sglang_hidden.server.slots import Slots

DEVICE = torch.device("cuda", 0)


class FakeModule:
    """What is used of ``torch.cuda``."""

    def __init__(self) -> None:
        self.streams: list[torch.device] = []
        self.noted: list[str] = []

    def Stream(self, device: torch.device) -> object:
        self.streams.append(device)
        return object()

    def Event(self) -> Any:
        module = self

        class Event:
            def record(self) -> None:
                module.noted.append("record")

            def synchronize(self) -> None:
                module.noted.append("wait")

        return Event()

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModule]:
    module = FakeModule()
    side_stream_of.cache_clear()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    yield module
    side_stream_of.cache_clear()


def test_a_device_has_one_side_stream_whoever_asks(module: FakeModule) -> None:
    """Torch has 32 streams of a device, and hands them out in turn: SGLang's own would be among them."""
    for layers in range(40):
        Slots((layers,), reducer_of("mean")).mark(DEVICE)
    assert module.streams == [DEVICE]
    other = torch.device("cuda", 1)
    Slots((0,), reducer_of("mean")).mark(other)
    assert module.streams == [DEVICE, other]


def test_a_copy_is_waited_for_when_it_is_read(module: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []
    empty = torch.empty

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(side_stream.torch, "empty", make)
    landing = SideStream(DEVICE).land(torch.arange(6.0).view(2, 3))
    assert (pinned, module.noted) == ([True], ["record"])
    assert landing.wait().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert module.noted == ["record", "wait"]


def test_a_host_without_memory_to_pin_copies_all_the_same(module: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(side_stream.torch, "empty", no_memory)
    assert SideStream(DEVICE).land(torch.arange(6.0).view(2, 3)).wait().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert module.noted == [], "the copy is there already"
