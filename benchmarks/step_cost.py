"""What a forward step costs the server half: its own classes on batches without a server.

A decode step of B rows is planned, taken, copied and consumed, as SGLang's scheduler drives it. Two figures come out:
the tensor operations, counted as torch dispatches them, and the host's time. With D = 8 the data costs next to nothing:
that is the time that the scheduler's thread spends where an accelerator moves the data. With the real D on a CPU the
movement is part of it.

Each revision runs in a process of its own, the one before from `git archive`; their results are compared before any
figure is printed. Torch has one thread, as SGLang gives it on an accelerator.

    python benchmarks/step_cost.py --before 5cc7b51
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stand_ins import PROMPT_TOKENS, Operations, Request, answer_of

from torchrl_sglang_hidden.protocol import unpack_answer
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.server.capture import Capture

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "5cc7b51"
BATCHES, LAYERS = (1, 32, 128, 256, 512), (1, 4, 36)
SEGMENTS = (("response",), ("prompt", "response"), ("full",), ("prompt", "response", "full"))
WARM_STEPS = 3
# Results of both revisions: sums of the same rows, which may be added in another order.
RTOL = 1e-5


class Scheduler:
    """Drives the server half as SGLang's scheduler does, without overlap.

    Args:
        batch_size: B.
        wanted: what each request wants.
        hidden_size: D.
        dtype: of the states.
    """

    def __init__(self, batch_size: int, wanted: Wanted, hidden_size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.capture = Capture()
        self.capture.taps.layers = tuple(layer for layer in wanted.layers if layer >= 0)
        self.requests = [Request(number, wanted) for number in range(batch_size)]
        self._wanted, self._hidden_size, self._dtype = wanted, hidden_size, dtype
        self._numbers = torch.Generator().manual_seed(0)

    def states(self, num_rows: int) -> dict[int, torch.Tensor]:
        shape = (num_rows, self._hidden_size)
        return {
            layer: torch.randn(shape, generator=self._numbers).to(self._dtype) for layer in sorted(self._wanted.layers)
        }

    def step(self, mode: str, states: dict[int, torch.Tensor], counter: Any = None) -> float:
        """Run one step; return the host's seconds in the server half, whose operations are counted if asked for."""
        lengths = [PROMPT_TOKENS if mode == "EXTEND" else 1] * len(self.requests)
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name=mode),
            reqs=self.requests,
            extend_lens=lengths,
            prefix_lens=[0] * len(self.requests),
            seq_lens_cpu=torch.tensor([PROMPT_TOKENS + len(req.output_ids) for req in self.requests]),
        )
        commits = [SimpleNamespace(output_index=len(req.output_ids)) for req in self.requests]
        with counter or nullcontext():
            start = time.perf_counter()
            plan = self.capture.plan_step(batch)
            device = plan.gather(states)
            host = device.copy_to_host(lambda tensor: tensor)
            elapsed = time.perf_counter() - start
        for req in self.requests:
            req.output_ids.append(1)
        with counter or nullcontext():
            start = time.perf_counter()
            host.consume(batch, commits)
            return elapsed + time.perf_counter() - start

    def answers(self) -> list[torch.Tensor]:
        """Finish all requests; return their vectors."""
        found = []
        for req in self.requests:
            req.done = True
            pools = unpack_answer(answer_of(self.capture, req), "row", self._hidden_size).pools
            found += [value for value, _ in pools.segments.values() if value is not None]
            found += [] if pools.rows is None else [pools.rows.rows_NKD.float().mean(0)]
        return found


def measure_step(
    batch_size: int, wanted: Wanted, *, hidden_size: int, steps: int = 30
) -> tuple[int, float, list[torch.Tensor]]:
    """Measure decode steps.

    Returns:
        The operations of one decode step, the median of its seconds on the host, and the requests' vectors.
    """
    with torch.inference_mode():
        scheduler = Scheduler(batch_size, wanted, hidden_size)
        scheduler.step("EXTEND", scheduler.states(batch_size * PROMPT_TOKENS))
        decode = scheduler.states(batch_size)
        for _ in range(WARM_STEPS):
            scheduler.step("DECODE", decode)
        operations = Operations()
        scheduler.step("DECODE", decode, operations)
        seconds = [scheduler.step("DECODE", decode) for _ in range(steps)]
        return operations.count, statistics.median(seconds), scheduler.answers()


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    listed = [
        {"rows": rows, "layers": layers, "segments": list(segments), "pooling": "mean", "tokens": False}
        for layers in args.layers
        for rows in args.rows
        for segments in SEGMENTS
    ]
    most = max(args.rows)
    listed += [
        {"rows": rows, "layers": 1, "segments": ["response"], "pooling": pooling, "tokens": pooling is None}
        for pooling in ("max", "last", None)
        for rows in (min(args.rows), most)
    ]
    return listed


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every case in this process, and put the vectors into a file."""
    torch.set_num_threads(1)
    results, vectors = [], []
    for case in cases(args):
        layers = (*range(case["layers"] - 1), -1)
        wanted = Wanted(tuple(case["segments"]), case["pooling"], layers, tokens=case["tokens"])
        count, seconds, found = measure_step(case["rows"], wanted, hidden_size=args.hidden_size, steps=args.steps)
        results.append({**case, "operations": count, "ms": 1e3 * seconds})
        vectors.append(torch.stack(found))
    if args.vectors:
        torch.save(vectors, args.vectors)
    return results


def run_revision(root: Path, args: argparse.Namespace, vectors: Path) -> list[dict[str, Any]]:
    """Run this program with the package of another folder."""
    sizes = ["--hidden-size", str(args.hidden_size), "--steps", str(args.steps)]
    lists = ["--rows", *map(str, args.rows), "--layers", *map(str, args.layers)]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", "--vectors", str(vectors), *sizes, *lists],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: list[dict[str, Any]] = json.loads(done.stdout)
    return measured


def unpack_revision(revision: str, into: Path) -> None:
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "torchrl_sglang_hidden"], stdout=subprocess.PIPE, check=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(into, filter="data")


def check_equal(before: Path, after: Path) -> float:
    """Return the largest relative difference of the vectors; one that is too large ends the run."""
    worst = 0.0
    for old, new in zip(torch.load(before), torch.load(after), strict=True):
        worst = max(worst, float(((new - old).norm() / old.norm()).max()))
    if not worst < RTOL:
        raise SystemExit(f"the vectors differ by {worst:.1e} relative, over {RTOL:.0e}; no figure means anything")
    return worst


def table_of(args: argparse.Namespace, now: list[dict[str, Any]], then: list[dict[str, Any]] | None) -> Table:
    title = (
        f"one decode step of the server half, D = {args.hidden_size}, bfloat16 states, medians of {args.steps} steps"
    )
    table = Table(title=title)
    for heading in ("rows", "layers", "what"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for side in ("before", "now") if then else ("now",):
        table.add_column(f"operations {side}", justify="right")
        table.add_column(f"ms {side}", justify="right")
    for n, case in enumerate(now):
        what = "every token's states" if case["tokens"] else f"{case['pooling']} of {' + '.join(case['segments'])}"
        sides = [then[n], case] if then else [case]
        figures = [figure for side in sides for figure in (str(side["operations"]), f"{side['ms']:.3f}")]
        table.add_row(str(case["rows"]), str(case["layers"]), what, *figures)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(BATCHES), help="rows of the batch")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="layers that each row wants")
    parser.add_argument("--hidden-size", type=int, default=8, help="D")
    parser.add_argument("--steps", type=int, default=30, help="steps that count")
    parser.add_argument("--before", default=BEFORE, help="revision to compare with; empty for none")
    parser.add_argument("--measure", action="store_true", help="measure this process's package, and print JSON only")
    parser.add_argument("--vectors", help="with --measure: write the vectors to this file")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_all(args)))
        return
    console = Console(width=None if Console().is_terminal else 140)
    with tempfile.TemporaryDirectory() as folder, console.status("measuring"):
        now = run_revision(ROOT, args, Path(folder, "now.pt"))
        then, worst = None, None
        if args.before:
            unpack_revision(args.before, Path(folder))
            then = run_revision(Path(folder), args, Path(folder, "before.pt"))
            worst = check_equal(Path(folder, "before.pt"), Path(folder, "now.pt"))
    console.print(table_of(args, now, then))
    if worst is not None:
        console.print(f"the vectors of both differ by at most {worst:.0e} relative", highlight=False)
    setting = {"hidden_size": args.hidden_size, "steps": args.steps, "before": args.before or None}
    print(json.dumps({"benchmark": "step_cost", **setting, "now": now, "then": then}))


if __name__ == "__main__":
    main()
