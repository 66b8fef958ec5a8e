"""`CrossRolloutBaseline` against a plain reference in float64: a loop over rollouts, and ridge regression.

1. Values are those of a probe on the rollouts of earlier writes, read from the others of the group.
2. A rollout's own tokens, states and rewards change nothing of its baseline.
3. It explains what states tell and the ablations do not; the bias of ``"own"`` shows.
4. Losses of TorchRL read the advantage; state_dict and pickle keep the window.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers.group_batches import SIZE, dense, groups, ragged, return_of, rollout, states_of
from helpers.group_references import Probe
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from torchrl_sglang_hidden import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import CrossRolloutBaseline, make_value_head

ENTROPY = ("sampling", "entropy")
Rollouts = list[list[TensorDictBase]]


# --- the reference ----------------------------------------------------------------------------------------------------


def features_of(steps: list[TensorDictBase], entropy: bool) -> torch.Tensor:
    values = torch.cat([step[ENTROPY] for step in steps]).double()
    statistics = torch.stack([values.mean(), (values - values.mean()).square().mean().sqrt()])
    return torch.cat([states_of(steps), statistics]) if entropy else states_of(steps)


def reference(writes: list[Rollouts], group_size: int, minimum: int, window: int, entropy: bool) -> dict[str, float]:
    """Return the baseline of each rollout, by its features."""
    seen: list[tuple[torch.Tensor, float]] = []
    baselines = {}
    for write in writes:
        recent, new = seen[-window:], []
        probe = None
        if len(recent) >= minimum:
            probe = Probe(torch.stack([row for row, _ in recent]), torch.tensor([y for _, y in recent]).double())
        for question in dict.fromkeys(steps[0]["query"] for steps in write):
            group = [steps for steps in write if steps[0]["query"] == question]
            assert len(group) == group_size
            for own, steps in enumerate(group):
                others = [other for number, other in enumerate(group) if number != own]
                mean_return = sum(map(return_of, others)) / len(others)
                values = [probe(features_of(other, entropy)) for other in others] if probe else [mean_return]
                baselines[str(states_of(steps).tolist())] = sum(values) / len(values)
                new.append((features_of(steps, entropy), mean_return))
        seen += new
    return baselines


# --- 1. the numbers ---------------------------------------------------------------------------------------------------


def check(outs: list[tuple[Rollouts, TensorDictBase]], expected: dict[str, float], rtol: float = 1e-5) -> None:
    for write, out in outs:
        rollouts = {str(steps[0]["hidden_states", "response"].tolist()): steps for steps in write}
        for step in out.unbind(0):
            steps = rollouts.get(str(step["hidden_states", "response"].tolist()))
            if steps is None:  # a later turn
                continue
            value = expected[str(states_of(steps).tolist())]
            assert float(step["baseline"].sum()) == pytest.approx(value, rel=rtol, abs=1e-5)
            assert float(step["advantage"].sum()) == pytest.approx(return_of(steps) - value, rel=rtol, abs=1e-5)


@pytest.mark.parametrize("entropy", [False, True], ids=["states", "entropy too"])
def test_values_are_the_references(entropy: bool) -> None:
    baseline = CrossRolloutBaseline(3, window=18, min_rollouts=9, entropy_key=ENTROPY if entropy else None)
    # In the fourth write the window has lost its first rollouts.
    writes = [groups(3, 3, seed=1000 * number, turns=1 + number % 2) for number in range(4)]
    outs = [(write, baseline.inv(ragged(write))) for write in writes]
    assert baseline.window_size == 18
    check(outs, reference(writes, 3, 9, 18, entropy))


def test_before_the_window_has_enough_it_is_the_mean_of_the_others() -> None:
    out = CrossRolloutBaseline(4).inv(ragged([rollout("a", seed=seed, reward=seed) for seed in range(4)]))
    assert out["baseline"].flatten().tolist() == pytest.approx([2, 5 / 3, 4 / 3, 1])
    assert out["advantage"].flatten().tolist() == pytest.approx([-2, -2 / 3, 2 / 3, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_every_dtype(dtype: torch.dtype) -> None:
    baseline = CrossRolloutBaseline(3, window=9, min_rollouts=9)
    writes = [groups(3, 3, seed=1000 * number, dtype=dtype) for number in range(2)]
    outs = [(write, baseline.inv(dense(write))) for write in writes]
    assert outs[1][1]["baseline"].dtype == torch.float32
    check(outs, reference(writes, 3, 9, 9, False))


def test_of_several_layers() -> None:
    def layered(write: Rollouts) -> TensorDictBase:
        batch = ragged(write)
        for segment in ("prompt", "response"):
            batch["hidden_states", segment] = batch["hidden_states", segment].reshape(-1, 2, SIZE // 2)
        return batch

    flat, several = (CrossRolloutBaseline(3, window=9, min_rollouts=9) for _ in range(2))
    for number in range(2):
        write = groups(3, 3, seed=1000 * number)
        expected, found = flat.inv(ragged(write)), several.inv(layered(write))
        assert torch.equal(found["baseline"], expected["baseline"])


# --- 2. independence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablate", [None, "own"])
def test_nothing_of_a_rollout_reaches_its_own_baseline(ablate: Any) -> None:
    """The baseline of the first rollout, with other states and another reward of it; with ``"own"`` it moves."""
    found = []
    for change in (0.0, 5.0):
        baseline = CrossRolloutBaseline(3, window=32, min_rollouts=9, ablate=ablate)
        baseline.inv(ragged(groups(4, 3)))
        write = groups(1, 3, seed=5000)
        batch = ragged(write)
        batch["hidden_states", "response"] = batch["hidden_states", "response"] + change * torch.eye(3)[:, :1]
        batch["next", "reward"] = batch["next", "reward"] + change * torch.eye(3)[:, :1]
        found.append(baseline.inv(batch)["baseline"].flatten())
    assert bool(found[0][0] == found[1][0]) == (ablate is None)
    if ablate is None:
        assert found[0][1] != found[1][1], "the others' baselines read its states"


def test_a_write_is_learned_from_after_it_was_predicted() -> None:
    """Two groups of one write, in either order and apart: the same as if each came alone."""
    state = CrossRolloutBaseline(3, window=64, min_rollouts=9)
    state.inv(ragged(groups(4, 3)))
    write = groups(2, 3, seed=5000)
    values = []
    for order in (write, write[::-1]):
        out = pickle.loads(pickle.dumps(state)).inv(ragged(order))
        values.append(sorted(out["baseline"].flatten().tolist()))
    assert values[0] == pytest.approx(values[1])
    for question in ("question 0", "question 1"):
        alone = [steps for steps in write if steps[0]["query"] == question]
        out = pickle.loads(pickle.dumps(state)).inv(ragged(alone))
        assert all(
            min(abs(value - other) for other in values[0]) < 1e-6 for value in out["baseline"].flatten().tolist()
        )


# --- 3. what it is worth ----------------------------------------------------------------------------------------------


def worth(ablate: Any, seed: int) -> float:
    """Return the mean squared advantage once it is fitted, where the prompt's state tells the mean return."""
    generator = torch.Generator().manual_seed(seed)
    baseline = CrossRolloutBaseline(2, group_key="question", window=128, min_rollouts=32, ablate=ablate)
    squares = []
    for number in range(16):
        question = torch.arange(8).repeat_interleave(2)[:, None, None] + 8 * number
        hard = torch.randn(8, generator=generator).repeat_interleave(2)[:, None, None]
        noise = 0.5 * torch.randn(16, 1, 1, generator=generator)
        prompt, response = (torch.randn(16, 1, SIZE, generator=generator) for _ in range(2))
        prompt[..., :1], response[..., :1] = hard, noise
        batch = TensorDict(
            question=question,
            hidden_states=TensorDict(prompt=prompt, response=response),
            next=TensorDict(reward=hard + noise, done=torch.ones(16, 1, 1, dtype=torch.bool)),
            batch_size=[16, 1],
        ).auto_batch_size_(2)
        out = baseline.inv(batch)
        if number >= 8:
            squares.append(out["advantage"].square().mean())
    return float(torch.stack(squares).mean())


def test_it_takes_off_what_the_states_tell_of_a_prompt() -> None:
    """Returns have the variance 1 of prompts and 0.25 of samples: without a baseline 1.25, with the best one 0.25."""
    for seed in range(2):
        probe, zero, shuffle, own = (worth(ablate, seed) for ablate in (None, "zero", "shuffle", "own"))
        assert probe < 0.35, "that of samples; the mean of the one other rollout has 0.5"
        assert min(zero, shuffle) > 2 * probe
        assert own < 0.05, "a baseline that knows the rollout's own end leaves nothing to learn from"


# --- 4. what reads and keeps it ---------------------------------------------------------------------------------------


def test_ppo_reads_the_advantage() -> None:
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(SIZE, 3), in_keys=[("hidden_states", "prompt")], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    )
    critic = make_value_head(SIZE, state_key=("hidden_states", "prompt"))
    batch = dense(groups(2, 3))
    batch["action"], batch["action_log_prob"] = torch.zeros(6, 1, dtype=torch.int64), torch.full((6, 1), -1.0)
    out = CrossRolloutBaseline(3).inv(batch)
    loss = ClipPPOLoss(actor, critic, entropy_bonus=False)(out)["loss_objective"]
    dist = actor.get_dist(out)
    ratio = (dist.log_prob(out["action"]) + 1).exp()
    advantage = out["advantage"][..., 0]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(out["value_target"], out["baseline"] + out["advantage"])


def test_state_dict_and_pickle_keep_the_window() -> None:
    first = CrossRolloutBaseline(3, window=32, min_rollouts=9)
    buffer = ReplayBuffer(storage=LazyStackStorage(64), transform=first, batch_size=3)
    buffer.extend(ragged(groups(4, 3)))
    second = CrossRolloutBaseline(3, window=32, min_rollouts=9)
    other = ReplayBuffer(storage=LazyStackStorage(64), transform=second, batch_size=3)
    assert second.window_size == 0
    other._transform.load_state_dict(buffer._transform.state_dict())
    third = pickle.loads(pickle.dumps(first))
    assert first.window_size == second.window_size == third.window_size == 12
    write = groups(1, 3, seed=5000)
    expected = first.inv(ragged(write))["baseline"]
    for copy in (second, third):
        assert torch.equal(copy.inv(ragged(write))["baseline"], expected)
    assert not torch.equal(CrossRolloutBaseline(3, min_rollouts=9).inv(ragged(write))["baseline"], expected)
    # A smaller window takes the newest.
    small = CrossRolloutBaseline(3, window=10, min_rollouts=9)
    small.load_state_dict(first.state_dict())
    assert small.window_size == 10
    assert torch.equal(small.get_extra_state()["targets"], first.get_extra_state()["targets"][-10:])
    empty = CrossRolloutBaseline(3)
    empty.load_state_dict(CrossRolloutBaseline(3).state_dict())
    assert empty.window_size == 0
    with pytest.raises(InputError, match="numbers a rollout; expected 12"):
        second.inv(ragged(groups(1, 3, size=5)))
    # One that has seen no rollout itself knows the size from the window.
    fresh = CrossRolloutBaseline(3, window=32, min_rollouts=9)
    fresh.load_state_dict(first.state_dict())
    with pytest.raises(InputError, match="numbers a rollout; expected 12"):
        fresh.inv(ragged(groups(1, 3, size=5)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"features": torch.zeros(3, 2)}, "expected both features and targets"),
        ({"features": torch.zeros(3, 2), "targets": torch.zeros(2)}, r"expected \[N, F\] and \[N\]"),
        ({"features": torch.zeros(3), "targets": torch.tensor(1.0)}, r"expected \[N, F\] and \[N\]"),
    ],
)
def test_a_state_that_does_not_fit(state: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CrossRolloutBaseline(3).set_extra_state(state)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"window": 4}, InputError, "window=4: expected 8 <= min_rollouts <= window"),
        ({"min_rollouts": 7}, InputError, "min_rollouts=7, window=512: expected 8 <="),
        ({"window": 8.5}, InputTypeError, "window=8.5: expected an integer"),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        CrossRolloutBaseline(3, **options)


def test_bad_entropies() -> None:
    baseline = CrossRolloutBaseline(3, entropy_key=ENTROPY)
    with pytest.raises(MissingKeyError, match="return_entropy=True"):
        baseline.inv(dense(groups(1, 3)))
    batch = ragged(groups(1, 3))
    batch[0]["sampling", "entropy"][:] = torch.nan
    with pytest.raises(InputError, match="has 0 numbers, of which 0 are not finite; expected finite numbers of at l"):
        baseline.inv(batch)
    batch[0]["sampling", "entropy"][:] = torch.inf
    with pytest.raises(InputError, match="are not finite; expected finite numbers"):
        baseline.inv(batch)


def test_a_value_is_held_at_the_returns_that_were_seen() -> None:
    """States far beyond those of the window: the line goes on for ever, and the values do not."""
    baseline = CrossRolloutBaseline(3, window=32, min_rollouts=9)
    write = groups(4, 3)
    for steps in write:
        number = float(steps[0]["query"].removeprefix("question "))
        steps[0]["next", "reward"].fill_(number)
        steps[0]["hidden_states", "prompt"].fill_(number)
    baseline.inv(ragged(write))
    for far, nearest in ((1e3, 3.0), (-1e3, 0.0)):
        new = groups(1, 3, seed=5000)
        for steps in new:
            steps[0]["hidden_states", "prompt"].fill_(far)
        out = pickle.loads(pickle.dumps(baseline)).inv(ragged(new))
        assert out["baseline"].flatten().tolist() == [nearest] * 3


def test_equal_returns_and_equal_states() -> None:
    """A window in which nothing differs: the probe says the mean, without a division by nothing."""
    baseline = CrossRolloutBaseline(3, window=9, min_rollouts=9)
    same = [rollout("a", seed=0, reward=1.0) for _ in range(9)]
    baseline.inv(ragged(same))
    out = baseline.inv(ragged(same[:3]))
    assert out["baseline"].flatten().tolist() == pytest.approx([1, 1, 1])
    assert TensorDict(out.exclude("query", "tokens", "sampling")).isfinite().all()


def test_what_differs_by_rounding_alone_tells_nothing() -> None:
    """A window of one prompt, whose states batches of several sizes rounded differently, and then another prompt."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        baseline = CrossRolloutBaseline(3, window=30, min_rollouts=9)
        returns = []
        for number in range(10):
            write = [rollout("a", seed=10 * number + index, size=48) for index in range(3)]
            rounded = 1 + 1e-7 * torch.randn(48, generator=generator)
            for (step,) in write:
                step["hidden_states", "prompt"] *= rounded
                step["hidden_states", "response"] = step["hidden_states", "prompt"].clone()
                step["next", "reward"] = torch.randint(2, (1,), generator=generator).float()
                returns.append(step["next", "reward"])
            baseline.inv(ragged(write))
        out = baseline.inv(ragged([rollout("another", seed=index, size=48) for index in range(3)]))
        mean = float(torch.stack(returns).mean())
        assert out["baseline"].flatten().tolist() == pytest.approx([mean] * 3)
