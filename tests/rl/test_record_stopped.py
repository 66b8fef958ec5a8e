"""A recording that is stopped, at any moment and by anything, ends with what an uninterrupted one gives."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_engine import RecordingServer
from helpers.full_disks import files_of_at_most
from helpers.policy_batches import make
from helpers.recordings import PROMPT, SEGMENTS, assert_same, data_rows, ids_of, record_slowly

from torchrl_sglang_hidden import HiddenSpec, Recording, RecordingError, load_recording, record_hidden_states
from torchrl_sglang_hidden.rl import record, shards

KILLS = 20
READY_TIMEOUT_S = 120.0
ROWS = 12
# Of the steps of writing in these tests: more than one shard, and not all of them.
HALFWAY = 30


@pytest.fixture(autouse=True)
def a_shard_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)


def recorded(path: Path, count: int = ROWS, **options: Any) -> Recording:
    policy = make("text", hidden=HiddenSpec(SEGMENTS))[0]
    arguments = {"prompt": PROMPT, "batch_size": 5, "tokens": True, "progress": False, **options}
    return record_hidden_states(policy, data_rows(count), path, **arguments)


# --- killed -----------------------------------------------------------------------------------------------------------


def test_killed_twenty_times_it_ends_as_if_it_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, from before the first file is there to after the last row: nothing can clean up behind it."""
    count = 200
    # A process that has imported everything and has no threads: its children start at once.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.recordings"])
    moments, server = random.Random(0), RecordingServer()
    server.handle_error = lambda *of_killed: None  # type: ignore[method-assign]
    asked, respond, progress = threading.Semaphore(0), server.respond, []

    def respond_and_count(handler: Any, payload: dict[str, Any]) -> None:
        asked.release()
        respond(handler, payload)

    server.respond = respond_and_count
    try:
        for _ in range(KILLS):
            ready = context.Event()
            child = context.Process(target=record_slowly, args=(server.url, str(tmp_path / "r"), count, ready))
            child.start()
            assert ready.wait(READY_TIMEOUT_S)
            for _ in range(moments.randrange(4)):
                while not asked.acquire(timeout=0.05) and child.is_alive():
                    pass
            child.join(moments.uniform(0, 0.05))
            child.kill()
            child.join()
            done = (tmp_path / "r" / "manifest.json").exists()
            progress.append(len(load_recording(tmp_path / "r")) if done else 0)
        for name in ("r", "expected"):
            record_slowly(server.url, str(tmp_path / name), count, threading.Event())
    finally:
        server.stop()
    assert progress == sorted(progress), "what was recorded stays"
    assert len(set(progress)) > 5, "killed in the middle"
    found = load_recording(tmp_path / "r")
    assert (len(found), found.metadata["complete"]) == (count, True)
    assert_same(found.tensordict, load_recording(tmp_path / "expected").tensordict)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    expected = recorded(tmp_path / "r", 5).tensordict
    half = tmp_path / "r" / "shards" / ".tdz-x"
    half.mkdir()
    for left in (half / "000001.tdz", half.parent / "000001.tdz", tmp_path / "r" / "manifest.json.new"):
        left.write_text("half")
    assert_same(recorded(tmp_path / "r", 5).tensordict, expected)
    assert [entry.name for entry in half.parent.iterdir()] == ["000000.tdz"]
    assert {entry.name for entry in (tmp_path / "r").iterdir()} - {".lock"} == {"manifest.json", "shards"}


class Stop(BaseException):
    """Ends a recording as a signal would."""


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Let the call of one of the system's functions that write fail; yield the names of those that were called."""
    calls: list[str] = []

    def failing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise error()
            return call(*args, **options)

        return wrapped

    with monkeypatch.context() as patched:
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "replace"), (Path, "unlink")):
            patched.setattr(owner, name, failing(name, getattr(owner, name)))
        yield calls


def number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with stopped_at(monkeypatch, 0, Stop) as calls:
        recorded(tmp_path / "counted")
    return len(calls)


def test_stopped_before_each_step_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorded(tmp_path / "expected").tensordict
    steps = number_of_steps(tmp_path, monkeypatch)
    assert steps > 20
    for number in range(1, steps + 1):
        path = tmp_path / f"stopped-{number}"
        with stopped_at(monkeypatch, number, Stop), pytest.raises(Stop):
            recorded(path)
        assert_same(recorded(path).tensordict, expected)
        listed = {shard.file for shard in load_recording(path)._manifest.shards}
        assert {f"shards/{entry.name}" for entry in (path / "shards").iterdir()} == listed, "nothing is left over"


def test_what_is_recorded_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))
    rows = data_rows(10)
    with stopped_at(monkeypatch, HALFWAY, Stop), pytest.raises(Stop):
        record_hidden_states(policy, rows, tmp_path / "r", prompt=PROMPT, batch_size=4, progress=False)
    done = len(load_recording(tmp_path / "r"))
    assert 0 < done < 10
    engine.requests.clear()
    record_hidden_states(policy, rows, tmp_path / "r", prompt=PROMPT, batch_size=4, progress=False)
    assert [list(request.prompt_ids) for request in engine.requests] == [ids_of(row) for row in rows[done:]]
    engine.requests.clear()
    record_hidden_states(policy, rows, tmp_path / "r", prompt=PROMPT, batch_size=4, progress=False)
    assert engine.requests == [], "a whole recording asks nothing"


def test_labels_that_are_shared_go_on_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorded(tmp_path / "expected", every=3, batch_size=1).tensordict
    with stopped_at(monkeypatch, HALFWAY, Stop), pytest.raises(Stop):
        recorded(tmp_path / "r", every=3, batch_size=1)
    assert 0 < len(load_recording(tmp_path / "r")) < ROWS
    assert_same(recorded(tmp_path / "r", every=3, batch_size=1).tensordict, expected)


def test_another_batch_size_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stopped_at(monkeypatch, HALFWAY, Stop), pytest.raises(Stop):
        recorded(tmp_path / "r")
    assert_same(recorded(tmp_path / "r", batch_size=7).tensordict, recorded(tmp_path / "expected").tensordict)


def test_the_manifest_is_replaced_when_all_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would show: the shard, its name, the new manifest, its name, and the name of the directory."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append(f"{path.name} > {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    recorded(tmp_path / "r", 5)
    manifest = ["manifest.json.new", "manifest.json.new > manifest.json", "r"]
    assert steps == [tmp_path.name, *manifest, "000000.tdz", "shards", *manifest, *manifest]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_at_each_step_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorded(tmp_path / "expected").tensordict
    for number in range(1, number_of_steps(tmp_path, monkeypatch) + 1):
        path, full = tmp_path / f"full-{number}", OSError(errno.ENOSPC, "No space left on device")
        with (
            stopped_at(monkeypatch, number, lambda full=full: full),
            pytest.raises(RecordingError, match=r"no space left \(.*\); what was recorded is whole: free some, and"),
        ):
            recorded(path)
        assert_same(recorded(path).tensordict, expected)


@pytest.mark.parametrize("nbytes", [0, 100, 3000, 6000, 9000, 12000])
def test_a_file_that_the_system_cuts_off(tmp_path: Path, nbytes: int) -> None:
    """The writes themselves fail here, in the middle of a file: TensorDict's, zipfile's and the manifest's."""
    recorded(tmp_path / "r", 5)
    with files_of_at_most(nbytes), pytest.raises(RecordingError, match="no space left"):
        recorded(tmp_path / "r")
    assert len(load_recording(tmp_path / "r")) >= 5
    assert_same(recorded(tmp_path / "r").tensordict, recorded(tmp_path / "expected").tensordict)


# --- permissions, other processes -------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user without root's permission to write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_without_permission_to_write(tmp_path: Path) -> None:
    for directory in (tmp_path, *list(tmp_path.parents)[:3]):
        directory.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o555)
    with (
        nobody(),
        pytest.raises(RecordingError, match=r"cannot be written \(.*Permission denied.*\); use another"),
    ):
        recorded(tmp_path / "closed" / "r")
    with nobody(), pytest.raises(RecordingError, match="cannot be written"):
        recorded(tmp_path / "closed")


def test_a_path_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot be written"):
        recorded(tmp_path / "file" / "r")
    with pytest.raises(RecordingError, match="cannot be written"):
        recorded(tmp_path / "file")


def test_two_at_a_time(tmp_path: Path) -> None:
    recorded(tmp_path / "r", 5)
    with shards.ShardWriter(tmp_path / "r"), pytest.raises(RecordingError, match="another process records there; use"):
        recorded(tmp_path / "r")
    assert len(recorded(tmp_path / "r")) == ROWS


def test_a_directory_with_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.txt").write_text("mine")
    with pytest.raises(RecordingError, match=r"has \['shards'\] and no manifest.json; expected an empty directory"):
        recorded(tmp_path)
    assert (tmp_path / "shards" / "mine.txt").read_text() == "mine"
