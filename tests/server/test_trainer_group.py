"""The process group of a trainer, which may be gone: nothing waits for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden.protocol.update_lease import GROUP_PREFIX
from torchrl_sglang_hidden.server import trainer_group
from torchrl_sglang_hidden.server.trainer_group import around_join, around_receive

OURS = f"{GROUP_PREFIX}a"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_group, "_ASK_S", 0.01)
    monkeypatch.setattr(trainer_group, "_trainers", {})


def join(listener: socket.socket, group: str = OURS, **backend: str) -> list[Any]:
    """Return what SGLang was asked to join."""
    joined: list[Any] = []

    def original(updater: Any, *arguments: Any) -> tuple[bool, str]:
        joined.append(arguments)
        return True, ""

    address, port = listener.getsockname()
    assert around_join(original, None, address, port, 1, 2, group, **backend)[0]
    return joined


def receive(original: Any, group: str = OURS) -> Any:
    updater = SimpleNamespace(_model_update_group={group: object()})
    return around_receive(original, updater, names=["a"], group_name=group)


def test_nothing_is_joined_where_nothing_listens(listener: socket.socket) -> None:
    address, port = listener.getsockname()
    assert join(listener, backend="gloo") == [(address, port, 1, 2, OURS, "gloo")]
    listener.close()
    success, message = around_join(lambda *_: (True, ""), None, address, port, 1, 2, OURS)
    assert not success
    assert f"nothing listens at 127.0.0.1:{port}" in message
    assert around_join(lambda *_: (True, ""), None, address, port, 1, 2, "somebody else's")[0]


@pytest.mark.parametrize(
    ("group", "backend"), [("somebody else's", {"backend": "gloo"}), (OURS, {"backend": "nccl"}), (OURS, {})]
)
def test_what_others_send_is_received_as_ever(listener: socket.socket, group: str, backend: dict[str, str]) -> None:
    join(listener, group, **backend)
    assert receive(lambda *_, **__: threading.current_thread(), group) is threading.current_thread()


def test_a_slow_trainer_is_waited_for(listener: socket.socket) -> None:
    join(listener, backend="gloo")

    def original(updater: Any, *, names: list[str], group_name: str) -> tuple[list[str], str]:
        for _ in range(2 * trainer_group._MISSES):
            listener.accept()  # asked, and there
        return names, group_name

    assert receive(original) == (["a"], OURS)


def test_what_went_wrong_is_told(listener: socket.socket) -> None:
    join(listener, backend="gloo")

    def original(updater: Any, **options: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        receive(original)


def test_a_trainer_that_is_gone_is_not_waited_for(listener: socket.socket) -> None:
    join(listener, backend="gloo")
    released = threading.Event()

    def original(updater: Any, **options: Any) -> None:
        listener.close()
        assert released.wait(60), "waited for a trainer that is gone"

    with pytest.raises(RuntimeError, match=r"the trainer is gone: nothing listens at 127\.0\.0\.1:\d+"):
        receive(original)
    released.set()
