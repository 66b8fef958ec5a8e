"""Fuzzes everything that reads what a server, a client or a file says: `make fuzz`, or a few targets by name.

    python tools/fuzz.py                             every target, a million inputs in all
    python tools/fuzz.py answer recording --runs 1000000

Atheris (libFuzzer for Python) makes the inputs, and keeps those that reach code that none reached before. Each is some
bytes, by which the target of `tests/helpers/fuzz_targets.py` spoils a good answer, request or file, reads it, and
checks what comes out. A target runs in a process of its own, whose memory is bounded. What is looked for: an error that
is none of this package's, a value of a wrong type or size, an input that takes long, and memory that grows.

Exit status 1 says that something was found. Its bytes stand in the report: ``read_spoiled(target, bytes.fromhex("…"))``
repeats it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torchrl_sglang_hidden"
# One input's limits. The time is the process's own: on a busy machine others take time too.
MAX_SECONDS = 1.0
MAX_BYTES = 256 * 2**20
# Memory that inputs may leave behind which were read before: nothing is new in them.
MAX_GROWTH = 16 * 2**20
REPLAYS, MOST_REPLAYED = 4, 1000
# More than any good value takes, by which an allocation of a size that came from outside fails.
ADDRESS_SPACE = 2 * 2**30
MAX_LENGTH = 192
# Targets whose every input takes milliseconds, for it is read over HTTP, from files or in several calls.
SLOW, SLOW_SHARE = {"session", "samples", "service", "recording", "options"}, 8
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")


@dataclass
class Report:
    """What came of one target.

    Args:
        target: its name.
        inputs: how many were read.
        seconds: how long they took.
        slowest_s: the processor time of the one that took longest.
        growth_bytes: memory that was left behind by reading the inputs that the fuzzer kept, over and over.
        found: for each kind of fault, how often it was seen, and the first input in hexadecimal.
    """

    target: str
    inputs: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    growth_bytes: int = 0
    found: dict[str, tuple[int, str]] = field(default_factory=dict)


class Watch:
    """Reads inputs with one target, and notes what goes wrong.

    Args:
        target: its name.
        read: reads an input.
        refusal: the error with which a reader refuses what is wrong.
    """

    def __init__(self, target: str, read: Callable[[bytes], None], refusal: type[BaseException]) -> None:
        self.report = Report(target)
        self._read, self._refusal = read, refusal
        self._began = time.monotonic()

    def one(self, data: bytes) -> None:
        """Read one input."""
        report, peak, start = self.report, _peak_bytes(), time.process_time()
        with _Caught() as caught:
            self._read(data)
        error = caught.error
        if _lacks_memory(error):
            self._note(f"memory of a size that was not checked: {error!r:.120}", data)
        elif error is not None and not isinstance(error, self._refusal):
            self._note(f"{type(error).__name__} at {_place_of(error)}", data)
        took = time.process_time() - start
        report.inputs += 1
        report.slowest_s = max(report.slowest_s, took)
        report.seconds = time.monotonic() - self._began
        if took > MAX_SECONDS:
            self._note(f"over {MAX_SECONDS} s of processor time", data)
        if _peak_bytes() - peak > MAX_BYTES:
            self._note(f"over {MAX_BYTES // 2**20} MiB for one input", data)

    def replay(self, inputs: Sequence[bytes]) -> None:
        """Read inputs over and over, and measure what that leaves behind in memory.

        While the fuzzer runs, it cannot be told from what the fuzzer itself keeps.
        """
        used = []
        for _ in range(1 + REPLAYS):
            for data in inputs:
                self.one(data)
            gc.collect()
            used.append(_used_bytes())
        self.report.growth_bytes = max(used[-1] - used[0], 0)
        if self.report.growth_bytes > MAX_GROWTH:
            self._note(f"memory grew by over {MAX_GROWTH // 2**20} MiB", b"")

    def _note(self, what: str, data: bytes) -> None:
        count, first = self.report.found.get(what, (0, data.hex()))
        self.report.found[what] = (count + 1, first)


class _Caught:
    """Catches any error at all inside a ``with`` block: whatever it is, it is what is looked for."""

    error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _lacks_memory(error: BaseException | None) -> bool:
    """Return whether an error was made of one that says that there is no memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place_of(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    place = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(place.filename).name}:{place.lineno}"


# --- one target, in a process of its own ------------------------------------------------------------------------------


def fuzz_target(watch: Watch, runs: int, seconds: int, corpus: Path, report_to: Path) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    watch.one(b"")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    every = max(runs // 100, 1)

    def one(data: bytes) -> None:
        watch.one(data)
        if watch.report.inputs % every == 0:
            report_to.write_text(json.dumps(asdict(watch.report)))

    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-len_control=0", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=0", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def replay_target(watch: Watch, corpus: Path, report_to: Path) -> None:
    """Read again what the fuzzer kept of one target, and add to its report what that left behind."""
    before = report_of(watch.report.target, report_to.parent.parent, 0)
    kept = sorted(corpus.iterdir())[:MOST_REPLAYED]
    watch.replay([path.read_bytes() for path in kept])
    again = watch.report
    before.inputs += again.inputs
    before.seconds += again.seconds
    before.slowest_s = max(before.slowest_s, again.slowest_s)
    before.growth_bytes, before.found = again.growth_bytes, {**again.found, **before.found}
    report_to.write_text(json.dumps(asdict(before)))


def start(work: Callable[[], None], log_to: Path) -> int:
    """Do something in a copy of this process, and return the copy's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    with log_to.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def fuzz(asked: argparse.Namespace, names: Sequence[str], place: Path) -> Iterator[Report]:
    """Fuzz targets, some at a time, and yield each one's report when it has ended."""
    # Each twice: the fuzzer's run, and what it kept once more.
    waiting, running = [(name, False) for name in names], dict[int, tuple[str, bool]]()
    while waiting or running:
        while waiting and len(running) < asked.jobs:
            name, again = waiting.pop(0)
            corpus = (asked.corpus or place / "corpus") / name
            for directory in (corpus, place / name):
                directory.mkdir(parents=True, exist_ok=True)
            runs = asked.runs // (SLOW_SHARE if name in SLOW else 1)
            watch, report_to = watch_of(name), place / name / "report.json"
            if again:
                work = partial(replay_target, watch, corpus, report_to)
            else:
                work = partial(fuzz_target, watch, runs, asked.seconds, corpus, report_to)
            running[start(work, place / name / "log")] = (name, again)
        pid, ended = os.wait()
        (name, again), status = running.pop(pid), os.waitstatus_to_exitcode(ended)
        if again or status:
            yield report_of(name, place, status)
        else:
            waiting.insert(0, (name, True))


def watch_of(target: str) -> Watch:
    """Return the watch of one target."""
    targets, errors = (importlib.import_module(name) for name in ("helpers.fuzz_targets", f"{PACKAGE}.errors"))
    return Watch(target, lambda data: targets.read_spoiled(target, data), errors.SGLangHiddenError)


def report_of(target: str, place: Path, status: int) -> Report:
    """Return what a target's process left behind."""
    written = place / target / "report.json"
    report = Report(**json.loads(written.read_text())) if written.exists() else Report(target)
    if status:
        last = (place / target / "log").read_text(errors="replace").splitlines()[-6:]
        report.found[f"its process ended with status {status}: {' | '.join(last)}"] = (1, "")
    return report


# --- all of them ------------------------------------------------------------------------------------------------------


def table_of(reports: Sequence[Report]) -> str:
    """Return the reports as a table of Markdown."""
    lines = [
        "| target | inputs | faults | slowest | memory left behind |",
        "|---|---:|---:|---:|---:|",
    ]
    for report in reports:
        faults = sum(count for count, _ in report.found.values())
        lines.append(
            f"| {report.target} | {report.inputs} | {faults} | {report.slowest_s * 1000:.0f} ms "
            f"| {report.growth_bytes / 2**20:.1f} MiB |"
        )
    total = sum(report.inputs for report in reports)
    faults = sum(count for report in reports for count, _ in report.found.values())
    slowest, growth = (max(getattr(report, name) for report in reports) for name in ("slowest_s", "growth_bytes"))
    return "\n".join([*lines, f"| all | {total} | {faults} | {slowest * 1000:.0f} ms | {growth / 2**20:.1f} MiB |"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="which targets; all by default")
    parser.add_argument("--runs", type=int, default=80_000, help=f"inputs for each; a slow one gets 1/{SLOW_SHARE}")
    parser.add_argument("--seconds", type=int, default=0, help="most seconds for each target; 0 for any number")
    parser.add_argument("--jobs", type=int, default=2, help="targets at the same time")
    parser.add_argument("--corpus", type=Path, help="keep what was learnt here, and go on from it")
    asked = parser.parse_args(argv)
    known = import_targets()
    unknown = sorted(set(asked.targets) - set(known))
    if unknown:
        parser.error(f"no targets {unknown}; expected some of {known}")
    reports = []
    with tempfile.TemporaryDirectory() as place:
        for report in fuzz(asked, asked.targets or known, Path(place)):
            reports.append(report)
            print(f"{report.target}: {report.inputs} inputs in {report.seconds:.0f} s", file=sys.stderr, flush=True)
    print(table_of(sorted(reports, key=lambda report: known.index(report.target))))
    for report in reports:
        for what, (count, first) in report.found.items():
            print(f"{report.target}: {what} ({count} times); the first: {first}")
    return int(any(report.found for report in reports))


def import_targets() -> list[str]:
    """Import the package so that the fuzzer sees which code runs, and return the names of all targets."""
    import atheris

    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")  # PIL's, of every damaged file
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=[PACKAGE]):
        found: Any = importlib.import_module("helpers.fuzz_targets")
    return list(found.TARGETS)


if __name__ == "__main__":
    sys.exit(main())
