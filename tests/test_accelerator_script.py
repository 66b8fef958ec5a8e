"""The script for an accelerator runs on a CPU, and its path through graphs with graphs that torch records."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import accelerator
import pytest
import torch
from helpers.fake_graphs import FakeGraph

from torchrl_sglang_hidden.server.step_rows import StepPlan

NUM_CASES = 4


class FakeCuda(SimpleNamespace):
    """What the script uses of ``torch.cuda``; it keeps the order of what would run on the device."""

    def __init__(self) -> None:
        super().__init__(order=[])

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.time_ms = -1.0

            def record(event) -> None:
                self.order.append("event")
                event.time_ms = float(len(self.order))

            def synchronize(event) -> None:
                assert event.time_ms > 0, "nobody recorded what is waited for"
                self.order.append("wait")

            def elapsed_time(event, end: Any) -> float:
                return float(end.time_ms - event.time_ms)

        class Stream:
            def wait_stream(stream, other: Any) -> None:
                assert other is not stream
                self.order.append("wait_stream")

        class Graph(FakeGraph):
            def replay(graph) -> None:
                self.order.append("replay")
                super().replay()

        @contextmanager
        def graph(recorded: FakeGraph) -> Iterator[None]:
            with recorded.recording():
                yield

        self.parts = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda: self.order.append("synchronize"),
            "is_current_stream_capturing": lambda: False,
        }


def cases(name: str) -> Any:
    return next(case for case in accelerator.cases_of(3, [16]) if name in case.name)


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--device", "cpu", "--batch", "3", "--hidden", "16", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *options])
    accelerator.main()
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["benchmark"], found["batch"], found["hidden"]) == ("accelerator", 3, [16])
    assert len(found["cases"]) == NUM_CASES
    assert all(case["host_us"] > 0 and case["worst_relative_difference"] == 0 for case in found["cases"])


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["accelerator.py"])
    with pytest.raises(SystemExit, match="torch sees no GPU here; run with --device cpu"):
        accelerator.main()


@pytest.mark.parametrize("name", ["K=1", "K=4", "K=36", "logits"])
def test_graphs_streams_and_events(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cuda = FakeCuda()
    for part, value in cuda.parts.items():
        monkeypatch.setattr(torch.cuda, part, value)
    device = accelerator.Device("cpu")
    device.is_cuda = True
    device.forward_stream, device.copy_stream = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.inference_mode():
        found = accelerator.measure(cases(name), device, 6)
    assert found["worst_relative_difference"] == 0
    assert found["device_us"] > 0
    # Of the six decode steps with the server half: a step is launched before the one before it is waited for.
    steps = "".join({"replay": "R", "wait": "w"}.get(part, "") for part in cuda.order)
    assert "RwRwRwRwRwRw" in steps


def test_wrong_answers_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = StepPlan.gather

    def gather(self: StepPlan, states: Any) -> Any:
        calls.append(1)
        spoilt = {layer: state_ND + (0.1 if len(calls) > 4 else 0) for layer, state_ND in states.items()}
        return original(self, spoilt)

    monkeypatch.setattr(StepPlan, "gather", gather)
    with torch.inference_mode(), pytest.raises(SystemExit, match=r"K=1: the device.s answers are .* off the CPU's"):
        accelerator.measure(cases("K=1"), accelerator.Device("cpu"), 3)
    with pytest.raises(SystemExit, match="answers of other shapes"):
        accelerator.worst_difference([torch.ones(2)], [torch.ones(3)])
