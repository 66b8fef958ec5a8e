"""The second environment imports what was installed into it, and refuses to go on where something else is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import second_environment

ROOT = Path(__file__).parents[1]


def install(site: Path, name: str, module: str = "filelock") -> None:
    """Write what pip writes for a version 99 of a package; `filelock` is one that this environment has too."""
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text('__version__ = "99"\n')
    info = site / f"{name.replace('-', '_')}-99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def run_check(directory: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, second_environment.__file__, "--check", str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_was_installed_is_imported(tmp_path: Path) -> None:
    site = second_environment.site_of(tmp_path)
    install(site, "filelock")
    done = run_check(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"under test: filelock 99, imported as filelock from {site / 'filelock'}\n"


def test_what_is_not_imported_is_refused(tmp_path: Path) -> None:
    install(second_environment.site_of(tmp_path), "filelock")
    done = run_check(tmp_path)
    assert done.returncode == 1
    assert "filelock 99 was installed, and filelock " in done.stderr


def test_a_version_that_is_another_is_refused(tmp_path: Path) -> None:
    """The module would be the nightly's, and its ``__version__`` this environment's."""
    site = second_environment.site_of(tmp_path)
    install(site, "filelock-nightly")
    done = run_check(tmp_path, site)
    assert done.returncode == 1
    assert "filelock-nightly 99 was installed, and filelock " in done.stderr


def test_nothing_to_test_is_refused(tmp_path: Path) -> None:
    site = second_environment.site_of(tmp_path)
    site.mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no packages of its own; name some"):
        second_environment.check(tmp_path)
    install(site, "data", "data")
    (site / "data-99.dist-info" / "RECORD").write_text("data/words.txt,,\n")
    with pytest.raises(SystemExit, match="data 99 brings no package that could be imported"):
        second_environment.check(tmp_path)


def test_a_nightly_build_and_the_first_environment_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[Any], **options: Any) -> None:
        commands.append(list(map(str, command)))
        if "install" in command:
            site = second_environment.site_of(tmp_path / "env")
            assert not list(site.glob("*.pth")), "pip would find the first environment's packages"
            install(site, "filelock-nightly")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(
        second_environment.venv,
        "create",
        lambda directory, **options: second_environment.site_of(directory).mkdir(parents=True),
    )
    second_environment.make(tmp_path / "env", ["filelock-nightly"])
    monkeypatch.undo()
    assert commands[0][-4:] == ["--no-deps", "-e", str(ROOT), "filelock-nightly"]
    assert "--check" in commands[1]
    site = second_environment.site_of(tmp_path / "env")
    assert run_check(tmp_path / "env", site).returncode == 0
    assert sysconfig.get_path("purelib") in (site / "first_environment.pth").read_text()


def test_only_an_environment_is_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(SystemExit, match="is no environment, and would be removed"):
        second_environment.make(tmp_path, ["numpy"])
    assert (tmp_path / "thesis.txt").exists()
