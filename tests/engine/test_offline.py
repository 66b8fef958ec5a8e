"""`sglang.Engine` in process against Hugging Face: one that `SGLangOffline` starts, and one that a user made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import CHUNKED_PREFILL_SIZE, POOLINGS, SEGMENTS, Row, assert_row, prompt_of

SCRIPT = Path(__file__).with_name("offline_check.py")
TIMEOUT_S = 400

ENGINES = ["own", "given"]
CASES: list[dict[str, Any]] = [
    *(
        {
            "segments": SEGMENTS,
            "pooling": pooling,
            "prompts": [prompt_of(length, seed=length) for length in (1, 12, CHUNKED_PREFILL_SIZE + 30)],
            "generate": {"temperature": temperature, "max_new_tokens": 6},
        }
        for pooling in POOLINGS
        for temperature in (0, 1.0)
    ),
    {
        "segments": ["response"],
        "pooling": "mean",
        "prompts": [prompt_of(3 + row, seed=100 + row) for row in range(17)],
        "generate": {"temperature": 0, "max_new_tokens": 1},
    },
]


@pytest.fixture(scope="module")
def found(smol_dir: str, qwen3_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What offline_check.py found: SmolLM2 in an engine of ours, Qwen3 in an engine of the user's."""
    directory = tmp_path_factory.mktemp("offline")
    job, result, log = directory / "job.json", directory / "result.json", directory / "log.txt"
    job.write_text(
        json.dumps(
            {
                "server_args": {"dtype": "float32", "chunked_prefill_size": CHUNKED_PREFILL_SIZE},
                "own": {"model_dir": smol_dir, "cases": CASES},
                "given": {"model_dir": qwen3_dir, "cases": CASES},
            }
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(job), str(result)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return json.loads(result.read_text())


def row_from(json_row: dict[str, Any]) -> Row:
    vectors = {name: torch.tensor(vector) for name, vector in json_row["vectors"].items()}
    return Row(**{**json_row, "vectors": vectors, "log_probs_T": torch.tensor(json_row["log_probs_T"])})


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("pass_name", ["results", "from_threads"])
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_hugging_face(
    found: dict[str, Any], smol_dir: str, qwen3_dir: str, engine: str, pass_name: str, index: int
) -> None:
    """The second pass comes from two threads at once, with every prompt in the prefix cache."""
    case, model_dir = CASES[index], smol_dir if engine == "own" else qwen3_dir
    outcome = found[engine][pass_name][index]
    assert not isinstance(outcome, str), outcome
    rows = [row_from(row) for row in outcome]
    assert [row.prompt_ids for row in rows] == case["prompts"]
    for row in rows:
        # SGLang returns the log-probs of the tempered distribution; at temperature 0 those of temperature 1.
        truth = assert_row(row, model_dir, case["pooling"])
        assert len(row.response_ids) <= case["generate"]["max_new_tokens"]
        if case["generate"]["temperature"] == 0:
            assert row.response_ids == truth.argmax_T


@pytest.mark.parametrize("engine", ENGINES)
def test_vectors_travel_as_raw_bytes(found: dict[str, Any], engine: str) -> None:
    assert len(found[engine]["carried_bytes"]) >= len(CASES)
    assert all(found[engine]["carried_bytes"])


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_ids_do_not_reach_the_engine(found: dict[str, Any], engine: str) -> None:
    assert found[engine]["refused"] == "TokenIdError"


def test_an_engine_of_the_user_stays_his_to_shut_down(found: dict[str, Any]) -> None:
    assert found["given"]["alive_after_close"]


def test_sampling_was_sampling(found: dict[str, Any]) -> None:
    greedy, sampled = found["own"]["results"][0], found["own"]["results"][1]
    assert [row["response_ids"] for row in greedy] != [row["response_ids"] for row in sampled]
