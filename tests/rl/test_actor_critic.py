"""`make_actor_critic`: what stands beside the hidden vector, which actions are drawn, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE
from helpers.guess_env import IMAGE, GuessEnv
from helpers.policy_batches import batch_of, make
from helpers.word_env import PROMPT
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    NonTensor,
    OneHot,
    Unbounded,
)
from torchrl.envs import ExplorationType, TransformedEnv, set_exploration_type
from torchrl.modules import ActorValueOperator, ConvNet, IndependentNormal, MaskedCategorical, TanhNormal

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform, InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.rl import make_actor_critic

D = 16
READS = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def seen(shape: tuple[int, ...] = (), **shapes: tuple[int, ...]) -> Composite:
    """Return the spec of float observations in an environment of some batch size."""
    return Composite({key: Unbounded((*shape, *value)) for key, value in shapes.items()}, shape=shape)


def build(action_spec: Any = None, **options: Any) -> ActorValueOperator:
    spec = Categorical(4) if action_spec is None else action_spec
    return make_actor_critic(D, spec, **{"state_key": "state", **options})


def rows(count: int = 5, **shapes: tuple[int, ...]) -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(
        {key: torch.randn(count, *shape) for key, shape in {"state": (D,), **shapes}.items()}, batch_size=count
    )


def linears_of(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [84, 64, 36, 35, 8, 7, 1])
def test_an_image_becomes_512_features_beside_the_vector(size: int) -> None:
    both = build(observation_spec=seen(pixels=(3, size, size)), observation_keys=["pixels"])
    image, trunk = linears_of(both[0])
    assert (image.out_features, trunk.in_features, trunk.out_features) == (512, 512 + D, 256)
    out = both(rows(pixels=(3, size, size)))
    assert out["features"].shape == (5, 256)
    assert out["action"].shape == out["action_log_prob"].shape == (5,)
    assert out["state_value"].shape == (5, 1)


def test_a_vector_stays_as_it_is_and_without_a_trunk_the_heads_read_512_and_d() -> None:
    keys = ["pixels", ("agent", "speed")]
    spec = seen(pixels=IMAGE)
    spec["agent"] = Composite(speed=Unbounded((2,), dtype=torch.int64))
    both = build(observation_spec=spec, observation_keys=keys, num_cells=())
    td = rows(pixels=IMAGE).set(("agent", "speed"), torch.randint(0, 9, (5, 2)))
    out = both(td)
    assert both[0].in_keys == ["pixels", ("agent", "speed"), "state"]
    assert out["features"].shape == (5, 512 + 2 + D)
    torch.testing.assert_close(out["features"][:, 512:514], td["agent", "speed"].float())
    torch.testing.assert_close(out["features"][:, 514:], nn.functional.layer_norm(td["state"], (D,)))
    assert both.get_value_head().module[0].in_features == 512 + 2 + D


def test_an_own_conv_and_other_sizes() -> None:
    conv = ConvNet(in_features=1, num_cells=[4], kernel_sizes=[3], strides=[2])
    both = build(
        observation_spec=seen(pixels=(1, 9, 9)),
        observation_keys=["pixels"],
        conv=conv,
        image_features=20,
        num_cells=(32, 24),
    )
    sizes = [(linear.in_features, linear.out_features) for linear in linears_of(both[0])]
    assert sizes == [(4 * 4 * 4, 20), (20 + D, 32), (32, 24)]
    assert conv in list(both.modules())
    assert both(rows(pixels=(1, 9, 9)))["features"].shape == (5, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_read_may_have_any_dtype(dtype: torch.dtype) -> None:
    """MuJoCo's observations are float64, and hidden vectors float32."""
    both = build(observation_spec=seen(pixels=IMAGE, sight=(2,)), observation_keys=["pixels", "sight"])
    td = rows(pixels=IMAGE, sight=(2,))
    expected = both(td.clone())["features"]
    torch.testing.assert_close(both(td.to(dtype))["features"], expected, rtol=0.1, atol=0.1)
    for name in ("sight", "pixels"):
        torch.testing.assert_close(
            both(td.clone().set(name, td[name].to(dtype)))["features"], expected, rtol=0.1, atol=0.1
        )


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batches_of_any_shape(batch: tuple[int, ...]) -> None:
    both = build(observation_spec=seen(batch, pixels=IMAGE, sight=(2,)), observation_keys=["pixels", "sight"])
    td = TensorDict(
        pixels=torch.randn(*batch, *IMAGE), sight=torch.randn(*batch, 2), state=torch.randn(*batch, D), batch_size=batch
    )
    out = both(td)
    assert out["action"].shape == batch
    assert out["state_value"].shape == (*batch, 1)


def test_the_keys_and_sizes_of_a_transform_and_of_a_policy() -> None:
    policy, _ = make("text", **READS)
    encode = HiddenStateTransform(policy, PROMPT, in_keys=["observation"])
    env = TransformedEnv(GuessEnv(3), encode)
    both = make_actor_critic(
        encode, env.action_spec, observation_spec=env.observation_spec, observation_keys=["pixels"]
    )
    assert both[0].in_keys == ["pixels", "hidden_state"]
    assert env.rollout(4, both.get_policy_operator(), break_when_any_done=False)["action"].shape == (3, 4)

    of_policy = make_actor_critic(policy, Categorical(4))
    out = TensorDictSequential(policy, of_policy.get_policy_operator())(batch_of("text"))
    assert out["action"].shape == (3,)
    assert linears_of(of_policy[0])[0].in_features == HIDDEN_SIZE


# --- actions ----------------------------------------------------------------------------------------------------------


def test_at_first_every_action_is_about_as_likely() -> None:
    dist = build(num_cells=(64,)).get_policy_operator().get_dist(rows())
    assert (dist.probs - 0.25).abs().max() < 0.02


def test_a_mask_allows_what_it_allows() -> None:
    for spec, shape in ((Categorical(4), (200,)), (OneHot(4), (200, 4))):
        both = build(spec, action_mask_key=("agent", "allowed"))
        td = rows(200).set(("agent", "allowed"), torch.tensor([False, True, False, True]).expand(200, 4))
        out = both(td)
        assert out["action"].shape == shape
        chosen = out["action"] if spec.shape == () else out["action"].long().argmax(-1)
        assert set(chosen.tolist()) == {1, 3}
        dist = both.get_policy_operator().get_dist(td)
        assert isinstance(dist, MaskedCategorical)
        torch.testing.assert_close(dist.log_prob(out["action"]), out["action_log_prob"])


@pytest.mark.parametrize(
    ("spec", "distribution", "low", "high"),
    [
        (Bounded(torch.tensor([-2.0, 1.0]), torch.tensor([0.0, 5.0])), TanhNormal, [-2, 1], [0, 5]),
        (Bounded(-2.0, 2.0, shape=(3, 2)), TanhNormal, [-2, -2], [2, 2]),
        (Unbounded((2,)), IndependentNormal, None, None),
        (Bounded(-torch.inf, torch.inf, shape=(2,)), IndependentNormal, None, None),
    ],
)
def test_continuous_actions(spec: Any, distribution: type, low: Any, high: Any) -> None:
    both = build(spec)
    td = rows(300)
    out = both(td)
    assert out["action"].shape == (300, 2)
    assert out["action_log_prob"].shape == (300,)
    dist = both.get_policy_operator().get_dist(td)
    assert isinstance(dist, distribution)
    torch.testing.assert_close(dist.log_prob(out["action"]), out["action_log_prob"], rtol=1e-3, atol=1e-3)
    if low is not None:
        assert (out["action"] >= torch.tensor(low)).all()
        assert (out["action"] <= torch.tensor(high)).all()
        assert (out["action"].amax(0) - out["action"].amin(0) > 0.5 * (torch.tensor(high) - torch.tensor(low))).all()


def test_it_samples_unless_told_otherwise() -> None:
    both = build()
    td = rows(1).expand(100).contiguous()
    assert both(td.clone())["action"].unique().numel() > 1
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert both(td.clone())["action"].unique().numel() == 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"observation_keys": ["x"]}, InputError, "without a spec: pass observation_spec"),
        ({"observation_keys": ["x"], "observation_spec": Unbounded((3,))}, InputTypeError, "expected a Composite"),
        ({"observation_keys": ["y"], "observation_spec": seen(x=(3,))}, MissingKeyError, "has no 'y'; it has .*'x'"),
        (
            {"observation_keys": ["x"], "observation_spec": seen(x=(3, 4))},
            InputError,
            r"shape \(3, 4\); expected an im",
        ),
        ({"observation_keys": ["x"], "observation_spec": seen(x=(64, 64, 3))}, InputError, "channels last; expected"),
        ({"num_cells": (64, 0)}, InputError, "num_cells=.*expected sizes of at least 1"),
        ({"image_features": 0}, InputError, r"image_features=\[0\]: expected sizes of at least 1"),
        ({"conv": nn.Conv2d(3, 3, 3)}, InputTypeError, "conv is a Conv2d; expected torchrl's ConvNet"),
        ({"conv": ConvNet(num_cells=[4])}, InputError, "conv for 0 images; expected one image: leave"),
    ],
)
def test_refuses(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build(**options)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        (NonTensor(example_data=""), InputTypeError, "'x' is no tensor; expected an image or a vector"),
        (
            Unbounded((3, 8, 8), dtype=torch.uint8),
            InputError,
            "image of torch.uint8; expected floats: add .*ToTensorIm",
        ),
    ],
)
def test_refuses_observations(spec: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build(observation_spec=Composite(x=spec), observation_keys=["x"])


def test_refuses_a_conv_that_does_not_read_the_image() -> None:
    options = {"observation_spec": seen(x=(3, 8, 8)), "observation_keys": ["x"]}
    with pytest.raises(InputError, match=r"conv does not read 'x' of shape \(3, 8, 8\) .*; pass a ConvNet"):
        build(conv=ConvNet(in_features=1, num_cells=[4], kernel_sizes=[3]), **options)
    with pytest.raises(InputError, match=r"conv makes \(4, 6, 6\) of 'x'; expected one dimension"):
        build(conv=ConvNet(in_features=3, num_cells=[4], kernel_sizes=[3], aggregator_class=nn.Identity,
                           aggregator_kwargs={}), **options)  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "options", "kind", "words"),
    [
        (Binary(3), {}, InputTypeError, "action_spec is a Binary; expected Categorical"),
        (MultiCategorical([2, 3]), {}, InputTypeError, "action_spec is a MultiCategorical; expected"),
        (Bounded(0, 3, shape=(2,), dtype=torch.int64), {}, InputTypeError, "expected Categorical, OneHot, or floating"),
        (Composite(action=Categorical(3)), {}, InputTypeError, "pass env.action_spec"),
        (Unbounded(()), {}, InputError, r"shape \(\); expected \(\*batch, A\)"),
        (Unbounded((2,)), {"action_mask_key": "m"}, InputError, "with continuous actions: .*leave it out"),
        (Bounded(torch.tensor([-torch.inf, 0.0]), torch.ones(2)), {}, InputError, "some of its bounds are infinite"),
        (Bounded(torch.tensor([[-1.0], [-2.0]]), torch.ones(2, 1)), {}, InputError, "bounds differ among the env"),
    ],
)
def test_refuses_actions(spec: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        build(spec, **options)


def test_refuses_what_another_environment_shows() -> None:
    both = build(observation_spec=seen(sight=(2,)), observation_keys=["sight"])
    with pytest.raises(InputError, match=r"'sight' has shape \(5, 3\); expected \('\*batch', 2\)"):
        both(rows(sight=(3,)))
