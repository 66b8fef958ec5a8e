"""The program `tutorials/online_rl.py`, over the fake engine: it learns, saves, and goes on from what it saved."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import online_rl
import pytest
import torch
import typer
from helpers.fake_engine import RecordingEngine
from helpers.policy_batches import TOKENIZER
from instructions import HELD_OUT_WORDINGS, SENTENCES, THINGS, InstructionEnv
from online_rl import Options, Trainer, run
from tensordict import TensorDict
from torchrl.envs import check_env_specs
from typer.testing import CliRunner

from torchrl_sglang_hidden import SGLangHiddenWrapper

SMALL = Options(envs=16, steps=512, project=16)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RecordingEngine:
    """The fake engine's words are numbers: the thing, and the wording."""
    monkeypatch.setattr(online_rl, "SGLangHiddenWrapper", partial(SGLangHiddenWrapper, tokenizer=TOKENIZER))
    monkeypatch.setattr(
        online_rl,
        "read_instruction",
        lambda row: f"w{int(row['instruction']) % 4} w{5 + int(row['instruction']) // 4}",
    )
    return RecordingEngine(tokenizer=TOKENIZER)


def test_the_environment_is_one() -> None:
    check_env_specs(InstructionEnv(5))
    found = InstructionEnv(64, seed=3).rollout(40, break_when_any_done=False)
    assert found["next", "done"].sum() > 64  # each ends by itself, and goes on
    trained, held_out = (
        set(InstructionEnv(500, held_out=held).reset()["instruction"].flatten().tolist()) for held in (False, True)
    )
    assert trained.isdisjoint(held_out)
    assert {SENTENCES[number] for number in held_out} == {w.format(thing=t) for w in HELD_OUT_WORDINGS for t in THINGS}


def test_a_reset_of_one_changes_nothing_of_the_others() -> None:
    env = InstructionEnv(6)
    first = env.reset()
    mask = torch.tensor([True, False] * 3)[:, None]
    again = env.reset(first.clone().set("_reset", mask))
    for key in ("thing", "instruction"):
        torch.testing.assert_close(again[key][1::2], first[key][1::2])
    # What is shown is what a step is judged by: after a reset of others too.
    right = again["thing"].argmax(-1) == again["instruction"][:, 0] % len(THINGS)
    rewards = env.step(again.set("action", torch.ones(6, dtype=torch.int64)))["next", "reward"][:, 0]
    torch.testing.assert_close(rewards, torch.where(right, 1.0, -1.0))


@pytest.mark.parametrize(("knows", "expected"), [(True, 1.0), (False, 0.0)])
def test_only_the_instruction_tells_what_to_take(knows: bool, expected: float) -> None:
    env = InstructionEnv(2000)

    def act(td: TensorDict) -> TensorDict:
        right = td["thing"].argmax(-1) == td["instruction"][:, 0] % len(THINGS)
        return td.set("action", right.long() if knows else torch.ones_like(right, dtype=torch.int64))

    found = env.rollout(8, act, break_when_any_done=False, auto_cast_to_device=False)
    ended = found["next", "done"]
    assert found["next", "reward"][ended].mean() == pytest.approx(expected, abs=0.03)


def test_it_learns_and_its_control_does_not(engine: RecordingEngine) -> None:
    rewards = {}
    for ablate in (None, "zero"):
        trainer = Trainer(engine, Options(envs=64, steps=24_576, ablate=ablate, project=16))
        found = [trainer.train(batch)["reward"] for batch in trainer.collect()]
        rewards[ablate] = sum(found[-4:]) / 4
    assert rewards[None] > 0.6 > 0.2 > abs(rewards["zero"])


def test_every_sentence_is_asked_once(engine: RecordingEngine, tmp_path: Path) -> None:
    run(engine, SMALL, tmp_path)
    prompts = [request.prompt_ids for request in engine.requests]
    # The evaluation has wordings and a cache of its own.
    assert len(prompts) == len(set(prompts)) <= len(SENTENCES)


def test_it_goes_on_from_a_checkpoint(engine: RecordingEngine, tmp_path: Path) -> None:
    run(engine, SMALL, tmp_path)
    checkpoint = tmp_path / "none" / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["frames"] == 512
    assert list((tmp_path / "none").glob("events*"))
    longer = replace(SMALL, steps=768)
    trainer = Trainer(engine, longer)
    trainer.load(checkpoint)
    for name, value in trainer.agent.state_dict().items():
        torch.testing.assert_close(value, saved["agent"][name])
    assert [len(batch.reshape(-1)) for batch in trainer.collect()] == [256]
    run(engine, longer, tmp_path, resume=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["frames"] == 768


def test_a_checkpoint_that_is_not_there_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_rl, "launch", lambda *args, **options: pytest.fail("a server was started"))
    app = typer.Typer()
    app.command()(online_rl.main)
    result = CliRunner().invoke(app, ["--resume", "nowhere.pt"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "'nowhere.pt' does not exist" in result.stderr


@pytest.mark.parametrize("other", [{"ablate": "zero"}, {"envs": 32}, {"layer": 0}])
def test_a_checkpoint_of_another_run_is_refused(engine: RecordingEngine, tmp_path: Path, other: dict[str, Any]) -> None:
    Trainer(engine, SMALL).save(tmp_path / "checkpoint.pt")
    trainer = Trainer(engine, replace(SMALL, **other))
    with pytest.raises(typer.BadParameter, match=rf"of other options, .*{next(iter(other))}"):
        trainer.load(tmp_path / "checkpoint.pt")
