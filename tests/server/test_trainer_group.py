"""The process group of a trainer, which may be gone: nothing waits for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from torchrl_sglang_hidden.protocol.update_lease import GROUP_PREFIX
from torchrl_sglang_hidden.server import trainer_group
from torchrl_sglang_hidden.server.trainer_group import around_join, around_receive

OURS = f"{GROUP_PREFIX}a"
SOON_S = 5.0


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


def join_as(group: str, port: int, original: Any = None, *, offset: int = 1, size: int = 2) -> tuple[bool, str]:
    """Have a server join the group of a trainer at a port, by what joins it; return what it answers."""
    original = original or (lambda *args: (True, "joined"))
    return around_join(original, None, "127.0.0.1", port, offset, size, group, "gloo")


def test_a_strangers_trainer_may_listen_later(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    monkeypatch.setattr(trainer_group, "_JOIN_S", 0.2)
    assert not join_as("somebody else's", port, lambda *args: pytest.fail("joined"))[0]
    monkeypatch.setattr(trainer_group, "_JOIN_S", 30.0)
    late: list[socket.socket] = []
    threading.Timer(0.2, lambda: late.append(socket.create_server(("127.0.0.1", port)))).start()
    assert join_as("somebody else's", port) == (True, "joined")
    late[0].close()


def test_a_trainer_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    """torch's store waits for such a one for good, and not for its timeout."""
    monkeypatch.setattr(trainer_group, "_JOIN_S", 1.0)
    ended: list[str] = []

    def join(updater: Any, address: str, port: int, *args: Any) -> tuple[bool, str]:
        try:
            TCPStore(address, port, 2, False, timeout=timedelta(seconds=0.1))
        except RuntimeError as error:
            ended.append(str(error))
        return True, ""

    began = time.monotonic()
    success, message = join_as("somebody else's", listener.getsockname()[1], join)
    assert not success
    assert 'did not form the group "somebody else\'s" within 1 s; start all its 2 ranks' in message
    assert 0.9 < time.monotonic() - began < 20.0
    assert ended == []
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "join-update-group")
    assert thread.daemon, "the process must not wait for it"
    listener.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
    thread.join(SOON_S)
    assert len(ended) == 1, "it was the silent trainer that it waited for"


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (-1, 2), (2, 2), (1, 1), (1, 65537), (2**70, 2**71)])
def test_ranks_that_are_none(offset: int, size: int) -> None:
    success, message = join_as("a", 1, lambda *args: pytest.fail("joined"), offset=offset, size=size)
    assert not success
    assert f"rank_offset={offset}, world_size={size}: rank 0 is the trainer's, and a group has at most 65536" in message


@pytest.mark.parametrize("port", [-1, 65536, 10**12])
def test_ports_that_are_none(port: int) -> None:
    success, message = join_as(OURS, port, lambda *args: pytest.fail("joined"))
    assert not success
    assert f"nothing listens at 127.0.0.1:{port}" in message


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
