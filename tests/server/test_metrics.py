"""The server half's counters where operators look: SGLang's internal state, and its metrics, in a directory's files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang_hidden import counters
from torchrl_sglang_hidden.counters import ServerCounters, Tally, timed
from torchrl_sglang_hidden.server import metrics

# Of two processes that count, and SGLang's HTTP server, which reads both. prometheus_client reads its variable once.
PROGRAM = """
import multiprocessing, os
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.server.metrics import publish_here

def count(rows):
    publish_here(SimpleNamespace(enable_metrics=True, served_model_name="smol", model_path="m"))
    SERVER.add(rows=rows, step_seconds=0.25)

SERVER.add(requests=1)
for rows in (3, 4):
    child = multiprocessing.get_context("fork").Process(target=count, args=(rows,))
    child.start()
    child.join()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_they_stand_beside_sglangs(tmp_path: Path) -> None:
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert 'torchrl_sglang_hidden:rows_total{model_name="smol"} 7.0' in lines, done.stderr
    assert 'torchrl_sglang_hidden:step_seconds_total{model_name="smol"} 0.5' in lines
    assert 'torchrl_sglang_hidden:requests_total{model_name="smol"} 2.0' in lines, "what each counted before is in it"
    assert 'torchrl_sglang_hidden:refusals_total{model_name="smol"} 0.0' in lines, "a counter that is 0 is there"


def test_a_server_without_metrics_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert not metrics.publish(Tally(ServerCounters), "m")
    monkeypatch.setattr(metrics, "publish", lambda *args: pytest.fail("metrics are off"))
    metrics.publish_here(SimpleNamespace(enable_metrics=False))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_schedulers_process_publishes_when_it_is_made(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    monkeypatch.setattr(metrics, "publish", lambda *call: published.append(call))
    server_args = SimpleNamespace(enable_metrics=enabled, served_model_name=None, model_path="m")
    # As SGLang's registry calls it: with what the method returned, and the object.
    metrics.after_streamer_class(object, SimpleNamespace(server_args=server_args))
    assert published == ([(metrics.SERVER, "m")] if enabled else [])


def test_every_counter_says_what_it_is() -> None:
    assert set(metrics._SAYS) == {field.name for field in fields(ServerCounters)}


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Tally[ServerCounters]:
    tally = Tally(ServerCounters)
    monkeypatch.setattr(metrics, "SERVER", tally)
    monkeypatch.setattr(counters, "SERVER", tally)
    return tally


def test_the_internal_state_has_them(tally: Tally[ServerCounters]) -> None:
    metrics.after_weight_version(None, SimpleNamespace())
    output = SimpleNamespace(internal_state={"torchrl_sglang_hidden": {"protocol": 7}})
    metrics.after_internal_state(output, SimpleNamespace(), None)
    assert ServerCounters.of([output.internal_state[metrics.COUNTERS]]) == ServerCounters(weight_updates=1)
    assert output.internal_state["torchrl_sglang_hidden"] == {"protocol": 7}, "an older client reads it as before"


def test_time_is_measured_when_it_fails_too(tally: Tally[ServerCounters]) -> None:
    class Part:
        @timed
        def work(self, value: Any) -> Any:
            return 1 / value

    assert Part().work(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        Part().work(0)
    assert tally.read().step_seconds > 0
