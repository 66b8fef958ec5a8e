"""The demo and ``serve`` on a real server: what lands on disk, and that the lines ``serve`` prints work as printed."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import torch
from helpers.policy_checks import assert_row, rows_of
from rich.console import Console
from tensordict import TensorDict, TensorDictBase

from torchrl_sglang_hidden import HiddenStates, SGLangServer
from torchrl_sglang_hidden.demo.prompts import MAX_NEW_TOKENS, PROMPTS
from torchrl_sglang_hidden.demo.run import DemoResult, run_demo
from torchrl_sglang_hidden.server.__main__ import API_KEY_ENV

KEY = "a-key-for-this-test"
SEGMENTS = ("prompt", "response")


@dataclass(frozen=True)
class Demo:
    result: DemoResult
    printed: str


@pytest.fixture(scope="module")
def demo(smol: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = io.StringIO()
    directory = tmp_path_factory.mktemp("demo") / "output"
    return Demo(run_demo(output_dir=directory, model=smol, console=Console(file=out, width=100)), out.getvalue())


@pytest.fixture
def loaded(demo: Demo) -> TensorDictBase:
    return TensorDict.load_memmap(demo.result.rollout_path)


def test_the_saved_tensordict_has_everything(loaded: TensorDictBase) -> None:
    assert loaded.batch_size == (len(PROMPTS),)
    assert [*zip(loaded["kind"], loaded["query"], strict=True)] == [(prompt.kind, prompt.text) for prompt in PROMPTS]
    assert isinstance(loaded["hidden_states"], HiddenStates)
    keys = {
        "query", "kind", "text", "tokens", "masks", "log_probs", "history", "hidden_states", "finish_reason",
        "weight_version", "done", "terminated", "next",
    }  # fmt: skip
    assert keys <= set(loaded.keys())
    for segment in SEGMENTS:
        vectors_BD = loaded["hidden_states", segment]
        assert (vectors_BD.shape, vectors_BD.dtype) == ((len(PROMPTS), 576), torch.float32)
        assert vectors_BD.isfinite().all()


def test_counts_equal_token_counts(loaded: TensorDictBase) -> None:
    for segment in SEGMENTS:
        lengths = [len(ids) for ids in loaded.get(("tokens", segment), as_list=True)]
        assert loaded["hidden_states", f"{segment}_count"].tolist() == lengths
    log_probs = loaded.get(("log_probs", "response"), as_list=True)
    assert [len(row) for row in log_probs] == loaded["hidden_states"].response_count.tolist()
    # Ragged, or this would prove nothing of the rows' lengths.
    assert len({len(row) for row in log_probs}) > 1
    assert max(len(row) for row in log_probs) <= MAX_NEW_TOKENS


def test_saved_rows_equal_hugging_face(loaded: TensorDictBase, smol_dir: str) -> None:
    rows = rows_of(loaded, SEGMENTS)
    # One of each batch, and of three kinds.
    for index in (4, 12, 20):
        assert_row(rows[index], smol_dir)


def test_the_model_knows_its_capitals(loaded: TensorDictBase) -> None:
    answers = dict(zip(loaded["query"], loaded["text"].response, strict=True))
    assert "Paris" in answers["What is the capital of France?"]
    assert "Nairobi" in answers["What is the capital of Kenya?"]


def test_the_table_has_a_line_per_prompt_with_what_was_measured(demo: Demo, loaded: TensorDictBase) -> None:
    lines = demo.printed.splitlines()
    log_probs = loaded.get(("log_probs", "response"), as_list=True)
    for index, prompt in enumerate(PROMPTS):
        (line,) = [line for line in lines if line.startswith(f" {prompt.text} ")]
        tokens, mean, pooled, norm = line.split()[-4:]
        assert int(tokens) == int(pooled) == len(log_probs[index])
        assert math.isclose(float(mean), log_probs[index].mean(), abs_tol=0.006)
        assert math.isclose(float(norm), loaded["hidden_states"].response[index].norm(), abs_tol=0.06)


def test_the_picture_separates_the_kinds(demo: Demo, loaded: TensorDictBase) -> None:
    assert matplotlib.image.imread(demo.result.picture_path).shape == (900, 1350, 4)
    # What it is drawn from: nearly every prompt has one of its own kind as its nearest neighbour.
    vectors_BD = loaded["hidden_states"].prompt
    distances_BB = torch.cdist(vectors_BD, vectors_BD).fill_diagonal_(torch.inf)
    kinds = list(loaded["kind"])
    same = [kinds[other] == kinds[row] for row, other in enumerate(distances_BB.argmin(1).tolist())]
    assert sum(same) >= 22


@pytest.fixture(scope="module")
def serving(smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``serve`` as a user starts it, with a key, and all that it printed once it was ready."""
    log_file = tmp_path_factory.mktemp("serve") / "server.log"
    command = [sys.executable, "-m", "torchrl_sglang_hidden", "serve", smol_dir, "--log-file", str(log_file)]
    with subprocess.Popen(
        [*command, "--dtype", "float32", "--sleep-on-idle"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, API_KEY_ENV: KEY},
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("print("):
                break
        yield process, printed
        process.kill()


def test_serve_prints_lines_that_work_and_ends_on_sigterm(serving: tuple[subprocess.Popen[str], str]) -> None:
    process, printed = serving
    assert KEY not in printed
    snippet = printed[printed.index("from torchrl_sglang_hidden import") :]
    assert 'api_key="…"' in snippet
    for key, expected in ((KEY, "torch.Size([1, 576])"), ("wrong", "AuthenticationError")):
        code = snippet.replace("…", key)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert expected in done.stdout + done.stderr
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert process.stdout is not None
    assert process.stdout.read().endswith("Stopped.\n")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_serve_tells_what_sglang_refused(smol_dir: str, tmp_path: Path) -> None:
    """In the words of `LaunchError`, which `launch` raises where SGLang does not know an argument."""
    command = [sys.executable, "-m", "torchrl_sglang_hidden", "serve", smol_dir, "--log-file", str(tmp_path / "log")]
    done = subprocess.run(
        [*command, "--no-such-argument", "1"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the server ended with exit code 2")
    assert "unrecognized arguments: --no-such-argument 1" in done.stderr
    assert str(tmp_path / "log") in done.stderr
