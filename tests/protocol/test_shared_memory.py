"""Shared memory: what is written, fetched, bounded and removed. A directory of the test's stands in for tmpfs."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden.protocol import shared_memory
from torchrl_sglang_hidden.protocol.shared_memory import (
    MIN_BYTES,
    SharedFiles,
    discard,
    fetch,
    is_shared,
    remove_leftovers,
)

PREFIX = "torchrl_sglang_hidden"
DATA = bytes(range(256)) * (MIN_BYTES // 256)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that a test sets."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(shared_memory, "time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_what_is_shared_is_fetched_once(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    name = files.share(DATA)
    assert names(tmp_path) == {files.sign, name}
    assert fetch(name, len(DATA), tmp_path) == DATA
    assert names(tmp_path) == {files.sign}
    with pytest.raises(FileNotFoundError):
        fetch(name, len(DATA), tmp_path)


def test_every_answer_has_a_file_of_its_own_for_its_owner_only(tmp_path: Path) -> None:
    files, others = SharedFiles(tmp_path), SharedFiles(tmp_path)
    found = [files.share(DATA), files.share(DATA), others.share(DATA)]
    assert len({files.sign, others.sign, *found}) == 5
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_few_bytes_go_another_way(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    assert files.share(DATA[:-1]) is None
    assert names(tmp_path) == {files.sign}


def test_bytes_that_nobody_fetched_are_bounded(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path, max_bytes=2 * len(DATA))
    first, second = files.share(DATA), files.share(DATA)
    assert files.share(DATA) is None
    assert names(tmp_path) == {files.sign, first, second}
    fetch(first, len(DATA), tmp_path)
    third = files.share(DATA)
    assert names(tmp_path) == {files.sign, second, third}
    assert files.share(DATA) is None


def test_bytes_that_nobody_fetches_do_not_stay(tmp_path: Path, clock: SimpleNamespace) -> None:
    files = SharedFiles(tmp_path, max_bytes=2 * len(DATA), lifetime_s=60)
    old = files.share(DATA)
    clock.now += 59
    young = files.share(DATA)
    assert names(tmp_path) == {files.sign, old, young}
    clock.now += 2
    new = files.share(DATA)
    assert names(tmp_path) == {files.sign, young, new}


def test_what_nobody_fetches_goes_when_the_server_is_idle(tmp_path: Path, clock: SimpleNamespace) -> None:
    """`tidy` is called at each answer and status, also where nothing is shared any more."""
    files = SharedFiles(tmp_path, lifetime_s=60)
    files.tidy()
    fetched, old = files.share(DATA), files.share(DATA)
    fetch(fetched, len(DATA), tmp_path)
    clock.now += 59
    young = files.share(DATA)
    clock.now += 1
    files.tidy()
    assert names(tmp_path) == {files.sign, old, young}
    clock.now += 1
    files.tidy()
    assert names(tmp_path) == {files.sign, young}
    clock.now += 60
    files.tidy()
    assert names(tmp_path) == {files.sign}


def test_tidying_looks_at_no_more_files_than_it_removes(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler calls it at every answer."""
    files = SharedFiles(tmp_path, lifetime_s=60)
    old = files.share(DATA)
    clock.now += 61
    young = [files.share(DATA) for _ in range(2)]
    touched: list[str] = []
    for name in ("stat", "lstat", "unlink", "remove"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *args, real=real, **kw: (touched.append(str(path)), real(path, *args, **kw))
        )
    files.tidy()
    assert touched == []
    clock.now += 61
    files.tidy()
    assert touched == [str(tmp_path / name) for name in young]
    assert not (tmp_path / old).exists()


def test_a_file_that_cannot_be_removed_ends_no_server(tmp_path: Path, clock: SimpleNamespace) -> None:
    files = SharedFiles(tmp_path, lifetime_s=60)
    kept, gone = files.share(DATA), files.share(DATA)
    (tmp_path / kept).unlink()
    (tmp_path / kept).mkdir()
    assert names(tmp_path) == {files.sign, kept, gone}
    clock.now += 61
    files.tidy()
    assert names(tmp_path) == {files.sign, kept}


def test_nothing_is_written_where_memory_runs_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SharedFiles(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * len(DATA) - 1))
    assert files.share(DATA) is None
    assert names(tmp_path) == {files.sign}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SharedFiles(tmp_path)

    def no_space(descriptor: int, mode: str) -> Any:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", no_space)
        assert files.share(DATA) is None
    assert names(tmp_path) == {files.sign}
    assert fetch(files.share(DATA), len(DATA), tmp_path) == DATA


def test_close_removes_all(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    files.share(DATA)
    fetch(files.share(DATA), len(DATA), tmp_path)
    for _ in range(2):
        files.close()
        assert files.share(DATA) is None
        assert names(tmp_path) == set()


def test_a_server_that_ends_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles
files = SharedFiles(Path({str(tmp_path)!r}))
print(files.share(bytes(MIN_BYTES)), len(list(Path({str(tmp_path)!r}).iterdir())))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240).stdout
    assert said.split()[1:] == ["2"]
    assert said.startswith("torchrl_sglang_hidden-")
    assert names(tmp_path) == set()


KILLED = """
import os, signal, sys
from pathlib import Path
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles
files = SharedFiles(Path(sys.argv[1]))
files.share(bytes(MIN_BYTES))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_left_goes_with_the_next_one(tmp_path: Path) -> None:
    alive = SharedFiles(tmp_path)
    kept = {alive.sign, alive.share(DATA), "somebody-elses", f"x{alive.sign}"}
    for name in ("somebody-elses", f"x{alive.sign}"):
        (tmp_path / name).write_text("")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=240)
    assert len(names(tmp_path)) == len(kept) + 2
    files = SharedFiles(tmp_path)
    assert names(tmp_path) == kept | {files.sign}


def test_a_sweep_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"{PREFIX}-{'0' * 16}-here").write_text("left")
    (tmp_path / f"{PREFIX}-{'0' * 16}-3").write_text("left")
    with caplog.at_level("INFO"):
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path)
    assert caplog.messages == [f"a server that ended left 2 files in {tmp_path}; they are removed"]


def test_leftovers_go_when_somebody_says_so(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=240)
    assert len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_servers_that_start_at_once_leave_each_others_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after every step of one's start, another one removes leftovers."""
    steps, busy = [], []

    def others_start() -> None:
        if not busy:
            busy.append(True)
            steps.append(names(tmp_path))
            remove_leftovers(tmp_path)
            busy.clear()

    def between(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            others_start()
            try:
                return real(*args, **kwargs)
            finally:
                others_start()

        return step

    with monkeypatch.context() as patch:
        for module, name in ((os, "open"), (os, "fdopen"), (os, "link"), (os, "unlink"), (fcntl, "flock")):
            patch.setattr(module, name, between(getattr(module, name)))
        files = SharedFiles(tmp_path)
    assert set() in steps
    assert any(files.sign in step for step in steps)
    assert is_shared(files.sign, tmp_path)
    assert names(tmp_path) == {files.sign}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {files.sign}


@pytest.mark.parametrize("fails", ["fdopen", "link"])
def test_a_sign_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def failing(source: Any, *rest: Any) -> Any:
        if fails == "fdopen":
            os.close(source)
        raise OSError(28, "No space left on device")

    opened = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, failing)
        files = SharedFiles(tmp_path)
    assert (files.sign, files.share(DATA)) == ("", None)
    assert names(tmp_path) == set()
    assert len(os.listdir("/proc/self/fd")) == opened
    files.close()


def test_a_link_among_the_leftovers_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "torchrl_sglang_hidden-0123456789abcdef-here").symlink_to(tmp_path / "nothing")
    files = SharedFiles(tmp_path)
    assert is_shared(files.sign, tmp_path)


def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody on this machine guessed the name, and wants a file of ours overwritten."""
    monkeypatch.setattr(shared_memory.secrets, "token_hex", lambda size: "0123456789abcdef")
    (tmp_path / "shm").mkdir()
    ours, name = tmp_path / "ours", "torchrl_sglang_hidden-0123456789abcdef"
    ours.write_text("precious")
    files = SharedFiles(tmp_path / "shm")
    (tmp_path / "shm" / f"{name}-1").symlink_to(ours)
    assert files.share(DATA) is None
    (tmp_path / "shm" / f"{name}-here").unlink()
    (tmp_path / "shm" / f"{name}-here").symlink_to(ours)
    assert SharedFiles(tmp_path / "shm").sign == ""
    assert ours.read_text() == "precious"
    assert (tmp_path / "shm" / f"{name}-here").readlink() == ours
    assert names(tmp_path / "shm") == {f"{name}-here"}


def test_whoever_finds_the_sign_is_on_this_machine(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    assert is_shared(files.sign, tmp_path)
    (tmp_path / files.sign).write_text("another server's")
    assert not is_shared(files.sign, tmp_path)
    (tmp_path / files.sign).write_bytes(b"\xff\xfe")
    assert not is_shared(files.sign, tmp_path)
    files.close()
    assert not is_shared(files.sign, tmp_path)


def test_without_the_directory_nothing_is_shared(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path / "none")
    assert (files.sign, files.share(DATA)) == ("", None)
    assert not is_shared(files.sign, tmp_path)
    files.close()
    assert names(tmp_path) == set()


WITHOUT_LOCKS = """
import sys
import threading
from pathlib import Path
import torch  # has ways of its own around a missing fcntl
sys.modules["fcntl"] = None
from torchrl_sglang_hidden import connect
from torchrl_sglang_hidden.protocol.shared_memory import MIN_BYTES, SharedFiles, remove_leftovers
import torchrl_sglang_hidden.sglang_api.payload
directory = Path(sys.argv[1])
remove_leftovers(directory)
files = SharedFiles(directory)
print(repr(files.sign), files.share(bytes(MIN_BYTES)))
files.tidy()
files.close()
"""


def test_without_file_locks_nothing_is_shared_and_the_client_imports(tmp_path: Path) -> None:
    """As on Windows."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (said.stdout, said.returncode) == ("'' None\n", 0), said.stderr
    assert names(tmp_path) == set()


def test_what_is_not_wanted_is_discarded_unread(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    name, other = files.share(DATA), files.share(DATA)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "what no read finds")
    for _ in range(2):
        discard(name, tmp_path)
        assert names(tmp_path) == {files.sign, other}


def test_a_sign_is_no_data_and_data_no_sign(tmp_path: Path) -> None:
    files = SharedFiles(tmp_path)
    for take in (partial(fetch, size=4), discard):
        with pytest.raises(ValueError, match="is no file of shared states"):
            take(files.sign, directory=tmp_path)
    assert is_shared(files.sign, tmp_path)
    name = files.share(DATA)
    (tmp_path / name).write_text(name)
    assert not is_shared(name, tmp_path)


GOOD = f"torchrl_sglang_hidden-{'0' * 16}-1"


def put(path: Path, data: bytes = b"good", mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_the_name_that_the_next_ones_are_made_of_is_good(tmp_path: Path) -> None:
    put(tmp_path / GOOD)
    assert fetch(GOOD, 4, tmp_path) == b"good"


def test_a_name_that_another_user_took_ends_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SharedFiles(tmp_path)
    (tmp_path / files.sign.replace("here", "1")).write_text("theirs")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("the directory is sticky")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert files.share(DATA) is None
    assert files.share(DATA) is not None


@pytest.mark.parametrize(
    "name",
    ["", "secret", "../secret", f"../{GOOD}", f"{GOOD}/../../secret", f"/{GOOD}", f"{GOOD}\n", f"{GOOD}x", f"{GOOD}-1",
     GOOD.replace("000-", "00x-"), GOOD.replace("0" * 16, "0" * 15), GOOD.removesuffix("-1"), f"{GOOD[:-1]}\u0661",
     f"{GOOD[:-1]}here", f"{GOOD[:-1]}new", "."],
)  # fmt: skip
def test_other_names_are_not_read_nor_removed(tmp_path: Path, name: str) -> None:
    """The name comes from the network."""
    directory = tmp_path / "shm"
    directory.mkdir()
    for path in (tmp_path / "secret", tmp_path / GOOD, directory / "secret"):
        path.write_text(path.name)
    for take in (partial(fetch, size=4), discard):
        with pytest.raises(ValueError, match="is no file of shared states"):
            take(name, directory=directory)
    assert not is_shared(name, directory)
    assert names(tmp_path) == {"shm", "secret", GOOD}
    assert names(directory) == {"secret"}


@pytest.mark.parametrize("name", [None, 7, b"x", [], {}, "\ud800", "\x00", "x" * 10**6])
def test_what_is_no_name_is_no_file(tmp_path: Path, name: Any) -> None:
    for take in (partial(fetch, size=4), discard):
        with pytest.raises((TypeError, ValueError)):
            take(name, directory=tmp_path)


# What a stranger can put where a server's file is expected: everybody may write there.
TRAPS: dict[str, Callable[[Path, Path], Any]] = {
    "a link to a secret": lambda path, secret: path.symlink_to(secret),
    "a link to nowhere": lambda path, secret: path.symlink_to(secret.with_name("gone")),
    "a pipe at which one waits": lambda path, secret: os.mkfifo(path),
    "a directory": lambda path, secret: path.mkdir(),
    "a file of another size": lambda path, secret: put(path, b"goods"),
    "a file for all to read": lambda path, secret: put(path, mode=0o644),
    "a file for all to write": lambda path, secret: put(path, mode=0o602),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_no_trap_is_read(tmp_path: Path, trap: Callable[[Path, Path], Any]) -> None:
    directory, secret = tmp_path / "shm", put(tmp_path / "secret")
    directory.mkdir()
    trap(directory / GOOD, secret)
    with pytest.raises((OSError, ValueError)):
        fetch(GOOD, 4, directory)
    assert secret.read_bytes() == b"good"
    sign = GOOD.removesuffix("1") + "here"
    trap(directory / sign, secret)
    assert not is_shared(sign, directory)


def test_a_size_that_was_not_asked_for_takes_no_memory(tmp_path: Path) -> None:
    path = put(tmp_path / GOOD)
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=rf"has {2**40} bytes, expected 4"):
        fetch(GOOD, 4, tmp_path)
    assert not path.exists()


def test_another_users_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = put(tmp_path / GOOD).stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=rf"is of user {owner}, and this process of {owner + 1}"):
        fetch(GOOD, 4, tmp_path)


def test_files_are_written_in_one_thread_and_tidied_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finisher's thread writes, and the scheduler's tidies at each answer: an exception there ends the server."""
    monkeypatch.setattr(shared_memory, "MIN_BYTES", 1)
    files, failures, stop = SharedFiles(tmp_path, lifetime_s=0.01), list[Exception](), threading.Event()

    def tidy() -> None:
        try:
            while not stop.is_set():
                files.tidy()
        except (IndexError, RuntimeError) as error:  # what a thread raises is seen by nobody else
            failures.append(error)

    threads = [threading.Thread(target=tidy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1500):
            files.share(b"rows")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        files.close()
    assert failures == []
