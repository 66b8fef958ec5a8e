"""Asks which of the installed packages have known vulnerabilities, with pip-audit, and holds the answer against a list.

    python tools/audit.py [--url URL] [--strict]

Fails on a vulnerability that ``ACCEPTED`` does not name. One that is named there has no fixed version that can be
installed beside the others, or cannot be reached from this package: the reason stands beside it. Without a way to the
database nothing is audited: this says so, and fails under ``--strict`` only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

__all__ = ["ACCEPTED", "main", "report"]

# By package, the vulnerabilities that stay for now, each with the reason. Read again whenever a version changes.
ACCEPTED: dict[str, dict[str, str]] = {
    "diskcache": {
        "CVE-2025-69872": "no fix; its cache is pickled, in a directory of the user's own; SGLang's grammars have it"
    },
    "pip": {"PYSEC-2023-228": "the pip that Python itself puts into .venv; it concerns Mercurial addresses alone"},
    "ray": {
        "CVE-2023-48022": "no fix; its API asks nobody who they are; of tests and collectors alone, on loopback here"
    },
}
TIMEOUT_S = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit this environment, and return the exit code."""
    parser = argparse.ArgumentParser(description="Audit the installed packages.")
    parser.add_argument("--url", help="an OSV database's query address; by default that of osv.dev")
    parser.add_argument("--strict", action="store_true", help="fail where the database cannot be asked")
    chosen = parser.parse_args(arguments)
    found = _ask(chosen.url)
    console = Console(soft_wrap=True, highlight=False)
    if isinstance(found, str):
        console.print(f"NOT AUDITED: the vulnerability database could not be asked ({found})", style="yellow")
        return 1 if chosen.strict else 0
    lines, passes = report(found, ACCEPTED)
    console.print("\n".join(lines))
    return 0 if passes else 1


def report(
    dependencies: Sequence[Mapping[str, Any]], accepted: Mapping[str, Mapping[str, str]]
) -> tuple[list[str], bool]:
    """Say what was found.

    Args:
        dependencies: of pip-audit's JSON.
        accepted: by package and identifier, why a vulnerability stays.

    Returns:
        The lines, and whether each vulnerability is accepted.
    """
    lines, passes, seen = [], True, set()
    skipped = sorted(str(one["name"]) for one in dependencies if "skip_reason" in one)
    for one in dependencies:
        for vulnerability in one.get("vulns", ()):
            names = {vulnerability["id"], *vulnerability.get("aliases", ())}
            reason = next((why for name, why in accepted.get(one["name"], {}).items() if name in names), None)
            seen |= {(one["name"], name) for name in names}
            fixes = ", ".join(vulnerability.get("fix_versions", ())) or "no version"
            where = f"{one['name']} {one['version']}: {vulnerability['id']}, fixed in {fixes}"
            lines.append(f"VULNERABLE {where}" if reason is None else f"accepted   {where}; {reason}")
            passes &= reason is not None
    gone = [(package, name) for package, names in accepted.items() for name in names if (package, name) not in seen]
    lines += [f"no longer found, remove it from ACCEPTED: {package} {name}" for package, name in gone]
    lines += [f"not in the database's reach: {', '.join(skipped)}"] if skipped else []
    vulnerable = sum(bool(one.get("vulns")) for one in dependencies)
    lines.append(f"{len(dependencies) - len(skipped)} packages audited, {vulnerable} with a known vulnerability")
    return lines, passes


def _ask(url: str | None) -> Sequence[Mapping[str, Any]] | str:
    """Return pip-audit's answer, or why there is none."""
    command = [
        sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--format", "json", "--aliases", "on",
        "--desc", "off", "--progress-spinner", "off", "--timeout", str(TIMEOUT_S),
        *(() if url is None else ("--osv-url", url)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        dependencies: Sequence[Mapping[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip().splitlines() or [f"pip-audit ended with exit code {done.returncode}"])[-1][:200]
    return dependencies


if __name__ == "__main__":
    raise SystemExit(main())
