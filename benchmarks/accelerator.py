"""The server half's own classes on an accelerator: their results against a CPU's, and what a decode step costs.

A toy decoder stands in for a model: its layers add numbers, so that a device computes what a CPU does, to the last bit.
Its decode steps are CUDA graphs, captured and replayed with the hooks on its layers. Around it everything is as in
SGLang's scheduler with overlap: the forward pass on one stream, copies to pinned memory on another, and a step's
results are consumed when the next step is under way. No model is loaded, and no server runs.

Of each case the requests' answers are compared with those of a CPU without graphs, for all of them. Then a step's cost
is shown, in microseconds: what the scheduler's thread spends in the server half, what its operations take on the
device, and what a graph takes longer because it records the layers.

    python benchmarks/accelerator.py                                    # on a GPU, ten minutes at most
    python benchmarks/accelerator.py --device cpu --batch 8 --hidden 64 --steps 4
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stand_ins import PROMPT_TOKENS, Request, answer_of
from torch import nn

from torchrl_sglang_hidden.protocol import unpack_answer
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.layer_setup import attach_taps
from torchrl_sglang_hidden.server.next_tokens import plan_logits
from torchrl_sglang_hidden.server.settings import Settings
from torchrl_sglang_hidden.spec.constraints import DisallowedTokens
from torchrl_sglang_hidden.spec.logits import LogitsSpec

# The first steps of a case load kernels and fill torch's caches.
WARM_STEPS = 5
# Sums of equal numbers, which may be added in another order.
RTOL = 1e-5


@dataclass(frozen=True)
class Case:
    """One kind of batch.

    Args:
        name: shown in the table.
        batch_size: B.
        hidden_size: D.
        num_layers: of the toy decoder.
        wanted: what each request wants of the states.
        logits: what each request wants of the logits, or None.
        vocab_size: V.
    """

    name: str
    batch_size: int
    hidden_size: int
    num_layers: int
    wanted: Wanted
    logits: WantedLogits | None = None
    vocab_size: int = 32000


class Layer(nn.Module):
    """Adds its number to the residual stream, and hands both parts on as SGLang's layers do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden_ND: torch.Tensor, residual_ND: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual_ND = hidden_ND if residual_ND is None else hidden_ND + residual_ND
        return torch.full_like(residual_ND, self.number), residual_ND


class Decoder(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(1, num_layers + 1))
        self.norm = nn.Identity()

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        residual_ND = None
        for layer in self.layers:
            hidden_ND, residual_ND = layer(hidden_ND, residual_ND)
        return self.norm(hidden_ND + residual_ND)  # type: ignore[no-any-return]


class Device:
    """Streams, events and pinned copies; on a CPU nothing of that, with the same methods."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"
        self.forward_stream, self.copy_stream = (torch.cuda.Stream() if self.is_cuda else None for _ in range(2))

    def on_forward_stream(self) -> Any:
        return torch.cuda.stream(self.forward_stream) if self.is_cuda else nullcontext()

    def mark(self) -> Any:
        """Return an event on the current stream; the clock's time on a CPU."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) * 1e3 if self.is_cuda else (end - start) * 1e6)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Do what SGLang does with each result of a step, on its copy stream."""
        if self.device.type == "cpu":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.copy_stream)
        return host

    @contextmanager
    def copying(self) -> Iterator[list[Any]]:
        """Run the block's copies behind the forward pass; the list gets what to wait for."""
        waits: list[Any] = []
        if not self.is_cuda:
            yield waits
            return
        self.copy_stream.wait_stream(self.forward_stream)
        with torch.cuda.stream(self.copy_stream):
            yield waits
            done = torch.cuda.Event()
            done.record()
            waits.append(done)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


class Model:
    """The toy decoder with the server half's taps, and its decode graph where the device has graphs."""

    def __init__(self, case: Case, device: Device, capture: Capture | None) -> None:
        self.decoder = Decoder(case.num_layers)
        size = (case.batch_size, case.hidden_size)
        self.inputs_BD = torch.zeros(size, dtype=torch.bfloat16, device=device.device)
        self.head_BD = torch.zeros_like(self.inputs_BD)
        self.taps = None if capture is None else capture.taps
        self.graph: Any = None
        if self.taps is not None:
            rows = case.batch_size if device.is_cuda else 0
            config = SimpleNamespace(num_hidden_layers=case.num_layers, hidden_size=case.hidden_size)
            runner = SimpleNamespace(
                model=self.decoder, model_config=config, dtype=torch.bfloat16, device=device.device
            )
            attach_taps(self.taps, runner, Settings(decode_graph_rows=rows, graphs="cuda" if rows else ""))
        if device.is_cuda:
            self._record(case.batch_size)

    def _record(self, num_rows: int) -> None:
        if self.taps is not None:
            self.taps.start_recording(num_rows)
        for _ in range(2):
            self.decoder(self.inputs_BD)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.head_BD = self.decoder(self.inputs_BD)
        if self.taps is not None:
            self.taps.stop_recording()

    def prefill(self, rows_ND: torch.Tensor) -> torch.Tensor:
        head_ND: torch.Tensor = self.decoder(rows_ND)
        return head_ND

    def decode(self, rows_BD: torch.Tensor) -> torch.Tensor:
        if self.graph is None:
            head_BD: torch.Tensor = self.decoder(rows_BD)
            return head_BD
        self.inputs_BD.copy_(rows_BD)
        self.graph.replay()
        if self.taps is not None:
            self.taps.note_replay()
        return self.head_BD


@dataclass
class Launched:
    """A step under way."""

    batch: Any
    hosts: list[Any]
    waits: list[Any]
    commits: list[Any]
    host_s: float


class Scheduler:
    """Drives the server half as SGLang's scheduler does with overlap."""

    def __init__(self, case: Case, device: Device) -> None:
        self.case, self.device, self.capture = case, device, Capture()
        self.model = Model(case, device, self.capture)
        self._check()
        device.synchronize()
        self.requests = [Request(number, case.wanted, case.logits) for number in range(case.batch_size)]
        self.host_us: list[float] = []
        self.events: list[tuple[Any, Any]] = []
        self._waiting: Launched | None = None

    def _check(self) -> None:
        """Run SGLang's warm-up: an eager step that shows what the layers are."""
        taps = self.capture.taps
        taps.open(())
        rows_ND = rows_of(self.case, PROMPT_TOKENS, seed=-1).to(self.device.device)
        head_ND = self.model.prefill(rows_ND)
        taps.check(taps.take(), head_ND)
        if taps.problem or not set(self.case.wanted.layers) <= {-1, *taps.layers}:
            raise SystemExit(f"{self.case.name}: the layers cannot be taken: {taps.problem or taps.limit}")

    def launch(self, mode: str, rows_ND: torch.Tensor, logits_BV: torch.Tensor) -> None:
        """Launch a step, and then consume the step before it."""
        extends = mode == "EXTEND"
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(name=mode),
            reqs=list(self.requests),
            extend_lens=[PROMPT_TOKENS] * len(self.requests) if extends else None,
            prefix_lens=[0] * len(self.requests) if extends else None,
            # Under overlap the host knows the lengths, and not the last token.
            seq_lens_cpu=torch.tensor([len(req.origin_input_ids) + self.num_launched for req in self.requests]),
        )
        taps = self.capture.taps
        with self.device.on_forward_stream():
            start = time.perf_counter()
            plan = self.capture.plan_step(batch)
            step_logits = plan_logits(batch, self.capture.logits, self.case.vocab_size)
            taps.open(() if plan is None else plan.layers)
            host_s = time.perf_counter() - start
            head_ND = self.model.prefill(rows_ND) if extends else self.model.decode(rows_ND)
            begin = self.device.mark()
            start = time.perf_counter()
            devices = []
            if plan is not None:
                devices.append(plan.gather({**taps.take(plan.num_rows), -1: head_ND}))
            if step_logits is not None:
                step_logits.input_ids = torch.zeros(len(rows_ND), dtype=torch.int64, device=self.device.device)
                step_logits.take_raw(logits_BV)
                step_logits.constrain(logits_BV, None)
                devices.append(step_logits.taken())
            host_s += time.perf_counter() - start
            end = self.device.mark()
        with self.device.copying() as waits:
            start = time.perf_counter()
            hosts = [device.copy_to_host(self.device.copy) for device in devices if device is not None]
            host_s += time.perf_counter() - start
        commits = [SimpleNamespace(output_index=self.num_launched) for _ in self.requests]
        self.events.append((begin, end))
        previous, self._waiting = self._waiting, Launched(batch, hosts, waits, commits, host_s)
        self._consume(previous)

    @property
    def num_launched(self) -> int:
        return len(self.events)

    def _consume(self, step: Launched | None) -> None:
        if step is None:
            return
        for done in step.waits:
            done.synchronize()
        for req in self.requests:
            req.output_ids.append(1)
        start = time.perf_counter()
        for host in step.hosts:
            host.consume(step.batch, step.commits)
        self.host_us.append((step.host_s + time.perf_counter() - start) * 1e6)

    def answers(self) -> list[torch.Tensor]:
        """Finish all requests, and return what they got."""
        self._consume(self._waiting)
        self._waiting = None
        found: list[torch.Tensor] = []
        for req in self.requests:
            req.done = True
            answer = unpack_answer(answer_of(self.capture, req), "row", self.case.hidden_size)
            found += [value for value, _ in answer.pools.segments.values() if value is not None]
            if answer.logits is not None and answer.logits.response is not None:
                found.append(answer.logits.response.values_NC)
        return found


def rows_of(case: Case, num_rows: int, seed: int) -> torch.Tensor:
    """Make the embeddings of a step: small whole numbers, which bfloat16 holds."""
    numbers = torch.Generator().manual_seed(seed + 1)
    return torch.randint(-8, 9, (num_rows, case.hidden_size), generator=numbers, dtype=torch.int8).bfloat16()


def run(case: Case, device: Device, steps: int) -> Scheduler:
    """Prefill and decode with the server half."""
    scheduler = Scheduler(case, device)
    columns = case.vocab_size if case.logits is not None else 1
    inputs = []
    # On the stream that reads them: torch gives freed memory to the stream that it was allocated on.
    with device.on_forward_stream():
        for step in range(steps + 1):
            rows_ND = rows_of(case, case.batch_size * (1 if step else PROMPT_TOKENS), step)
            logits_BV = torch.randn(case.batch_size, columns, generator=torch.Generator().manual_seed(step))
            inputs.append((rows_ND.to(device.device), logits_BV.to(device.device)))
    for step, (rows_ND, logits_BV) in enumerate(inputs):
        scheduler.launch("DECODE" if step else "EXTEND", rows_ND, logits_BV)
    return scheduler


def replay_us(case: Case, device: Device, capture: Capture | None, steps: int) -> float:
    """Measure what a decode step of the toy decoder takes on the device."""
    model = Model(case, device, capture)
    rows_BD = rows_of(case, case.batch_size, 0).to(device.device)
    pairs = []
    for _ in range(steps + WARM_STEPS):
        start = device.mark()
        model.decode(rows_BD)
        pairs.append((start, device.mark()))
    device.synchronize()
    return statistics.median(device.microseconds(*pair) for pair in pairs[WARM_STEPS:])


def worst_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative difference of two lists of answers.

    Raises:
        SystemExit: they do not have the same shapes.
    """
    shapes = [[tuple(value.shape) for value in values] for values in (found, expected)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"answers of other shapes: {shapes[0][:3]} … and {shapes[1][:3]} …; no figure holds")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        same = torch.where(one == other, 0.0, (one - other).abs())  # infinities of masked tokens are equal
        worst = max(worst, float(same.max() / other[other.isfinite()].abs().max().clamp_min(1e-6)))
    return worst


def cases_of(batch_size: int, hidden_sizes: Sequence[int]) -> list[Case]:
    """List the cases."""
    response, both = ("response",), ("prompt", "response")
    found = []
    for hidden_size in hidden_sizes:
        for name, layers, segments in (("K=1", (2,), response), ("K=4", (0, 1, 3, -1), both)):
            wanted = Wanted(segments, layers=layers)
            found.append(Case(f"D={hidden_size} {name}", batch_size, hidden_size, 4, wanted))
    first, every = hidden_sizes[0], tuple(range(36))
    found.append(Case(f"D={first} K=36", batch_size, first, 36, Wanted(response, layers=every)))
    logits = WantedLogits(LogitsSpec(top_k=8), (DisallowedTokens((1, 2, 3)),))
    found.append(Case(f"D={first} K=1, logits", batch_size, first, 4, Wanted(response), logits))
    return found


def measure(case: Case, device: Device, steps: int) -> dict[str, Any]:
    """Run one case on the device and on a CPU, compare, and return its figures.

    Raises:
        SystemExit: the answers differ.
    """
    expected = run(case, Device("cpu"), steps).answers()
    scheduler = run(case, device, steps)
    found = scheduler.answers()
    device.synchronize()
    apart = worst_difference(found, expected)
    if not apart <= RTOL:
        raise SystemExit(f"{case.name}: the device's answers are {apart:.2g} off the CPU's; no figure holds")
    decode = slice(1 + min(WARM_STEPS, steps - 1), None)
    on_device = [device.microseconds(*pair) for pair in scheduler.events[decode]]
    recording = replay_us(case, device, Capture(), steps) - replay_us(case, device, None, steps)
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "host_us": statistics.median(scheduler.host_us[decode]),
        "device_us": statistics.median(on_device),
        "recording_us": recording,
        "worst_relative_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: the same without graphs and streams")
    parser.add_argument("--batch", type=int, default=256, help="rows of the batch")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192], help="hidden sizes")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of each case")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; run with --device cpu, or on a machine with one")
    console = Console(width=None if Console().is_terminal else 140)
    torch.set_num_threads(1)  # what SGLang gives its scheduler beside a GPU
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    device = Device(args.device)
    with torch.inference_mode():
        figures = [measure(case, device, args.steps) for case in cases_of(args.batch, args.hidden)]
    table = Table(title=f"{name}: {args.batch} rows, µs of a decode step, median of {args.steps} steps")
    for heading in ("case", "host", "device", "recording in the graph", "worst difference"):
        table.add_column(heading)
    for row in figures:
        recording = f"{row['recording_us']:.0f}" if device.is_cuda else "no graph"
        table.add_row(
            row["case"],
            f"{row['host_us']:.0f}",
            f"{row['device_us']:.0f}",
            recording,
            f"{row['worst_relative_difference']:.1g}",
        )
    console.print(table)
    print(
        json.dumps(
            {"benchmark": "accelerator", **vars(args), "name": name, "torch": torch.__version__, "cases": figures}
        )
    )


if __name__ == "__main__":
    main()
