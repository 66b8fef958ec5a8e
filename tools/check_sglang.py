"""Says what another version of SGLang needs of this package, by each name that it hooks, imports or reads there.

    .venv/bin/python -m pip download --no-deps --dest wheels sglang==0.5.22
    .venv/bin/python tools/check_sglang.py wheels/sglang-0.5.22-….whl --diff

The SGLang of this environment, for which the package is written, is what the other one is compared with; neither is
imported. Ends with 1 where anything differs, with 2 where the package itself needs a name that its own SGLang has not.
Names and parameters are not all: what the tests on real servers say decides whether a version is served.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from sglang_needs import ROUTES, SERVER_ARGS, Need, needs
from sglang_sources import Definition, Sources, body, signature

from torchrl_sglang_hidden.server.plugin import SGLANG_VERSIONS

Verdict = Literal["same", "body changed", "signature changed", "gone"]
ORDER: tuple[Verdict, ...] = ("gone", "signature changed", "body changed")
# Server arguments are fields of classes in this package or module; SGLang makes one class of them at import.
_ARGUMENTS = ("sglang/srt/arg_groups/fields/", "sglang/srt/server_args.py")


@dataclass(frozen=True)
class Finding:
    """Says how a name differs.

    Args:
        need: what is needed.
        verdict: how.
        remark: what it was and is, or its nearest name.
        diff: the lines of a changed body, as a unified diff.
    """

    need: Need
    verdict: Verdict
    remark: str = ""
    diff: tuple[str, ...] = ()


def find(sources: Sources, need: Need) -> Definition | None:
    """Find what is needed; None where it is not there."""
    owner, _, name = need.target.rpartition(".")
    if need.kind == "route":
        tree = sources.module(ROUTES)
        paths = {} if tree is None else {path: node for node in tree.body for path in _paths(node)}
        path = need.target.removeprefix(f"{ROUTES}.")
        return Definition(paths[path], ROUTES) if path in paths else None
    found = sources.find(need.target)
    if found is None and owner == SERVER_ARGS:
        for file in sorted(file for file in sources.files if file.startswith(_ARGUMENTS)):
            module = file.removesuffix(".py").replace("/", ".")
            for node in getattr(sources.module(module), "body", []):
                if isinstance(node, ast.ClassDef) and (field := sources.find(f"{module}.{node.name}.{name}")):
                    return field
    return found


def _paths(node: ast.stmt) -> list[str]:
    """List the paths that a function of SGLang's HTTP server answers."""
    decorators = getattr(node, "decorator_list", [])
    return [
        part.value
        for decorator in decorators
        if isinstance(decorator, ast.Call)
        for part in decorator.args[:1]
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def compare(need: Need, old: Definition, other: Sources) -> Finding:
    """Compare what is needed with what another SGLang has.

    Args:
        need: what is needed.
        old: what it is in the SGLang that the package is written for.
        other: the other SGLang.
    """
    new = find(other, need)
    if new is None:
        nearest = other.nearest(need.target) if need.kind != "route" else ""
        return Finding(need, "gone", f"nearest: {nearest}" if nearest else "nothing is like it")
    if need.kind == "route":
        return Finding(need, "same")  # what it takes is a field of its own, and what it answers is not listed
    if ast.dump(old.node) == ast.dump(new.node):
        return Finding(need, "same")
    before, after = signature(old.node), signature(new.node)
    if before != after:
        return Finding(need, "signature changed", f"{before} → {after}")
    lines = body(old.node), body(new.node)
    if lines[0] != lines[1]:
        diff = difflib.unified_diff(*lines, "this SGLang", "the other", lineterm="", n=2)
        return Finding(need, "body changed", diff=tuple(diff))
    return Finding(need, "same")


def check(own: Sources, other: Sources) -> list[Finding]:
    """Compare all that is needed.

    Raises:
        SystemExit: with 2, where ``own`` lacks something, so that nothing can be compared with it.
    """
    wanted = [(need, find(own, need)) for need in needs()]
    missing = [need for need, old in wanted if old is None]
    if missing:
        for need in missing:
            print(f"{need.target}: needed by {need.where}, and not in {own.path}; mend tools/sglang_needs.py")
        raise SystemExit(2)
    return [compare(need, old, other) for need, old in wanted if old is not None]


def what_to_do(finding: Finding) -> str:
    """Say what the other version needs for one finding."""
    match finding.verdict:
        case "same":
            return ""
        case "body changed":
            return "read it (--diff): does it still do what is relied on?"
        case "signature changed":
            return "change the hook" if finding.need.kind == "hook" else "change the call"
        case "gone":
            return "find what took its place"
        case _:
            assert_never(finding.verdict)


def report(findings: Sequence[Finding], *, diffs: bool) -> None:
    """Print what differs, worst first, and how much is the same."""
    for verdict in ORDER:
        for finding in (finding for finding in findings if finding.verdict == verdict):
            need = finding.need
            print(f"{verdict}: {need.kind} {need.target}")
            print(f"    here: {need.where}")
            if finding.remark:
                print(f"    {finding.remark}")
            print(f"    {what_to_do(finding)}")
            if diffs:
                print(*(f"    | {line}" for line in finding.diff[2:]), sep="\n")
    counts = Counter(finding.verdict for finding in findings)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("same", *reversed(ORDER))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, compare and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sglang", type=Path, help="a wheel, or a directory with sglang/ in it")
    parser.add_argument("--own", type=Path, help="the SGLang to compare with; without it, that of this environment")
    parser.add_argument("--diff", action="store_true", help="show changed bodies")
    options = parser.parse_args(arguments)
    own = Sources(options.own or installed())
    if own.version != SGLANG_VERSIONS[0]:
        raise SystemExit(f"{own.path} has SGLang {own.version}; the package is written for {SGLANG_VERSIONS[0]}")
    other = Sources(options.sglang)
    print(f"SGLang {other.version or 'of no version'}, held against {own.version}:")
    findings = check(own, other)
    report(findings, diffs=options.diff)
    return 0 if all(finding.verdict == "same" for finding in findings) else 1


def installed() -> Path:
    """Return the directory that this environment's SGLang is in.

    Raises:
        SystemExit: it has none.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise SystemExit(f"this environment has no SGLang to compare with; install sglang=={SGLANG_VERSIONS[0]}")
    return Path(spec.origin).parents[1]


if __name__ == "__main__":
    raise SystemExit(main())
