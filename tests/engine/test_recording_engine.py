"""Recordings of a real server: text, pooled states and token states are Hugging Face's, also after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import heads_oracle, hf_oracle
from helpers.policy_checks import STATE_RTOL, relative_error
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from torchrl_sglang_hidden import (
    HeadSpec,
    HiddenSpec,
    SGLangHiddenWrapper,
    SGLangServer,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.cli import app
from torchrl_sglang_hidden.rl import record

Policy = Callable[..., SGLangHiddenWrapper]
PROMPT = "You see the number {number}, and then"
ROWS = [{"number": number} for number in range(5)]
SEGMENTS = ("prompt", "response")
NEW_TOKENS = 4


def recorded(policy: Policy, path: Path, rows: Any = ROWS) -> Any:
    asked = policy("text", segments=SEGMENTS, max_new_tokens=NEW_TOKENS)
    return record_hidden_states(
        asked, rows, path, prompt=PROMPT, batch_size=2, tokens=True, dtype=torch.float32, progress=False
    )


def test_every_row_is_hugging_faces_also_after_an_interruption(
    policy: Policy, smol_dir: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)

    def stops() -> Iterator[dict[str, int]]:
        yield from ROWS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(policy, tmp_path / "r", stops())
    assert len(load_recording(tmp_path / "r")) == 2
    out = recorded(policy, tmp_path / "r").tensordict
    assert out["number"].tolist() == [0, 1, 2, 3, 4]
    for number, row in enumerate(out.unbind(0)):
        ids, sampled = row["prompt_ids"].tolist(), row["response_ids"].tolist()
        assert ids == tokenizer(PROMPT.format(number=number))["input_ids"]
        truth = hf_oracle.teacher_force(smol_dir, ids, sampled)
        assert sampled == truth.argmax_T
        assert len(sampled) == NEW_TOKENS
        assert row["text_generated"] == tokenizer.decode(sampled, skip_special_tokens=True)
        for segment in SEGMENTS:
            assert relative_error(row["hidden_states", segment], truth.pooled(segment, "mean")) < STATE_RTOL
            assert row["hidden_states", f"{segment}_count"] == len(truth.rows(segment))
            assert relative_error(row["token_hidden_states", segment], truth.rows(segment)) < STATE_RTOL


def test_scores_of_heads_are_recorded(policy: Policy, smol: SGLangServer, smol_dir: str, tmp_path: Path) -> None:
    head = heads_oracle.make_head("mlp", 576, seed=5, layer=4, normalize="rms")
    version = smol.push_head("recorded", head)
    asked = policy("text", segments=SEGMENTS, max_new_tokens=NEW_TOKENS)
    asked = asked.get_new_version(heads=HeadSpec(("recorded",), SEGMENTS))
    out = record_hidden_states(asked, ROWS, tmp_path / "r", prompt=PROMPT, tokens=True, progress=False).tensordict
    smol.drop_head("recorded")
    for row in out.unbind(0):
        ids, sampled = row["prompt_ids"].tolist(), row["response_ids"].tolist()
        expected = heads_oracle.expected(head, smol_dir, ids, sampled, (4,))
        for segment in SEGMENTS:
            heads_oracle.assert_scores(row["head_scores", segment, "recorded"], expected[segment], segment)
        assert row["head_scores", "versions", "recorded"] == version


def test_text_that_is_there_and_layers(policy: Policy, smol_dir: str, tokenizer: Any, tmp_path: Path) -> None:
    reads = policy("text", segments=("prompt",), max_new_tokens=0).get_new_version(
        hidden=HiddenSpec(("prompt",), layers=(10, -1))
    )
    rows = [{"text_generated": f"The answer is {number}."} for number in range(3)]
    out = record_hidden_states(reads, rows, tmp_path / "r", prompt="{text_generated}", progress=False).tensordict
    for row, found in zip(rows, out["hidden_states", "prompt"], strict=True):
        truth = hf_oracle.teacher_force(smol_dir, tokenizer(row["text_generated"])["input_ids"], [0], layers=(10,))
        for place, layer in enumerate((10, -1)):
            assert relative_error(found[place], truth.pooled("prompt", "mean", layer)) < STATE_RTOL


def test_the_command(smol: SGLangServer, smol_dir: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    arguments = ["record", str(tmp_path / "data.jsonl"), str(tmp_path / "r"), "--url", smol.url, "--prompt", PROMPT]
    result = CliRunner().invoke(app, [*arguments, "--every", "2"])
    assert result.exit_code == 0, result.output
    out = load_recording(tmp_path / "r").tensordict
    for number, row in enumerate(out.unbind(0)):
        ids = tokenizer(PROMPT.format(number=number - number % 2))["input_ids"]
        truth = hf_oracle.teacher_force(smol_dir, ids, [0])
        assert relative_error(row["hidden_states", "prompt"], truth.pooled("prompt", "mean")) < STATE_RTOL
