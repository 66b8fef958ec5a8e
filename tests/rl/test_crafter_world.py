"""The worlds of `tutorials/crafter_world.py`: what is said decides what pays, and the trainer's parts fit."""

from __future__ import annotations

import crafter_world
import numpy as np
import pytest
import torch
from crafter_world import (
    DRINK,
    IN_DATA,
    LOUD,
    MISSIONS,
    NEW_WORDS,
    SIDES,
    WANTED,
    WOOD,
    World,
    choose_at_random,
    make_agent,
    make_encoder,
    make_live,
    make_norm,
    make_worlds,
    read_mission,
    train,
    try_online,
)
from helpers.policy_batches import make
from tensordict import TensorDict
from torchrl.envs import check_env_specs

from torchrl_sglang_hidden import HiddenSpec


def test_the_worlds_are_an_environment() -> None:
    env = make_worlds(2)
    check_env_specs(env)
    env.set_seed(3)
    out = env.rollout(3)
    assert out.shape == (2, 1)
    assert out["next", "terminated"].all()
    env.set_seed(3)
    again = env.reset()
    assert torch.equal(again["image"], out["image"][:, 0])
    assert not torch.equal(again["image"][0], again["image"][1])


def test_half_of_the_missions_want_each_thing_and_some_of_either_are_kept_for_the_test() -> None:
    assert len(set(MISSIONS)) == len(MISSIONS) == len(WANTED)
    assert {WANTED[MISSIONS.index(mission)] for mission in DRINK} == {"drink"}
    assert {WANTED[MISSIONS.index(mission)] for mission in WOOD} == {"wood"}
    assert sorted([*IN_DATA, *NEW_WORDS]) == list(range(len(MISSIONS)))
    for part in (IN_DATA, NEW_WORDS):
        wanted = [WANTED[mission] for mission in part]
        assert wanted.count("drink") == wanted.count("wood") > 0
    env = make_worlds(16, NEW_WORDS)
    env.set_seed(0)
    read = {read_mission(row) for row in env.reset().unbind(0)}
    assert len(read) > 1
    assert read <= {MISSIONS[mission] for mission in NEW_WORDS}


@pytest.mark.parametrize(("mission", "right"), [(MISSIONS.index(DRINK[0]), "water"), (MISSIONS.index(WOOD[0]), "tree")])
def test_what_pays_is_what_the_mission_wants(mission: int, right: str) -> None:
    world = World([mission])
    for seed in range(20):
        paid = []
        for action in range(len(SIDES)):
            observation, _ = world.reset(seed=seed)
            assert observation["mission"] == [mission]
            paid.append(world.step(action)[1])
        assert paid == [float(side == world.side_of[right]) for side in SIDES]


def test_the_picture_says_nothing_of_the_mission() -> None:
    pictures = []
    for mission in (MISSIONS.index(DRINK[0]), MISSIONS.index(WOOD[0])):
        observation, _ = World([mission]).reset(seed=5)
        pictures.append(observation["image"])
    assert np.array_equal(*pictures)


def test_one_of_four_sides_pays_and_the_same_seed_is_the_same_data() -> None:
    data = choose_at_random(200, seed=1)
    assert 0.15 < data["reward"].mean() < 0.35
    assert set(data["action"].tolist()) == set(data["water"].tolist()) == set(range(len(SIDES)))
    assert set(data["mission"].tolist()) <= set(IN_DATA)
    drinks = torch.tensor([WANTED[mission] == "drink" for mission in data["mission"]])
    assert torch.equal(data["reward"][drinks] == 1, (data["action"] == data["water"])[drinks])
    again = choose_at_random(20, seed=1)
    assert (again == data[:20]).all()
    assert not torch.equal(choose_at_random(20, seed=2)["image"], again["image"])


def test_what_is_learned_is_what_paid() -> None:
    # What is told says which side pays; the data took each side equally often.
    told = torch.eye(4).repeat_interleave(64, 0)
    action = torch.arange(4).repeat(64)
    data = TensorDict(
        {
            "image": torch.zeros(256, 64, 64, 3, dtype=torch.uint8),
            "hidden_state_norm": told,
            "action": action,
            "reward": told[torch.arange(256), action],
        },
        batch_size=256,
    )
    for pixels in (False, True):
        agent = make_agent(4, pixels=pixels, seed=0)
        losses = train(agent, data, steps=100)
        assert losses[-1] < losses[0] / 2
        row = data.clone().set("pixels", torch.zeros(256, 3, 64, 64))
        assert torch.equal(agent.get_policy_operator().get_dist(row).probs.argmax(-1), told.argmax(-1))


def test_hidden_states_are_made_small_and_zeros_stay_zeros() -> None:
    states = 3 + 7 * torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    small = make_norm(states)(TensorDict(hidden_state=states, batch_size=500))["hidden_state_norm"]
    assert small.mean(0).abs().max() < 1e-5
    assert torch.allclose(small.std(0), torch.full((5,), LOUD))
    nothing = torch.zeros(500, 5)
    assert make_norm(nothing)(TensorDict(hidden_state=nothing, batch_size=500))["hidden_state_norm"].eq(0).all()


def test_a_mission_is_asked_once_and_live_worlds_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Words that the tokenizer of these tests knows.
    monkeypatch.setattr(crafter_world, "MISSIONS", [f"w{number}" for number in range(len(MISSIONS))])
    policy, engine = make("text", hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    encode = make_encoder(policy)
    size = encode.shape[-1]
    norm = make_norm(torch.randn(8, size))
    live, twin = (make_live(6, each, norm, NEW_WORDS[:2]) for each in (encode, make_encoder(policy)))
    agent = make_agent(size, pixels=True, seed=0)
    shares = [try_online(agent, worlds) for worlds in (live, live, twin)]
    assert shares[0] == shares[1] == shares[2]
    assert 6 * shares[0] == pytest.approx(round(6 * shares[0]))
    # Each encoder asks for two missions once.
    assert len(engine.requests) == 2 * 2
