"""`sglang.Engine` in process against Hugging Face: one that `SGLangOffline` starts, and one that a user made.

The user's reads images too: an engine of its own for them would have to stand in one more process, since SGLang has one
in each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.offline_images import CHECKS
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, POOLINGS, SEGMENTS, Row, assert_row, prompt_of
from helpers.user_engine_program import run_cases
from helpers.vlm_models import SAVERS
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangOffline

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "helpers" / "user_engine_program.py"
TIMEOUT_S = 400

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
def vision_dir(smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(SAVERS["qwen2_5_vl"](tmp_path_factory.mktemp("vision") / "qwen2_5_vl", smol_dir))


@pytest.fixture(scope="module")
def given(vision_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what user_engine_program.py found with Qwen2.5-VL in an engine that the user made."""
    directory = tmp_path_factory.mktemp("offline")
    job, result, log = directory / "job.json", directory / "result.json", directory / "log.txt"
    server_args = {"dtype": "float32", "chunked_prefill_size": CHUNKED_PREFILL_SIZE, "sleep_on_idle": True}
    job.write_text(json.dumps({"model_dir": vision_dir, "server_args": server_args, "cases": CASES}))
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
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


def check_case(case: dict[str, Any], outcome: list[dict[str, Any]] | str, model_dir: str) -> None:
    assert not isinstance(outcome, str), outcome
    rows = [row_from(row) for row in outcome]
    assert [row.prompt_ids for row in rows] == case["prompts"]
    for row in rows:
        # SGLang returns the log-probs of the tempered distribution; at temperature 0 those of temperature 1.
        truth = assert_row(row, model_dir, case["pooling"])
        assert len(row.response_ids) <= case["generate"]["max_new_tokens"]
        if case["generate"]["temperature"] == 0:
            assert row.response_ids == truth.argmax_T


def check_way(found: dict[str, Any]) -> None:
    """Check that vectors travelled as raw bytes, and that bad ids were refused before they were sent."""
    assert len(found["carried_bytes"]) >= len(CASES)
    assert all(found["carried_bytes"])
    assert found["refused"] == "TokenIdError"


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    def test_equals_hugging_face(
        self, in_process: SGLangOffline, tokenizer: PreTrainedTokenizerBase, smol_dir: str
    ) -> None:
        found = run_cases(in_process, in_process.engine, tokenizer, CASES)
        for index, case in enumerate(CASES):
            for outcomes in (found["results"], found["from_threads"]):
                check_case(case, outcomes[index], smol_dir)
        check_way(found)
        greedy, sampled = found["results"][0], found["results"][1]
        assert [row["response_ids"] for row in greedy] != [row["response_ids"] for row in sampled]


def test_in_process(in_process_log: str) -> None:
    assert "InProcess::test_equals_hugging_face PASSED" in in_process_log


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("pass_name", ["results", "from_threads"])
def test_an_engine_of_the_user_equals_hugging_face(
    given: dict[str, Any], vision_dir: str, pass_name: str, index: int
) -> None:
    """The second pass comes from two threads at once, with every prompt in the prefix cache."""
    check_case(CASES[index], given[pass_name][index], vision_dir)


@pytest.mark.parametrize("check", CHECKS)
def test_an_engine_of_the_user_reads_images(given: dict[str, Any], check: str) -> None:
    assert given["image_failures"][check] == ""


def test_an_engine_of_the_user_is_fed_as_ours_is(given: dict[str, Any]) -> None:
    check_way(given)


def test_an_engine_of_the_user_stays_his_to_shut_down(given: dict[str, Any]) -> None:
    assert given["alive_after_close"]
