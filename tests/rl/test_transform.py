"""`HiddenStateTransform` over the fake engine: which prompts are asked, and whose vector each step has."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE, RecordingEngine, RecordingServer, of_layer, response_of
from helpers.policy_batches import make
from helpers.word_env import PROMPT, TOKENIZER, WordEnv, ids_of, vector_of, vectors_of
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ParallelEnv, PendulumEnv, SerialEnv, TransformedEnv, check_env_specs
from torchrl.envs.transforms import Compose, StepCounter, VecNormV2

from torchrl_sglang_hidden import HeadSpec, HiddenSpec, HiddenStateTransform, InputError, SGLangHiddenWrapper, connect
from torchrl_sglang_hidden.rl import transform as transform_module

READS = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def transform(engine: RecordingEngine | None = None, **options: Any) -> tuple[HiddenStateTransform, RecordingEngine]:
    """Return a transform whose policy reads prompts, and its engine."""
    policy_options = {**READS, **options.pop("policy", {})}
    policy, engine = make("text", **policy_options, **({} if engine is None else {"engine": engine}))
    arguments = {"in_keys": ["observation"], **options}
    return HiddenStateTransform(policy, arguments.pop("prompt", PROMPT), **arguments), engine


def env_with(base: Any, **options: Any) -> tuple[TransformedEnv, RecordingEngine]:
    made, engine = transform(**options)
    return TransformedEnv(base, made), engine


def asked(engine: RecordingEngine) -> list[list[int]]:
    """Return the observations of each batch that was sent: the middle word of three, ``w<n>``."""
    return [[ids[1] - ids_of(0)[1] for ids in payload["input_ids"]] for payload in engine.payloads]


def rollout(env: TransformedEnv, steps: int) -> TensorDictBase:
    """Return steps with partial resets in between, ``[*batch, steps]``."""
    return env.rollout(steps, break_when_any_done=False)


# --- every step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [100, [100, 100], [2, 3, 100]])
def test_reset_and_steps_have_the_vectors_of_their_observations(lengths: Any) -> None:
    env, _ = env_with(WordEnv(lengths))
    out = rollout(env, 5)
    assert out["hidden_state"].dtype == torch.float32
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"]))
    torch.testing.assert_close(out["next", "hidden_state"], vectors_of(out["next", "observation"]))
    assert "hidden_state_age" not in out


def test_one_request_per_step_and_partial_resets_ask_what_was_reset() -> None:
    env, engine = env_with(WordEnv([2, 100]))
    rollout(env, 3)
    #                     reset    step     step     0 reset  step
    assert asked(engine) == [[0, 20], [1, 21], [2, 22], [3], [4, 23]]


def test_a_rule_of_a_head_ends_what_is_generated() -> None:
    policy = {"hidden": HiddenSpec(("response",)), "generate_kwargs": {}}
    ruled = {**policy, "heads": HeadSpec(("d0",), stop_when="d0 > -99")}
    texts = [env_with(WordEnv([2]), policy=one, text_key="said")[0].reset()["said"] for one in (policy, ruled)]
    # The EOS at the end of what is not cut is no text.
    assert [len(TOKENIZER(text)["input_ids"]) for (text,) in texts] == [len(response_of(ids_of(0))) - 1, 1]


def test_a_batch_of_two_dimensions() -> None:
    env, engine = env_with(WordEnv([2, 100, 100, 3], shape=(2, 2)))
    out = rollout(env, 4)
    assert out["hidden_state"].shape == (2, 2, 4, HIDDEN_SIZE)
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"]))
    assert asked(engine)[3] == [3], "of four environments one was reset"


def test_layers_give_k_vectors_in_float32() -> None:
    hidden = HiddenSpec(("prompt",), layers=(0, -1), dtype=torch.bfloat16)
    env, _ = env_with(WordEnv([100, 100]), policy={"hidden": hidden})
    out = env.reset()
    assert out["hidden_state"].shape == env.observation_spec["hidden_state"].shape == (2, 2, HIDDEN_SIZE)
    assert out["hidden_state"].dtype == torch.float32
    expected = torch.stack([of_layer(vector_of(0), 0), vector_of(0)])
    torch.testing.assert_close(out["hidden_state"][0], expected, atol=0.02, rtol=0.01)


def test_the_vector_after_generating_and_its_text() -> None:
    policy = {"hidden": HiddenSpec(("response",)), "generate_kwargs": {"max_new_tokens": 3}}
    env, _ = env_with(WordEnv([100, 2]), policy=policy, text_key="said", every=2)
    out = rollout(env, 4)
    first = TOKENIZER.decode(response_of(ids_of(0))[:3], skip_special_tokens=True)
    third = TOKENIZER.decode(response_of(ids_of(2))[:3], skip_special_tokens=True)
    said = [out[0, step]["said"] for step in range(4)]
    assert said == [first, first, third, third]
    assert first != third
    assert not torch.allclose(out["hidden_state"][0, 0], vector_of(0)), "the response's, not the prompt's"


# --- every n, and late ------------------------------------------------------------------------------------------------


def expected_of(lengths: Sequence[int], steps: int, every: float, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whose observation each step's vector is of, and its age, ``[B, steps]``, said in plain loops."""
    sources, ages = [], []
    for index, length in enumerate(lengths):
        row: list[int] = []
        age: list[int] = []
        episode, step = 0, 0
        while len(row) < steps:
            encoded = [s for s in range(step + 1) if (s == 0 or s % every == 0) and (s == 0 or s + late <= step)]
            row.append(20 * index + 3 * episode + encoded[-1])
            age.append(step - encoded[-1])
            step += 1
            if step == length:
                episode, step = episode + 1, 0
        sources.append(row)
        ages.append(age)
    return torch.tensor(sources), torch.tensor(ages)


LENGTHS = [2, 7, 100, 3, 4]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_environments_that_reset_at_different_times_are_right(every: int, late: bool) -> None:
    env, _ = env_with(WordEnv(LENGTHS), every=every, late=late, age_key="age")
    out = rollout(env, 12)
    sources, ages = expected_of(LENGTHS, 12, every, late)
    torch.testing.assert_close(out["hidden_state"], vectors_of(sources[..., None]))
    assert torch.equal(out["age"][..., 0], ages)


def test_every_third_asks_for_a_third() -> None:
    env, engine = env_with(WordEnv([100, 100]), every=3)
    out = rollout(env, 9)
    assert asked(engine) == [[0, 20], [3, 23], [6, 26], [9, 29]]
    assert out["hidden_state_age"][0, :, 0].tolist() == [0, 1, 2] * 3


def test_a_step_that_keeps_its_vectors_looks_at_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbinding 128 environments takes longer than all else of such a step."""
    looked: list[int] = []
    unbind_rows = transform_module.unbind_rows
    monkeypatch.setattr(transform_module, "unbind_rows", lambda td: [looked.append(td.numel()), *unbind_rows(td)][1:])
    env, _ = env_with(WordEnv([100, 100]), every=3)
    rollout(env, 6)
    assert looked == [2, 2, 2], "the reset, and the steps 3 and 6"


def test_only_the_environments_that_are_due_are_asked() -> None:
    env, engine = env_with(WordEnv([2, 100]), every=3)
    rollout(env, 6)
    assert asked(engine) == [[0, 20], [3], [23], [6], [26]]


def test_late_asks_while_the_environment_steps() -> None:
    """Each waits for the other to begin: one after the other they would not end."""
    asks, steps = threading.Event(), threading.Event()

    class Waits(WordEnv):
        def _step(self, tensordict: TensorDictBase) -> TensorDict:
            steps.set()
            assert self.count == 0 or asks.wait(10)
            return super()._step(tensordict)

    def wait(rows: list[dict[str, Any]]) -> None:
        asks.set()
        assert steps.wait(10)

    env, engine = env_with(Waits(), late=True)
    td = env.step(env.rand_action(env.reset()))["next"]
    steps.clear()
    engine.fault = wait
    env.step(env.rand_action(td))
    assert asks.is_set()


def test_late_asks_no_observation_twice() -> None:
    env, engine = env_with(WordEnv(), late=True)
    env.rollout(4)
    assert asked(engine) == [[0], [1], [2], [3]]


def test_late_goes_on_after_a_step_that_failed() -> None:
    env, _ = env_with(WordEnv(), late=True)
    td = env.rollout(2)[-1]["next"]
    env.base_env.fails = True
    with pytest.raises(RuntimeError, match="the environment failed"):
        env.step(env.rand_action(td))
    env.base_env.fails = False
    out = env.rollout(3)
    torch.testing.assert_close(out["hidden_state"][2], vector_of(3 + 1))


def test_a_reset_waits_for_what_a_failed_step_began() -> None:
    """So that two threads are never in the cache at once."""
    env, engine = env_with(WordEnv(), late=True, cache_size=9)
    td = env.rollout(2)[-1]["next"]
    env.base_env.fails = True
    release, running, most = threading.Event(), [0], [0]

    def hold(rows: list[dict[str, Any]]) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert release.wait(10)
        running[0] -= 1

    engine.fault = hold
    with pytest.raises(RuntimeError, match="the environment failed"):
        env.step(env.rand_action(td))
    timer = threading.Timer(0.2, release.set)
    timer.start()
    env.reset()
    timer.join()
    assert len(engine.payloads) == 4
    assert most == [1]


def test_a_step_lives_on_its_tensordict_alone() -> None:
    """Going back to an earlier TensorDict gives what it gave then: nothing is kept in the object."""
    env, _ = env_with(WordEnv(), every=2)
    start = env.reset()
    first = env.step(env.rand_action(start.clone()))["next"]
    env.step(env.rand_action(first.clone()))
    again = env.step(env.rand_action(start.clone()))["next"]
    assert torch.equal(first["hidden_state"], again["hidden_state"])
    assert torch.equal(first["hidden_state_age"], again["hidden_state_age"])


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"late": True}], ids=str)
def test_environments_that_are_skipped_are_not_asked(options: dict[str, Any]) -> None:
    env, engine = env_with(WordEnv([100, 100]), **options)
    td = env.rollout(2)[:, -1]["next"]
    count = len(engine.requests)
    out = env.step(env.rand_action(td).set("_step", torch.tensor([True, False])))["next"]
    assert torch.equal(out["hidden_state"][1], td["hidden_state"][1])
    assert not torch.equal(out["hidden_state"][0], td["hidden_state"][0]) or options == {"every": 2}
    if options:
        assert out["hidden_state_age"][1] == td["hidden_state_age"][1]
    assert len(engine.requests) - count == (options != {"every": 2})


def test_an_environment_that_is_skipped_and_has_no_vector_is_asked() -> None:
    env, _ = env_with(WordEnv([100, 100]))
    td = env.rand_action(env.reset()).exclude("hidden_state").set("_step", torch.tensor([True, False]))
    out = env.step(td)["next"]
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"]))


def test_environments_that_reset_themselves() -> None:
    env, engine = env_with(WordEnv([100, 100]), every=3)
    td = env.rollout(2)[:, -1]["next"].clone()
    before = td.clone()
    td["_reset"] = torch.tensor([[True], [False]])
    out = env.transform._reset_on_native_autoreset(td, td)
    assert asked(engine)[1:] == [[2]]
    torch.testing.assert_close(out["hidden_state"], torch.stack([vector_of(2), before["hidden_state"][1]]))
    assert out["hidden_state_age"].tolist() == [[0], [2]]


# --- specs, batched environments, copies ------------------------------------------------------------------------------

SPECS: list[dict[str, Any]] = [
    {},
    {"every": 3, "text_key": "said"},
    {"late": True},
    {"late": True, "every": 2, "age_key": ("info", "age"), "out_key": ("info", "state")},
    {"project": 3, "cache_size": 10},
    {"ablate": "zero"},
    {"ablate": "frozen"},
    {"policy": {"hidden": HiddenSpec(("prompt",), layers=(0, 2))}},
]


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("lengths", [3, [2, 100]], ids=["single", "batch"])
def test_specs(lengths: Any, options: dict[str, Any]) -> None:
    env, _ = env_with(WordEnv(lengths), **options)
    check_env_specs(env, seed=0)


def inner_env(made: HiddenStateTransform, lengths: Any = 100, start: int = 0) -> TransformedEnv:
    return TransformedEnv(WordEnv(lengths, start), made.clone())


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_inside_and_outside_a_serial_env(options: dict[str, Any]) -> None:
    """Both give the same; outside, one request has the prompts of all environments."""
    made, engine = transform(**options)
    bases = [partial(WordEnv, 2), partial(WordEnv, 7, 20)]
    outside = TransformedEnv(SerialEnv(2, bases), made)
    inside = SerialEnv(2, [partial(inner_env, made, 2), partial(inner_env, made, 7, 20)])
    for env in (outside, inside):
        check_env_specs(env, seed=0)
    # check_env_specs has reset them as often as each other.
    outside_out, inside_out = (env.rollout(6, break_when_any_done=False) for env in (outside, inside))
    for key in made.out_keys:
        for place in (key, ("next", *(key if isinstance(key, tuple) else (key,)))):
            found, expected = inside_out.get(place), outside_out.get(place)
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(found, expected)
            else:
                assert found.tolist() == expected.tolist()
    if not options.get("ablate"):
        assert max(map(len, engine.payloads and [payload["input_ids"] for payload in engine.payloads])) == 2


@pytest.fixture
def served() -> Any:
    server = RecordingServer()
    yield server
    server.stop()


def test_workers_of_a_parallel_env_share_the_server(served: RecordingServer) -> None:
    with connect(served.url) as engine:
        reads = {**READS, "generate_kwargs": {"max_new_tokens": 2}}
        policy = SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode="text", **reads)
        made = HiddenStateTransform(policy, PROMPT, in_keys=["observation"], every=2, late=True, text_key="said")
        env = ParallelEnv(2, [partial(inner_env, made, 2), partial(inner_env, made, 7, 20)])
        out = env.rollout(6, break_when_any_done=False)
        # Workers read what the TensorDict has, and not what they saw last: observation 22 is due.
        again = env.step(out[:, 2].exclude("next"))["next", "hidden_state"]
        env.close()
    torch.testing.assert_close(again, vectors_of(torch.tensor([[3], [22]])))
    sources, ages = expected_of([2, 7], 6, 2, True)
    torch.testing.assert_close(out["hidden_state"], vectors_of(sources[..., None]))
    assert torch.equal(out["hidden_state_age"][..., 0], ages)
    said = [[" ".join(map(str, response_of(ids_of(int(number)))[:2])) for number in row] for row in sources]
    assert [[out[row, step]["said"] for step in range(6)] for row in range(2)] == said
    assert {len(payload["input_ids"]) for payload in served.payloads} == {1}


def test_pickles_and_clones_begin_with_an_empty_cache(served: RecordingServer) -> None:
    with connect(served.url) as engine:
        policy = SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode="text", **READS)
        made = HiddenStateTransform(policy, PROMPT, in_keys=["observation"], late=True, cache_size=9, project=2)
        TransformedEnv(WordEnv(), made).rollout(3)
        assert made.cache_info.size > 0
        made.reset_parent()
        for copied in (pickle.loads(pickle.dumps(made)), made.clone()):
            assert copied.cache_info.size == 0
            out = TransformedEnv(WordEnv(), copied).rollout(3)
            torch.testing.assert_close(out["hidden_state"][0], vector_of(0) @ made.projection)
            copied.close()


def test_composes_with_other_transforms() -> None:
    made, _ = transform(every=2, in_keys=["step_count"], prompt="w1 w{step_count} w2")
    env = TransformedEnv(WordEnv([100, 100]), Compose(StepCounter(max_steps=3), made))
    check_env_specs(env, seed=0)
    out = rollout(env, 5)
    assert out["step_count"][0, :, 0].tolist() == [0, 1, 2, 0, 1]
    torch.testing.assert_close(out["hidden_state"][0], vectors_of(torch.tensor([[0], [0], [2], [0], [0]])))


def test_composes_with_vecnorm() -> None:
    made, _ = transform(every=2)
    norm = VecNormV2(in_keys=["hidden_state"], out_keys=["normed"])
    env = TransformedEnv(WordEnv([100, 100]), Compose(made, norm))
    out = rollout(env, 6)
    sources, _ = expected_of([100, 100], 6, 2, False)
    torch.testing.assert_close(out["hidden_state"], vectors_of(sources[..., None]))
    assert not torch.allclose(out["normed"], out["hidden_state"])


@pytest.mark.parametrize("options", [{"every": 2}, {"late": True}, {"ablate": "frozen"}])
def test_a_transform_behind_must_not_write_what_the_next_step_reads(options: dict[str, Any]) -> None:
    made, _ = transform(**options)
    norm = VecNormV2(in_keys=["hidden_state"])
    env = TransformedEnv(WordEnv([100, 100]), Compose(StepCounter(), made, norm))
    with pytest.raises(InputError, match=r"VecNormV2 writes .*give it out_keys of its own"):
        env.rollout(2)


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"late": True}], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_an_environment_without_state_of_its_own(options: dict[str, Any], batch: tuple[int, ...]) -> None:
    """Pendulum takes its state, and any batch size, from the TensorDict."""
    prompt = "w1 {th:.1f} {thdot:.1f}"
    env, engine = env_with(PendulumEnv(), prompt=prompt, in_keys=["th", "thdot"], **options)
    start = env.reset(env.base_env.gen_params(batch_size=batch), set_state=True)
    out = env.rollout(4, auto_reset=False, tensordict=start)
    assert out["hidden_state"].shape == (*batch, 4, HIDDEN_SIZE)
    assert len(engine.payloads) == {"{}": 5, "{'every': 3}": 2, "{'late': True}": 4}[str(options)]


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_asks_a_prompt_once() -> None:
    env, engine = env_with(WordEnv([2, 2]), cache_size=100, prompt=lambda row: "w5", in_keys=["observation"])
    rollout(env, 4)
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [1]
    info = env.transform.cache_info
    assert (info.hits, info.misses, info.size, info.max_size) == (11, 1, 1, 100)
    assert info.hit_rate == 11 / 12


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    made, engine = transform(cache_size=2)
    for number in (1, 2, 1, 3, 1, 2):
        out = made(TensorDict(observation=torch.tensor([number])))
        torch.testing.assert_close(out["hidden_state"], vector_of(number))
    assert asked(engine) == [[1], [2], [3], [2]]
    assert made.cache_info.size == 2


# --- projection and ablations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [-1, (0, -1)])
def test_the_projection_is_one_fixed_matrix(layers: Any) -> None:
    hidden = HiddenSpec(("prompt",), layers=layers)
    made, _ = transform(project=5, policy={"hidden": hidden})
    plain, _ = transform(policy={"hidden": hidden})
    data = TensorDict(observation=torch.tensor([[1], [2]]), batch_size=2)
    projected, full = made(data.clone())["hidden_state"], plain(data.clone())["hidden_state"]
    torch.testing.assert_close(projected, full @ made.projection)
    assert torch.equal(made.projection, transform(project=5)[0].projection)
    assert "projection" in made.state_dict()
    projected = made.to(torch.float16)(data.clone())["hidden_state"]
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected, full @ made.projection.float())


def test_the_projection_of_other_dtypes() -> None:
    made, _ = transform(project=5, policy={"hidden": HiddenSpec(("prompt",), dtype=torch.float16)})
    out = made(TensorDict(observation=torch.tensor([3])))
    torch.testing.assert_close(out["hidden_state"], vector_of(3) @ made.projection, atol=0.01, rtol=0)


def test_the_projection_keeps_lengths() -> None:
    made, _ = transform(project=4000)
    vector = torch.randn(HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    assert float((vector @ made.projection).norm() / vector.norm()) == pytest.approx(1, abs=0.05)


def test_zero_asks_nothing() -> None:
    env, engine = env_with(WordEnv([2, 100]), ablate="zero", every=2)
    out = rollout(env, 4)
    assert not out["hidden_state"].any()
    assert out["hidden_state"].shape == (2, 4, HIDDEN_SIZE)
    assert engine.payloads == []


def test_frozen_keeps_the_vector_of_the_reset() -> None:
    env, engine = env_with(WordEnv([3, 100]), ablate="frozen")
    out = rollout(env, 6)
    sources, ages = expected_of([3, 100], 6, float("inf"), False)
    torch.testing.assert_close(out["hidden_state"], vectors_of(sources[..., None]))
    assert torch.equal(out["hidden_state_age"][..., 0], ages)
    assert asked(engine) == [[0, 20], [3]]


@pytest.mark.parametrize("lengths", [100, [2, 100, 100]])
def test_shuffle_gives_other_rows_vectors(lengths: Any) -> None:
    env, _ = env_with(WordEnv(lengths), ablate="shuffle")
    out = rollout(env, 8)
    given = out["hidden_state"].reshape(-1, HIDDEN_SIZE)
    own = vectors_of(out["observation"]).reshape(-1, HIDDEN_SIZE)
    everything = vectors_of(torch.arange(60)[:, None])
    known = (given[:, None] - everything).norm(dim=-1).min(-1).values < 1e-4
    assert known[1:].all(), "vectors that the model gives"
    same = (given - own).norm(dim=-1) < 1e-4
    assert not same.any()


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_labels_of_a_rollout_are_what_the_environment_would_have_given(every: int, late: bool) -> None:
    env, _ = env_with(WordEnv(LENGTHS), every=every, late=late, age_key="age")
    expected = rollout(env, 12)
    base = TransformedEnv(WordEnv(LENGTHS), Compose())
    data = rollout(base, 12)
    made, engine = transform(every=every, late=late, age_key="age")
    found = made(data)
    assert found is data
    for key in ("hidden_state", "age", ("next", "hidden_state"), ("next", "age")):
        torch.testing.assert_close(found[key], expected[key])
    assert len(engine.payloads) == 1
    prompts = [tuple(ids) for ids in engine.payloads[0]["input_ids"]]
    assert len(set(prompts)) == len(prompts), "equal prompts are asked once"


def test_labels_of_single_rows_and_without_next() -> None:
    made, _ = transform(text_key="said", policy={"generate_kwargs": {"max_new_tokens": 2}})
    one = made(TensorDict(observation=torch.tensor([4])))
    torch.testing.assert_close(one["hidden_state"], vector_of(4))
    grid = made(TensorDict(observation=torch.arange(6).reshape(2, 3, 1), batch_size=(2, 3)))
    torch.testing.assert_close(grid["hidden_state"], vectors_of(grid["observation"]))
    expected = TOKENIZER.decode(response_of(ids_of(5))[:2], skip_special_tokens=True)
    assert grid[1, 2]["said"] == expected
    assert "next" not in grid


def test_labels_of_texts() -> None:
    made, _ = transform(prompt="w1 {observation} w2")
    texts = ["w5", "w7"]
    data = TensorDict(observation=NonTensorStack(*texts), batch_size=2)
    data = made(data.set("next", data.clone()))
    expected = torch.stack([vector_of(5), vector_of(7)])
    for place in ("hidden_state", ("next", "hidden_state")):
        torch.testing.assert_close(data[place], expected)


def test_labels_of_no_rows() -> None:
    made, engine = transform()
    empty = made(TensorDict(observation=torch.zeros(0, 1), batch_size=0))
    assert empty["hidden_state"].shape == (0, HIDDEN_SIZE)
    assert engine.payloads == []
    policy = {"hidden": HiddenSpec(("response",)), "generate_kwargs": {"max_new_tokens": 1}}
    talking, _ = transform(policy=policy, text_key="said")
    for shape in ((0,), (0, 3), (2, 0)):
        said = talking(TensorDict(observation=torch.zeros(*shape, 1), batch_size=shape))
        assert said.get("said").batch_size == shape


def test_a_replay_buffer_labels_its_samples() -> None:
    made, engine = transform(cache_size=50)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4, transform=made)
    data = rollout(TransformedEnv(WordEnv([2, 100]), Compose()), 5).reshape(-1)
    buffer.extend(data)
    assert engine.payloads == []
    sample = buffer.sample()
    torch.testing.assert_close(sample["hidden_state"], vectors_of(sample["observation"]))
    torch.testing.assert_close(sample["next", "hidden_state"], vectors_of(sample["next", "observation"]))
    for _ in range(20):
        buffer.sample()
    count = len(engine.requests)
    buffer.sample()
    seen = {*data["observation"].flatten().tolist(), *data["next", "observation"].flatten().tolist()}
    assert len(engine.requests) == count <= len(seen), "from the cache"


def test_a_buffer_is_filled_without_asking() -> None:
    """With ``late=True`` an environment's step begins where a buffer's ``extend`` does."""
    made, engine = transform(late=True)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4, transform=made)
    buffer.extend(TensorDict(observation=torch.zeros(5, 1), batch_size=5))
    assert len(buffer) == 5
    assert engine.payloads == []
