"""What servers leave on a machine is removed when they end, however they end; and nothing else is."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrl_sglang_hidden.protocol import server_files
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX
from torchrl_sglang_hidden.protocol.server_files import (
    FILES_ENV,
    ServerFiles,
    lock_directory,
    remove_files,
    sweep,
    sweep_checkpoints,
)

# Holds a file of each name in memory, in a session of its own, until its input ends.
HOLDS = """
import mmap, os, sys
held = []
for path in sys.argv[1:]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, 4096)
    held.append(mmap.mmap(descriptor, 4096))
    os.close(descriptor)
print("ready", flush=True)
sys.stdin.read()
"""
NAMES = ("sglang_loads_1234_ab.shm", "sem.mp-abc_12", "psm_12ab", "sgl_shm_kind_12_ab")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Shared memory, and the directory of temporary files."""
    memory, temporary = tmp_path / "memory", tmp_path / "tmp"
    memory.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(server_files, "SHARED_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return memory, temporary


class Session:
    """A process in a session of its own that has files in memory."""

    def __init__(self, *paths: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def held(places: tuple[Path, Path]) -> Iterator[Session]:
    session = Session(*(places[0] / name for name in (*NAMES, "data-of-a-user", "nccl-3")))
    yield session
    session.end()


def test_what_a_session_had_in_memory_goes_with_its_directory(places: tuple[Path, Path], held: Session) -> None:
    memory, temporary = places
    (memory / "sglang_loads_of_another_server.shm").touch()
    files = ServerFiles()
    (files.directory / "tmpsocket").touch()
    files.note(held.process.pid)
    files.note(held.process.pid)
    held.end()
    files.remove()
    assert {path.name for path in memory.iterdir()} == {
        "sglang_loads_of_another_server.shm",
        "data-of-a-user",
        "nccl-3",
    }
    assert list(temporary.iterdir()) == []
    files.remove()


def test_a_file_that_another_process_has_in_memory_stays(places: tuple[Path, Path], held: Session) -> None:
    memory, _ = places
    files = ServerFiles()
    files.note(held.process.pid)
    held.end()
    with (memory / NAMES[0]).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        files.remove()
    assert [path.name for path in memory.iterdir() if path.name in NAMES] == [NAMES[0]]


def test_a_session_that_is_about_to_be_killed_holds_nothing_back(places: tuple[Path, Path], held: Session) -> None:
    memory, _ = places
    files = ServerFiles()
    files.note(held.process.pid)
    remove_files(files.directory, session=held.process.pid)
    assert not any((memory / name).exists() for name in NAMES)


OWNS = """
import sys, tempfile
from pathlib import Path
from torchrl_sglang_hidden.protocol import server_files
server_files.SHARED_MEMORY = Path(sys.argv[1])
tempfile.tempdir = sys.argv[2]
files = server_files.ServerFiles()
files.note(int(sys.argv[3]))
print(files.directory, flush=True)
sys.stdin.read()
"""


def test_files_of_a_killed_owner_are_swept_and_those_of_a_living_one_stay(
    places: tuple[Path, Path], held: Session
) -> None:
    memory, temporary = places
    arguments = [sys.executable, "-c", OWNS, str(memory), str(temporary), str(held.process.pid)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        held.end()
        sweep()
        assert directory.is_dir()
        assert (memory / NAMES[0]).exists()
        owner.kill()
    sweep()
    assert not directory.exists()
    assert not any((memory / name).exists() for name in NAMES)


def test_a_list_is_not_believed(places: tuple[Path, Path], tmp_path: Path) -> None:
    """Whoever writes into the directory can have nothing removed that is not a file of the known names."""
    memory, temporary = places
    mine, other = tmp_path / "sglang_loads_mine.shm", memory / "data-of-a-user"
    mine.touch()
    other.touch()
    directory = temporary / "torchrl-sglang-hidden-server-left"
    directory.mkdir()
    (directory / "shared-memory").write_text(f"{mine}\n{other}\n{memory}/../sglang_loads_mine.shm\n")
    sweep()
    assert not directory.exists()
    assert mine.exists()
    assert other.exists()


def test_a_link_is_not_followed(places: tuple[Path, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (places[1] / "torchrl-sglang-hidden-server-link").symlink_to(elsewhere)
    sweep()
    assert elsewhere.is_dir()


def test_checkpoints_of_processes_that_have_ended(places: tuple[Path, Path]) -> None:
    memory, temporary = places
    process = os.fork()
    if process == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)  # dead, and nobody has waited for it
        names = [f"{PUSHED_PREFIX}{process}-kept-a", f"{PUSHED_PREFIX}{os.getpid()}-b", f"{PUSHED_PREFIX}mine"]
        for place in places:
            for name in names:
                (place / name).mkdir()
        sweep()
        assert [[path.name for path in sorted(place.iterdir())] for place in places] == [sorted(names[1:])] * 2
        # A process that the caller knows to end goes for ended.
        sweep(ended=os.getpid())
        assert [[path.name for path in place.iterdir()] for place in places] == [[names[2]]] * 2
    finally:
        os.waitpid(process, 0)
    assert (memory, temporary) == places


def test_weights_are_kept_while_they_are_written(tmp_path: Path) -> None:
    """Locked by a living process; or just made by one, and not yet locked."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    locked, fresh, left, reused = (
        tmp_path / f"{PUSHED_PREFIX}{pid}-{name}"
        for pid, name in ((gone.pid, "a"), (os.getpid(), "b"), (gone.pid, "c"), (os.getpid(), "d"))
    )
    for directory in (locked, fresh, left, reused):
        directory.mkdir()
    os.utime(reused, (0, 0))
    lock = lock_directory(locked)
    assert lock is not None
    assert lock_directory(locked) is None
    sweep_checkpoints(tmp_path)
    assert set(tmp_path.iterdir()) == {locked, fresh}
    os.close(lock)
    sweep_checkpoints(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh}


STARTED_BY_HAND = """
import os, sys, tempfile
from pathlib import Path
from torchrl_sglang_hidden.protocol import server_files
server_files.SHARED_MEMORY = Path(sys.argv[1])
tempfile.tempdir = sys.argv[2]
files = server_files.ServerFiles()
os.environ[server_files.FILES_ENV] = str(files.directory)
exec(sys.argv[3])
server_files.note_shared_memory()
os.kill(os.getpid(), 9)
"""


def test_a_killed_server_that_nobody_launched_has_noted_its_memory(places: tuple[Path, Path]) -> None:
    memory, temporary = places
    (memory / "sem.mp-of_another").touch()
    holds = HOLDS.replace("sys.argv[1:]", repr([str(memory / name) for name in NAMES])).replace("sys.stdin.read()", "")
    arguments = [sys.executable, "-c", STARTED_BY_HAND, str(memory), str(temporary), holds]
    subprocess.run(arguments, check=False, timeout=240, stdout=subprocess.DEVNULL)
    assert len(list(memory.iterdir())) == len(NAMES) + 1
    sweep()
    assert [path.name for path in memory.iterdir()] == ["sem.mp-of_another"]
    assert list(temporary.iterdir()) == []


def test_a_server_sweeps_where_its_owner_has_temporary_files(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, temporary = places
    own = temporary / "torchrl-sglang-hidden-server-own"
    own.mkdir()
    left = temporary / f"{PUSHED_PREFIX}1-of-a-trainer"
    left.mkdir()
    os.utime(left, (0, 0))
    lock = lock_directory(own)
    assert lock is not None
    monkeypatch.setenv(FILES_ENV, str(own))
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    sweep()
    assert list(temporary.iterdir()) == [own]
    os.close(lock)
