"""What `HiddenStateTransform` refuses: each error names row, value and remedy, and nothing is half-written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import fake_engine
from helpers.fake_engine import RecordingServer, abort_a_row, states_ND
from helpers.policy_batches import make
from helpers.word_env import PROMPT, TOKENIZER, WordEnv, vectors_of
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import TransformedEnv

from torchrl_sglang_hidden import (
    Between,
    Each,
    EngineError,
    EngineUnreachableError,
    HeadSpec,
    HiddenSpec,
    HiddenStateTransform,
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    RequestAbortedError,
    SGLangHiddenWrapper,
    connect,
)

READS = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def transform(**options: Any) -> HiddenStateTransform:
    policy = make("text", **{**READS, **options.pop("policy", {})})[0]
    arguments = {"prompt": PROMPT, "in_keys": ["observation"], **options}
    return HiddenStateTransform(policy, arguments.pop("prompt"), **arguments)


def data(*numbers: int) -> TensorDict:
    return TensorDict(observation=torch.tensor(numbers)[:, None], batch_size=len(numbers))


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"every": 0}, InputError, "every=0: expected an integer of at least 1"),
        ({"every": 1.5}, InputTypeError, "every=1.5: expected an integer"),
        ({"every": True}, InputTypeError, "every=True: expected an integer"),
        ({"late": 1}, InputTypeError, "late=1: expected True or False"),
        ({"cache_size": -1}, InputError, "cache_size=-1: expected"),
        ({"cache_size": "9"}, InputTypeError, "cache_size='9': expected"),
        ({"project": 0}, InputError, "project=0: expected"),
        ({"project": 2.0}, InputTypeError, "project=2.0: expected"),
        ({"ablate": "noise"}, InputError, r"ablate='noise': expected None or one of \('zero'"),
        ({"ablate": "frozen", "every": 2}, InputError, "ablate='frozen' with every=2 and late=False: .*leave both out"),
        ({"ablate": "frozen", "late": True}, InputError, "leave both out"),
        ({"in_keys": []}, InputError, r"in_keys=\[\]: expected at least 1 key"),
        ({"prompt": "hi"}, InputError, r"has the fields \[\] and in_keys are \['observation'\]; name each"),
        ({"prompt": "{observation} {done}"}, InputError, r"fields \['done', 'observation'\]"),
        ({"prompt": "{}"}, InputError, r"fields \[''\]"),
        ({"prompt": "{observation"}, InputError, "write a brace that belongs to the text twice"),
        ({"prompt": 3}, InputTypeError, "prompt=3 is a int; expected a format string"),
        ({"text_key": "hidden_state"}, InputError, "give each a key of its own"),
        ({"text_key": "said", "policy": {"text_key": None}}, InputError, "policy with text_key=None"),
        ({"policy": {"hidden": HiddenSpec(("prompt", "response")), "generate_kwargs": {}}}, InputError, "2 vectors"),
        ({"policy": {"hidden": HiddenSpec(("prompt",), spans={"a": Between("w1", "w2")})}}, InputError, "2 vectors"),
        (
            {"policy": {"hidden": HiddenSpec((), spans={"a": Each("w1", segment="prompt")})}},
            InputError,
            r"the span 'a', Each\(.*any number of rows, and one vector is read; give it a pooling",
        ),
        ({"policy": {"hidden": None, "generate_kwargs": {}}}, InputError, "returns no pooled states"),
        ({"policy": {"hidden_states_key": None}}, InputError, "returns no pooled states"),
        (
            {"policy": {"heads": HeadSpec(("d0",), ("prompt",))}},
            InputError,
            r"heads=HeadSpec\(heads=\('d0',\), .*whose scores nothing reads here; use .*heads=None",
        ),
        ({"policy": {"generate": False}}, InputError, "scores sequences; use get_new_version"),
        ({"policy": {"num_samples": 2, "generate_kwargs": {}}}, InputError, "several vectors for each prompt"),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        transform(**options)


def test_a_policy_of_another_class() -> None:
    with pytest.raises(InputTypeError, match=r"is a Linear; expected a SGLangHiddenWrapper"):
        HiddenStateTransform(torch.nn.Linear(1, 1), PROMPT, in_keys=["observation"])  # type: ignore[arg-type]


# --- environments -----------------------------------------------------------------------------------------------------


def test_an_environment_without_the_observation() -> None:
    env = TransformedEnv(WordEnv(), transform(in_keys=["pixels"], prompt="w{pixels}"))
    with pytest.raises(MissingKeyError, match=r"in_keys \['pixels'\]: .*it has \['observation', 'other'\]: change"):
        _ = env.observation_spec


def test_an_environment_that_has_the_key_already() -> None:
    env = TransformedEnv(WordEnv(), transform(out_key="other"))
    with pytest.raises(InputError, match=r"\['other'\]: the environment has observations there; give out_key"):
        _ = env.observation_spec


@pytest.mark.parametrize("options", [{"every": 2}, {"late": True}])
def test_a_step_without_what_the_step_before_wrote(options: dict[str, Any]) -> None:
    env = TransformedEnv(WordEnv(), transform(**options))
    td = env.rand_action(env.reset())
    with pytest.raises(MissingKeyError, match="no 'hidden_state_age', which the step before wrote: pass the"):
        env.step(td.exclude("hidden_state_age"))
    with pytest.raises(MissingKeyError, match="no 'hidden_state', which"):
        env.step(td.exclude("hidden_state"))
    assert env.step(td)["next", "hidden_state"].any()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_data_without_the_key() -> None:
    with pytest.raises(MissingKeyError, match=r"row 0: no 'observation'; it has \['other'\]: add it, or change"):
        transform()(TensorDict(other=torch.zeros(2), batch_size=2))


def test_a_prompt_function_that_fails_for_one_environment() -> None:
    def prompt(row: TensorDictBase) -> str:
        return {20: "w1"}[int(row["observation"])]

    env = TransformedEnv(WordEnv([9, 9]), transform(prompt=prompt))
    with pytest.raises(InputError, match=r"environment 0: the prompt cannot be written, KeyError: 0; it was given .*"):
        env.reset()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "None, a NoneType; expected a text"),
        (b"w1", "a bytes; expected"),
        ([[1, 2]], "expected a text"),
        ([1.5], "expected a text"),
    ],
)
def test_a_prompt_function_that_returns_no_prompt(found: Any, words: str) -> None:
    with pytest.raises(InputTypeError, match=f"row 0: the prompt function returned .*{words}"):
        transform(prompt=lambda row: found)(data(1))


def test_a_prompt_function_that_returns_an_empty_list() -> None:
    with pytest.raises(PromptLengthError, match="row 1: an empty list, 0 messages or token ids; expected at least 1"):
        transform(prompt=lambda row: [7] if row["observation"] == 1 else [])(data(1, 2))


def test_prompts_of_several_kinds() -> None:
    made = transform(prompt=lambda row: "w1" if row["observation"] == 1 else [7, 8])
    with pytest.raises(InputTypeError, match="text for row 0 and tokens for row 1; expected one kind"):
        made(data(1, 2))


def test_a_row_that_the_policy_refuses_is_named_as_the_environments_are() -> None:
    """Of a partial reset the policy sees one row, number 0; it is the environment 1."""

    def prompt(row: TensorDictBase) -> str:
        return "" if row["observation"] == 23 else "w1"

    env = TransformedEnv(WordEnv([9, 1]), transform(prompt=prompt))
    td = env.step(env.rand_action(env.reset()))["next"]
    with pytest.raises(PromptLengthError, match=r"text, row 0: an empty string.*\(row 0 is environment 1\)"):
        env.reset(td.set("_reset", td["done"]))


def test_of_many_rows_the_one_that_failed_is_named() -> None:
    made = transform(prompt=lambda row: "w1 " * (100 if row["observation"] == 2000 else 1))
    env = TransformedEnv(WordEnv([9] * 128), made)
    with pytest.raises(PromptLengthError, match=r"\(row 100 is environment 100\)$"):
        env.reset()


def test_a_prompt_that_is_too_long() -> None:
    made = transform(prompt=lambda row: "w1 " * (100 if row["observation"] == 5 else 1))
    with pytest.raises(PromptLengthError, match=r"row 1 is row 1"):
        made(data(4, 5))


def test_nan_in_an_observation() -> None:
    made = transform(prompt="{observation:.2f}")
    with pytest.raises(InputError, match=r"row 1: 'observation' is tensor\(\[nan\]\); expected numbers: mend"):
        made(TensorDict(observation=torch.tensor([[0.0], [float("nan")]]), batch_size=2))


@pytest.mark.parametrize("late", [False, True])
def test_an_engine_that_fails_leaves_the_data_as_it_was(late: bool) -> None:
    policy, engine = make("text", **{**READS, "generate_kwargs": {"max_new_tokens": 1}})
    made = HiddenStateTransform(policy, PROMPT, in_keys=["observation"], text_key="said", late=late)
    engine.fault = abort_a_row
    td = data(1, 2).set("next", data(2, 3).set("done", torch.zeros(2, 1, dtype=torch.bool)))
    td = td.refine_names("time")
    before = td.clone()
    with pytest.raises(RequestAbortedError, match="row 0 is row 0"):
        made(td)
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    env = TransformedEnv(WordEnv(), HiddenStateTransform(policy, PROMPT, in_keys=["observation"], late=late))
    engine.fault = None
    td = env.rollout(2)[-1]["next"]
    engine.fault = abort_a_row
    with pytest.raises(RequestAbortedError):
        env.step(env.rand_action(td))
    engine.fault = None
    assert env.step(env.rand_action(td))["next", "hidden_state"].any(), "goes on"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nan, r"row 1 \(request .*: the states have NaN; .*dtype='bfloat16'"),
        (torch.inf, r"row 1: 8 of 8 values of its hidden state are NaN or inf.*'w1 w4 w2': change the"),
    ],
)
def test_states_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, value: float, words: str) -> None:
    made, td = transform(), data(3, 4)

    def spoiled(*ids: Any) -> torch.Tensor:
        return torch.full_like(states_ND(*ids), value) if 4 + 6 in ids[0] else states_ND(*ids)

    monkeypatch.setattr(fake_engine, "states_ND", spoiled)
    with pytest.raises(EngineError, match=words):
        made(td)
    assert "hidden_state" not in td


def test_rows_that_the_policy_keeps_with_their_errors() -> None:
    """A policy with ``on_error="nan"`` returns NaN, or what a part of the response came to; an agent gets neither."""
    policy, engine = make("text", **{**READS, "generate_kwargs": {"max_new_tokens": 1}, "on_error": "nan"})
    long = HiddenStateTransform(
        policy, lambda row: "w1 " * (100 if row["observation"] == 4 else 1), in_keys=["observation"]
    )
    with pytest.raises(EngineError, match=r"row 1: .*100 tokens.*; expected a finite vector for the prompt"):
        long(data(3, 4))
    engine.fault = abort_a_row
    with pytest.raises(EngineError, match=r"row 0: .*out of memory.*; expected a finite vector .* 'w1 w3 w2': change"):
        HiddenStateTransform(policy, PROMPT, in_keys=["observation"])(data(3, 4))


@pytest.mark.parametrize("options", [{"every": 2}, {"late": True}, {"ablate": "frozen"}])
def test_labels_in_order_need_time(options: dict[str, Any]) -> None:
    made = transform(**options)
    with pytest.raises(InputError, match=r"batch size \(2,\) .* expected the last one to be 'time'.* or use every=1"):
        made(data(1, 2))
    with pytest.raises(InputError, match=r"batch size \(\) "):
        made(data(1)[0])
    with pytest.raises(MissingKeyError, match=r"data without \('next', 'done'\)"):
        made(data(1, 2).refine_names("time"))


def test_a_message_that_no_cache_can_compare() -> None:
    made = transform(prompt=lambda row: [{"role": "user", "content": object()}], cache_size=3)
    with pytest.raises(InputTypeError, match=r"a message has <object .*; expected strings"):
        made(data(1))


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"late": True}, {"cache_size": 50}], ids=str)
def test_a_server_that_goes_away_in_the_middle_of_a_rollout_and_comes_back(options: dict[str, Any]) -> None:
    server = RecordingServer()
    with connect(server.url) as engine:
        policy = SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode="text", **READS)
        made = HiddenStateTransform(policy, PROMPT, in_keys=["observation"], age_key="age", **options)
        env = TransformedEnv(WordEnv([2, 100]), made)
        _, td = env.step_and_maybe_reset(env.rand_action(env.reset()))
        server.stop()
        steps = [env.rand_action(td)]

        def two_steps() -> None:
            # Of an environment that encodes each second step, one of them.
            for _ in range(2):
                steps.append(env.rand_action(env.step(steps[-1])["next"].clone()))

        with pytest.raises(EngineUnreachableError, match=r"nothing answers at .*row 0 is environment 0"):
            two_steps()
        assert set(steps[-1].keys()) == set(env.rand_action(td).exclude("next").keys()), "nothing half-written"
        server = RecordingServer(server.server_address[1])
        try:
            out = env.rollout(5, break_when_any_done=False)
        finally:
            server.stop()
            env.close()
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"] - out["age"]))
