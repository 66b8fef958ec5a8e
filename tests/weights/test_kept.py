"""What is kept of what a server was given: the bytes, where, at which cost, and when it is no longer what it was."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX
from torchrl_sglang_hidden.protocol.server_files import sweep_checkpoints
from torchrl_sglang_hidden.weights.kept import BASE, KeptWeights, Resumption

KEEPS = ("memory", "disk")


def write(directory: Path, data: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(data)
    return directory


def make(keep: str, tmp_path: Path) -> KeptWeights:
    place = tmp_path / "disk"
    place.mkdir(exist_ok=True)
    return KeptWeights(place if keep == "disk" else keep)


def kept_in(place: Path) -> list[Path]:
    return sorted(place.glob(f"{PUSHED_PREFIX}{os.getpid()}-kept-*"))


@pytest.mark.parametrize("keep", KEEPS)
def test_the_last_checkpoint_stays_when_its_directory_is_deleted(keep: str, tmp_path: Path) -> None:
    kept, pushed = make(keep, tmp_path), tmp_path / "memory" / "pushed"
    place = tmp_path / keep
    for version in ("1", "2"):
        write(pushed, f"weights {version}".encode())
        kept.keep(BASE, pushed, version, is_users=False)
        shutil.rmtree(pushed)
        resumption = kept.resume()
        assert resumption == Resumption(version, kept_in(place)[0])
        assert (resumption.weights / "model.safetensors").read_text() == f"weights {version}"
    assert len(kept_in(place)) == 1, "one copy, not one for each update"
    kept.close()
    assert kept_in(place) == []


def test_keeping_in_memory_costs_no_second_copy(tmp_path: Path) -> None:
    kept, pushed = make("memory", tmp_path), write(tmp_path / "pushed")
    kept.keep(BASE, pushed, "1", is_users=False)
    one, other = pushed / "model.safetensors", kept_in(tmp_path)[0] / "model.safetensors"
    assert one.stat().st_ino == other.stat().st_ino


def test_nothing_is_kept_where_that_was_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, pushed = make("nothing", tmp_path), write(tmp_path / "pushed")
    assert not kept.copies
    with caplog.at_level(logging.WARNING):
        kept.keep(BASE, pushed, "1", is_users=False)
    assert "version 1 would not survive a restart" in caplog.text
    assert kept_in(tmp_path) == []
    resumption = kept.resume()
    assert (resumption.version, resumption.weights) == ("1", None)
    assert resumption.lost == {BASE: "Restart(keep='nothing') keeps none"}


@pytest.mark.parametrize("keep", [*KEEPS, "nothing"])
def test_a_directory_of_the_users_stays_where_it_is_and_is_read_again(keep: str, tmp_path: Path) -> None:
    kept, mine = make(keep, tmp_path), write(tmp_path / "memory" / "mine")
    kept.keep(BASE, mine, "1", is_users=True)
    assert kept.resume() == Resumption("1", mine)
    kept.close()
    assert mine.is_dir()
    assert kept_in(tmp_path / "memory") == []


@pytest.mark.parametrize("change", ["rewritten", "replaced", "another file", "deleted"])
def test_a_directory_that_has_changed_is_lost_and_not_served_in_silence(change: str, tmp_path: Path) -> None:
    kept, mine = make("memory", tmp_path), write(tmp_path / "mine")
    kept.keep(BASE, mine, "1", is_users=True)
    file = mine / "model.safetensors"
    match change:
        case "rewritten":
            file.write_bytes(b"WEIGHTS")
            os.utime(file, ns=(1, 1))
        case "replaced":
            stat = file.stat()
            (mine / "new").write_bytes(b"WEIGHTS")
            os.utime(mine / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
            (mine / "new").replace(file)
        case "another file":
            (mine / "model-2.safetensors").touch()
        case _:
            shutil.rmtree(mine)
    resumption = kept.resume()
    assert resumption.weights is None
    assert ("cannot be read any more" if change == "deleted" else "no longer those") in resumption.lost[BASE]
    # Until new weights come.
    kept.keep(BASE, write(tmp_path / "again"), "2", is_users=True)
    assert kept.resume() == Resumption("2", tmp_path / "again")


def test_a_checkpoint_that_cannot_be_kept_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, pushed = make("memory", tmp_path), write(tmp_path / "pushed")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    kept.keep(BASE, pushed, "1", is_users=False)
    assert "it could not be kept: [Errno 28] No space left" in kept.resume().lost[BASE]
    assert kept_in(tmp_path) == []
    kept.keep(BASE, None, "2", is_users=False)
    assert BASE in kept.resume().lost


def test_adapters_beside_weights(tmp_path: Path) -> None:
    kept = make("memory", tmp_path)
    kept.keep(BASE, write(tmp_path / "base"), "1", is_users=False)
    kept.keep("a", write(tmp_path / "a"), "2", is_users=False)
    kept.keep("b", write(tmp_path / "b"), "3", is_users=False)
    kept.drop("a")
    resumption = kept.resume()
    assert (resumption.version, set(resumption.adapters), resumption.dropped) == ("3", {"b"}, frozenset({"a"}))
    assert len(kept_in(tmp_path)) == 2
    kept.keep("a", write(tmp_path / "a again"), "4", is_users=False)
    assert set(kept.resume().adapters) == {"a", "b"}
    assert kept.resume().dropped == frozenset()
    kept.close()
    assert kept_in(tmp_path) == []


def test_a_copy_of_a_killed_process_is_swept_by_the_next(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    dead, alive = (write(tmp_path / "disk" / f"{PUSHED_PREFIX}{pid}-kept-x") for pid in (process, os.getpid()))
    KeptWeights(tmp_path / "disk")
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize("keep", KEEPS)
def test_an_old_copy_of_a_living_process_stays(keep: str, tmp_path: Path) -> None:
    kept, place = make(keep, tmp_path), tmp_path / keep
    kept.keep(BASE, write(tmp_path / "memory" / "pushed"), "1", is_users=False)
    os.utime(kept_in(place)[0], (0, 0))
    sweep_checkpoints(place)
    assert len(kept_in(place)) == 1
    kept.close()


def test_a_version_that_another_client_pushed_is_lost(tmp_path: Path) -> None:
    kept = make("memory", tmp_path)
    kept.keep(BASE, write(tmp_path / "base"), "1", is_users=False)
    kept.miss("1")
    assert kept.resume().lost == {}
    kept.miss("2")
    resumption = kept.resume()
    assert (resumption.version, resumption.weights) == ("2", None)
    assert "version '2' came from another client" in resumption.lost[BASE]
    assert kept_in(tmp_path) == []
    kept.keep(BASE, write(tmp_path / "again"), "3", is_users=False)
    assert kept.resume().lost == {}
