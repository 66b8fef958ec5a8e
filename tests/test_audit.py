"""The audit of what is installed: what fails, what is accepted and why, and what happens without a database."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import audit
import pytest

FOUND: list[dict[str, Any]] = [
    {"name": "sound", "version": "1", "vulns": []},
    {"name": "mine", "skip_reason": "not on the index"},
    {"name": "old", "version": "2", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}]},
]


def test_a_vulnerability_fails_with_what_mends_it() -> None:
    lines, passes = audit.report(FOUND, {})
    assert not passes
    assert lines[0] == "VULNERABLE old 2: PYSEC-1, fixed in 3"
    assert lines[1:] == ["not in the database's reach: mine", "2 packages audited, 1 with a known vulnerability"]


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_one_that_is_named_passes_with_its_reason(name: str) -> None:
    lines, passes = audit.report(FOUND, {"old": {name: "nothing calls it"}})
    assert passes
    assert lines[0] == "accepted   old 2: PYSEC-1, fixed in 3; nothing calls it"


def test_one_that_is_gone_is_to_be_removed_and_another_of_the_package_fails() -> None:
    lines, passes = audit.report(FOUND, {"old": {"CVE-2": "…"}})
    assert not passes
    assert "no longer found, remove it from ACCEPTED: old CVE-2" in lines


def test_without_a_database_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    silent = SimpleNamespace(stdout="", stderr="Traceback\nConnectionError: no way\n", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: silent)
    assert audit.main([]) == 0
    assert "NOT AUDITED: the vulnerability database could not be asked (ConnectionError: no way)" in (
        capsys.readouterr().out
    )
    assert audit.main(["--strict"]) == 1


def test_every_reason_is_a_reason() -> None:
    assert all(len(reason) > 20 for names in audit.ACCEPTED.values() for reason in names.values())
