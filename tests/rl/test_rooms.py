"""The rooms of `tutorials/rooms.py`: their missions decide, and the trainer's parts fit together."""

from __future__ import annotations

import pytest
import torch
from helpers.policy_batches import make
from rooms import ACTIONS, MAX_STEPS, GridChannels, Room, Trainer, make_rooms, read_mission
from torchrl.envs import TransformedEnv, check_env_specs

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform

PICK_UP = ACTIONS.index("pick up")


def things_of(room: Room) -> list[tuple[str, str]]:
    cells = room.unwrapped.grid.grid
    return [(cell.color, cell.type) for cell in cells if cell is not None and cell.type != "wall"]


@pytest.mark.parametrize("pixels", [False, True])
def test_the_rooms_are_an_environment(pixels: bool) -> None:
    check_env_specs(make_rooms(3, pixels=pixels))
    found = make_rooms(16, seed=3).rollout(2 * MAX_STEPS, break_when_any_done=False)
    assert found["next", "done"].sum() > 16  # each ends by itself, and goes on


def test_the_mission_is_a_sentence_about_one_of_two_things_that_differ() -> None:
    room = Room()
    for seed in range(40):
        room.reset(seed=seed)
        things = things_of(room)
        assert len(set(things)) == len(things) == 2
        *_, color, kind = room.unwrapped.mission.split()
        assert (color, kind) in things
        assert {*dict(things), *dict(map(reversed, things))} <= {"red", "blue", "key", "ball"}
    rows = make_rooms(5, seed=2)
    td = rows.reset()
    assert [read_mission(row) for row in td.unbind(0)] == [env.unwrapped.mission for env in rows.envs]


@pytest.mark.parametrize("right", [True, False])
def test_the_right_thing_is_rewarded_and_the_other_ends_the_episode(right: bool) -> None:
    for seed in range(20):
        room = Room()
        room.reset(seed=seed)
        inner = room.unwrapped
        (place,) = [
            (x, y)
            for x in range(5)
            for y in range(5)
            if (cell := inner.grid.get(x, y)) is not None
            and cell.type != "wall"
            and ((cell.color, cell.type) == tuple(inner.mission.split()[-2:])) == right
        ]
        # Beside the thing, and turned to it.
        inner.agent_pos, inner.agent_dir = (place[0] - 1, place[1]), 0
        _, reward, terminated, _, _ = room.step(PICK_UP)
        assert terminated
        assert (reward > 0.9) == right


def test_channels_say_what_stands_where() -> None:
    env = TransformedEnv(make_rooms(3), GridChannels())
    check_env_specs(env)
    td = env.reset()
    assert td["grid"].shape == (3, 17, 5, 5)
    torch.testing.assert_close(td["grid"][:, :11].argmax(1), td["image"][..., 0].long())
    torch.testing.assert_close(td["grid"][:, 11:].argmax(1), td["image"][..., 1].long())
    assert (td["grid"].sum(1) == 2).all()


def test_the_trainer_asks_at_resets_and_changes_the_agent() -> None:
    policy, engine = make("text", hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    encode = HiddenStateTransform(
        policy, lambda row: f"w{len(read_mission(row))} w1", in_keys=["mission"], every=MAX_STEPS, cache_size=64
    )
    trainer = Trainer(encode, seed=0, steps=512, num_envs=8)
    before = [parameter.detach().clone() for parameter in trainer.actor.parameters()]
    curve = trainer.train()
    assert len(curve) == 2
    assert all(0 <= share <= 1 for share in (*curve, trainer.evaluate(8)))
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.actor.parameters(), strict=True))
    assert 0 < len(engine.requests) <= 2 * 20, "at most the twenty sentences, once by each of the two transforms"
