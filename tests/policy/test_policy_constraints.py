"""Which tokens a policy may choose: every place that says so, over an engine with made-up logits."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_engine import PAD_ID, WORDS, RecordingEngine, logits_V, response_of, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

from torchrl_sglang_hidden import (
    ActionMask,
    ConstraintError,
    DisallowedTokens,
    HiddenSpec,
    InputError,
    InputTypeError,
    LogitConstraint,
    MissingKeyError,
    SGLangHiddenError,
    SGLangHiddenWrapper,
    TemperatureScale,
    TokenIdError,
    UnknownOptionError,
)
from torchrl_sglang_hidden.policy.action_masks import responses_of

TOKENIZER = tiny_tokenizer()
V = len(WORDS)
NATIVE = json.dumps({"callable": b"code".hex()})
PROMPTS = [[6, 7, 8], [9], [10, 11, 12, 13]]
KEY = "action_mask"


def make(mode: str = "tokens", **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = options.pop("engine", None) or RecordingEngine(tokenizer=TOKENIZER)
    return SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode=mode, hidden=None, **options), engine


def prompts(rows: list[Any] | None = None, key: Any = KEY) -> TensorDictBase:
    """Return prompts of several lengths, each with what its row says at a key."""
    out = []
    for index, ids in enumerate(PROMPTS[: len(rows)] if rows is not None else PROMPTS):
        row = TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()))
        if rows is not None:
            row.set(key, rows[index])
        out.append(row)
    return lazy_stack(out)


def mask_of(ids: Any, size: int = V) -> torch.Tensor:
    mask_V = torch.zeros(size, dtype=torch.bool)
    mask_V[list(ids)] = True
    return mask_V


def responses(out: TensorDictBase) -> list[list[int]]:
    return [row["tokens"].response.tolist() for row in out.unbind(0)]


def plain(batch: TensorDictBase) -> list[dict[str, str]]:
    return [{str(key): str(row.get(key)) for key in row.keys(True, True)} for row in batch.unbind(0)]


# --- arguments and options -------------------------------------------------------------------------------------------


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constructor": ({"constraints": [ActionMask([20, 21])]}, {}),
    "one in the constructor": ({"constraints": ActionMask([20, 21])}, {}),
    "text in the constructor": ({"constraints": [ActionMask([20, 21]).to_str()]}, {}),
    "default": ({"generate_kwargs": {"action_mask": [21, 20]}}, {}),
    "call": ({}, {"action_mask": ActionMask([20, 21])}),
    "ids": ({}, {"action_mask": (20, 21)}),
    "tensor of ids": ({}, {"action_mask": torch.tensor([20, 21])}),
    "mask": ({}, {"action_mask": mask_of([20, 21])}),
    "denied": ({}, {"disallowed_tokens": [i for i in range(V) if i not in (20, 21)]}),
    "processor": ({}, {"custom_logit_processor": ActionMask([20, 21])}),
    "processors": ({}, {"custom_logit_processor": [ActionMask([20, 21]), TemperatureScale(2.0)]}),
    "text": ({}, {"custom_logit_processor": ActionMask([20, 21]).to_str()}),
    "allowed and denied": ({"constraints": ActionMask([20, 21, 22])}, {"disallowed_tokens": DisallowedTokens([22])}),
}


@pytest.mark.parametrize(("options", "call"), WAYS.values(), ids=WAYS)
def test_every_way_to_say_it(options: dict[str, Any], call: dict[str, Any]) -> None:
    policy, _ = make(**options)
    out = policy(prompts(), **call)
    for ids, row in zip(responses(out), out.unbind(0), strict=True):
        assert len(ids) == 5, "the token that ends a response is not allowed"
        assert set(ids) <= {20, 21}
        # Of two tokens, the better one has at least half.
        assert (row["log_probs"].response >= math.log(0.5) - 1e-6).all()


def test_without_constraints_nothing_is_asked_for() -> None:
    policy, engine = make()
    out = policy(prompts())
    assert responses(out) == [response_of(ids) for ids in PROMPTS]
    assert {(request.constraints, request.response_ranges, request.processor) for request in engine.requests} == {
        ((), (), None)
    }


def test_all_places_act_together_in_their_order() -> None:
    temperature, denied = TemperatureScale(2.0), DisallowedTokens([20])
    policy, engine = make(constraints=[temperature], action_mask_key=KEY, generate_kwargs={"disallowed_tokens": [20]})
    own = ActionMask([21, 22])
    out = policy(prompts([torch.tensor(ids) for ids in ([20, 21], [20, 22], [21, 22])]), custom_logit_processor=own)
    assert [request.constraints for request in engine.requests] == [
        (temperature, own, denied, ActionMask(ids)) for ids in ([20, 21], [20, 22], [21, 22])
    ]
    first, second, third = responses(out)
    assert (set(first), set(second)) == ({21}, {22})
    assert set(third) <= {21, 22}


def test_a_call_replaces_the_default_of_the_same_name() -> None:
    policy, engine = make(generate_kwargs={"action_mask": [20], "disallowed_tokens": [22]})
    policy(prompts(), action_mask=[21])
    policy(prompts(), action_mask=None)
    policy(prompts())
    assert [request.constraints for request in engine.requests[::3]] == [
        (ActionMask([21]), DisallowedTokens([22])),
        (DisallowedTokens([22]),),
        (ActionMask([20]), DisallowedTokens([22])),
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"constraints": [7]}, InputTypeError, r"constraints=7 is a int; expected a LogitConstraint"),
        ({"constraints": NATIVE}, InputError, "SGLang's own processor goes alone, into .* custom_logit_processor"),
        ({"constraints": "no_such:{}"}, UnknownOptionError, "no constraint has the name 'no_such'"),
        ({"constraints": "words"}, InputError, "'words' is no constraint"),
        ({"constraints": ActionMask([V])}, TokenIdError, f"id {V} is outside the vocabulary of {V}"),
        ({"generate_kwargs": {"action_mask": [V + 2]}}, TokenIdError, f"id {V + 2} is outside"),
        ({"generate_kwargs": {"action_mask": []}}, ConstraintError, r"action_mask: .* 0 tokens are allowed"),
        ({"generate_kwargs": {"action_mask": torch.ones(3).bool()}}, InputError, rf"shape \(3,\), and {V} tokens"),
        ({"generate_kwargs": {"action_mask": torch.ones(3)}}, InputTypeError, r"action_mask: .*float32"),
        ({"generate_kwargs": {"action_mask": True}}, InputTypeError, "action_mask=True"),
        ({"generate_kwargs": {"disallowed_tokens": "5"}}, InputTypeError, "disallowed_tokens: .*'5' is a str"),
        ({"generate_kwargs": {"disallowed_tokens": [-1]}}, TokenIdError, "-1 is negative"),
        ({"generate_kwargs": {"custom_logit_processor": [1]}}, InputTypeError, "custom_logit_processor: .*1 is a int"),
        ({"generate_kwargs": {"custom_logit_processor": "{"}}, InputError, r"is no JSON .* to_str\(\) writes"),
        ({"generate_kwargs": {"custom_logit_processor": "{" * 9999}}, InputError, "is no JSON"),
        ({"generate_kwargs": {"custom_logit_processor": '{"callable": 7}'}}, InputError, "no 'callable' in hex"),
        ({"generate_kwargs": {"custom_logit_processor": '{"callable": "xy"}'}}, InputError, "no 'callable' in hex"),
        ({"generate_kwargs": {"custom_logit_processor": '{"callable": ""}'}}, InputError, "no 'callable' in hex"),
        ({"generate_kwargs": {"custom_logit_processor": [NATIVE]}}, InputError, "SGLang's own processor goes alone"),
        ({"action_token_ids": [5]}, InputError, r"action_token_ids=\(5,\) without action_mask_key"),
        ({"action_token_ids": [5, 5], "action_mask_key": KEY}, TokenIdError, "each once"),
        ({"action_token_ids": [5, V], "action_mask_key": KEY}, TokenIdError, rf"0\.\.{V - 1}"),
        ({"action_token_ids": [], "action_mask_key": KEY}, InputError, "0 actions"),
        (
            {"action_token_ids": mask_of([1]), "action_mask_key": KEY},
            InputTypeError,
            "in the order of a mask's columns",
        ),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, Any], error: type[SGLangHiddenError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        make(**options)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"action_mask": [V]}, TokenIdError, f"row 0: .*{V} is outside the vocabulary"),
        ({"action_mask": [20], "disallowed_tokens": [20]}, ConstraintError, "row 0: .*leave 0 of 96 tokens"),
        ({"action_mask": torch.zeros(V).bool()}, ConstraintError, "action_mask: .*0 tokens"),
        ({"custom_logit_processor": '{"a": 1}'}, InputError, "no 'callable' in hex"),
        ({"custom_logit_processor": ActionMask}, InputTypeError, "is a ABCMeta"),
    ],
)
def test_calls_that_cannot_work(call: dict[str, Any], error: type[SGLangHiddenError], words: str) -> None:
    policy, engine = make()
    batch = prompts()
    before = plain(batch)
    with pytest.raises(error, match=words):
        policy(batch, **call)
    assert engine.requests == []
    assert plain(batch) == before


# --- SGLang's own processor ------------------------------------------------------------------------------------------


def test_sglangs_own_processor_is_used_alone_and_says_so() -> None:
    policy, engine = make(
        engine=RecordingEngine(tokenizer=TOKENIZER, takes_processors=True),
        constraints=TemperatureScale(2.0),
        action_mask_key=("env", "mask"),
        generate_kwargs={"disallowed_tokens": [3]},
    )
    # The rows have no masks, and none is read.
    words = r"used alone; left out: TemperatureScale, DisallowedTokens, the masks at \('env', 'mask'\)$"
    with pytest.warns(UserWarning, match=words) as caught:
        policy(prompts(), custom_logit_processor=NATIVE)
    assert len(caught) == 1
    assert [(request.processor, request.constraints) for request in engine.requests] == [(NATIVE, ())] * 3


def test_sglangs_own_processor_without_constraints_needs_no_words() -> None:
    engine = RecordingEngine(tokenizer=TOKENIZER, takes_processors=True)
    policy, _ = make(engine=engine, generate_kwargs={"custom_logit_processor": NATIVE})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(prompts())
        policy(prompts(), custom_logit_processor=ActionMask([20]))
    assert [request.processor for request in engine.requests[::3]] == [NATIVE, None]
    assert engine.requests[3].constraints == (ActionMask([20]),)
    assert policy.config.generate_kwargs == {"custom_logit_processor": NATIVE}


def test_sglangs_own_processor_scores_nothing() -> None:
    policy, engine = make(generate=False)
    with pytest.raises(InputError, match=r"custom_logit_processor=.* in scoring, .* acts on tokens that"):
        policy(sequences([[6, 7]], [[False, True]]), custom_logit_processor=NATIVE)
    assert engine.requests == []


def test_the_parameters_of_sglangs_own_processor_go_with_it() -> None:
    taking = RecordingEngine(tokenizer=TOKENIZER, takes_processors=True)
    policy, engine = make(generate_kwargs={"max_new_tokens": 2}, engine=taking)
    policy(prompts(), custom_logit_processor=NATIVE, custom_params={"token_ids": [7, 8]})
    assert [row["custom_params"] for row in engine.payloads[0]["sampling_params"]] == [{"token_ids": [7, 8]}] * 3
    with pytest.raises(InputError, match=r"custom_params=\{'token_ids': \[7\]\} without SGLang's own .* give both"):
        policy(prompts(), custom_params={"token_ids": [7]})
    assert len(engine.payloads) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_mask_of_small_integers_is_not_taken_for_ids(dtype: torch.dtype) -> None:
    policy, engine = make(action_mask_key=KEY)
    with pytest.raises(InputTypeError, match=rf"row 0, 'action_mask': a tensor of {dtype} .*mask\.bool\(\)"):
        policy(prompts([mask_of([20]).to(dtype)] * 3))
    with pytest.raises(InputTypeError, match=rf"action_mask: .*a tensor of {dtype}; .*mask\.bool\(\)"):
        make()[0](prompts(), action_mask=mask_of([20]).to(dtype))
    assert engine.requests == []


def test_a_mask_of_integers_is_not_taken_for_ids() -> None:
    policy, engine = make(action_mask_key=KEY)
    with pytest.raises(InputTypeError, match=r"row 1, 'action_mask': .* 96 zeros and ones, which is a mask; .*bool"):
        policy(prompts([torch.tensor([1, 2]), mask_of([20]).long(), torch.tensor([3])]))
    assert engine.requests == []


# --- rows of a TensorDict --------------------------------------------------------------------------------------------


ACTIONS = (30, 20, 40)
ROWS: dict[str, tuple[list[Any], dict[str, Any], list[set[int]]]] = {
    "bool over all tokens": ([mask_of(ids) for ids in ([20], [21, 22], [5])], {}, [{20}, {21, 22}, {5}]),
    "bool over the actions": (
        [torch.tensor(m) for m in ([True, False, False], [False, True, True], [True, True, True])],
        {"action_token_ids": ACTIONS},
        [{30}, {20, 40}, {30, 20, 40}],
    ),
    "ragged ids": ([torch.tensor(ids) for ids in ([20], [21, 22], [9, 8, 7])], {}, [{20}, {21, 22}, {7, 8, 9}]),
    "lists": ([NonTensorData(ids) for ids in ([20], [22, 21], [9])], {}, [{20}, {21, 22}, {9}]),
    "ids among the actions": (
        [torch.tensor(ids) for ids in ([20], [40, 30], [30])],
        {"action_token_ids": range(20, 41, 10)},
        [{20}, {30, 40}, {30}],
    ),
}


@pytest.mark.parametrize("key", ["action_mask", ("env", "mask")])
@pytest.mark.parametrize(("rows", "options", "allowed"), ROWS.values(), ids=ROWS)
def test_each_row_says_what_it_allows(
    rows: list[Any], options: dict[str, Any], allowed: list[set[int]], key: Any
) -> None:
    policy, engine = make(action_mask_key=key, **options)
    assert policy.in_keys == [("tokens", "prompt"), key]
    out = policy(prompts(rows, key))
    assert [set(request.constraints[0].valid_token_ids) for request in engine.requests] == allowed
    for ids, may in zip(responses(out), allowed, strict=True):
        assert set(ids) <= may


def test_masks_of_a_dense_batch_of_any_shape() -> None:
    policy, engine = make(action_mask_key=KEY)
    masks_BV = torch.stack([mask_of([20 + row]) for row in range(6)])
    tokens = Tokens(prompt=torch.arange(6, 18).reshape(2, 3, 2), batch_size=(2, 3))
    policy(TensorDict({"tokens": tokens, KEY: masks_BV.reshape(2, 3, V)}, batch_size=(2, 3)))
    assert [request.constraints for request in engine.requests] == [(ActionMask([20 + row]),) for row in range(6)]


def test_a_stack_of_lists() -> None:
    policy, engine = make(action_mask_key=KEY)
    tokens = Tokens(prompt=torch.tensor([[6, 7], [8, 9]]), batch_size=2)
    policy(TensorDict({"tokens": tokens, KEY: NonTensorStack([20, 21], [22])}, batch_size=2))
    assert [request.constraints for request in engine.requests] == [(ActionMask([20, 21]),), (ActionMask([22]),)]


def test_equal_masks_are_one_object() -> None:
    policy, engine = make(action_mask_key=KEY)
    policy(prompts([mask_of([20, 21]), mask_of([22]), mask_of([20, 21])]))
    first, second, third = (request.constraints[0] for request in engine.requests)
    assert first is third
    assert first is not second


def test_masks_of_the_samples_of_a_prompt() -> None:
    policy, _ = make(action_mask_key=KEY, num_samples=2)
    out = policy(prompts([torch.tensor([20]), torch.tensor([21]), torch.tensor([22])]))
    assert out.batch_size == (3, 2)
    for row, token in zip(out.unbind(0), (20, 21, 22), strict=True):
        assert [set(ids) for ids in responses(row)] == [{token}] * 2


BAD_ROWS: dict[str, tuple[Any, dict[str, Any], type[SGLangHiddenError], str]] = {
    "too short": (
        mask_of([1], 5),
        {},
        InputError,
        rf"of 5 columns, and the model has {V} .*or action_token_ids",
    ),
    "not the actions": (
        mask_of([1], 2),
        {"action_token_ids": ACTIONS},
        InputError,
        "a mask of 2 columns, and action_token_ids has 3; give both the same length",
    ),
    "all of the vocabulary": (
        mask_of([1]),
        {"action_token_ids": ACTIONS},
        InputError,
        f"{V} columns, and action_",
    ),
    "all False": (mask_of([]), {}, ConstraintError, f"all {V} columns are False, 0 tokens are allowed"),
    "no ids": (torch.tensor([], dtype=torch.int64), {}, ConstraintError, "0 tokens are allowed"),
    "float": (torch.ones(V), {}, InputTypeError, "torch.float32"),
    "two dimensions": (mask_of([1])[None], {}, InputTypeError, rf"shape \(1, {V}\); expected one row per prompt"),
    "no dimension": (torch.tensor(5), {}, InputTypeError, r"shape \(\)"),
    "text": (NonTensorData("5"), {}, InputTypeError, "a str, '5'"),
    "words": (NonTensorData(["w1"]), {}, InputTypeError, "expected a bool mask, or token ids"),
    "bools in a list": (NonTensorData([True, False]), {}, InputTypeError, "a list, .*expected a bool mask"),
    "negative": (torch.tensor([-1, 5]), {}, TokenIdError, "-1 is negative"),
    "outside": (torch.tensor([V]), {}, TokenIdError, f"{V} is outside the vocabulary"),
    "places for ids": (
        torch.tensor([0, 20]),
        {"action_token_ids": ACTIONS},
        InputError,
        "0 is not among the 3",
    ),
    "denied by the wrapper": (
        torch.tensor([20]),
        {"constraints": DisallowedTokens([20])},
        ConstraintError,
        f"leave 0 of {V} tokens",
    ),
}


@pytest.mark.parametrize(("bad", "options", "error", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_are_not_sent(bad: Any, options: dict[str, Any], error: type[SGLangHiddenError], words: str) -> None:
    policy, engine = make(action_mask_key=KEY, **options)
    fine = mask_of([0, 1], len(ACTIONS)) if "action_token_ids" in options else mask_of([20, 21])
    batch = prompts([fine, bad])
    before = plain(batch)
    with pytest.raises(error, match=f"row 1.*{words}") as caught:
        policy(batch)
    assert type(caught.value) is error
    assert engine.requests == []
    assert plain(batch) == before


def test_a_row_without_its_mask() -> None:
    policy, engine = make(action_mask_key=("env", "mask"))
    with pytest.raises(MissingKeyError, match=r"row 0, \('env', 'mask'\): not there.*has .*tokens"):
        policy(prompts())
    batch = prompts()
    batch["env"] = torch.ones(3, 2)
    with pytest.raises(InputTypeError, match=r"(?s)row 0, \('env', 'mask'\): cannot be read.*action_mask_key"):
        policy(batch)
    assert engine.requests == []


def test_a_prompt_that_is_only_read_chooses_nothing() -> None:
    engine = RecordingEngine(tokenizer=TOKENIZER)
    policy = SGLangHiddenWrapper(
        engine,
        tokenizer=TOKENIZER,
        input_mode="tokens",
        hidden=HiddenSpec(("prompt",)),
        constraints=ActionMask([20]),
        action_mask_key=KEY,
    )
    policy(prompts(), max_new_tokens=0)  # without masks
    assert [request.constraints for request in engine.requests] == [()] * 3


# --- given sequences -------------------------------------------------------------------------------------------------


def sequences(ids: list[list[int]], assistant: list[list[bool]] | None, **others: Any) -> TensorDictBase:
    rows = []
    for index, row_ids in enumerate(ids):
        row = TensorDict(tokens=Tokens(full=torch.tensor(row_ids), batch_size=()))
        if assistant is not None:
            row["masks"] = Masks(all_assistant_mask=torch.tensor(assistant[index]), batch_size=())
        rows.append(row.update({key: values[index] for key, values in others.items()}))
    return lazy_stack(rows)


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_responses_are_the_runs_of_the_assistant(mask: list[bool]) -> None:
    runs = responses_of(mask)
    assert [any(start <= place < stop for start, stop in runs) for place in range(len(mask))] == [False, *mask[1:]]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))
    assert all(1 <= start < stop for start, stop in runs)


def expected_log_probs(ids: list[int], assistant: list[bool], allowed: set[int]) -> list[float]:
    """Return the log-probs in plain torch: the fake engine's logits, masked where the assistant speaks."""
    out = [0.0]
    for place in range(1, len(ids)):
        row_V = logits_V(ids[:place])
        if assistant[place]:
            row_V[~mask_of(allowed)] = -math.inf
        out.append(float(row_V.log_softmax(-1)[ids[place]]))
    return out


def test_given_responses_are_scored_as_if_they_were_sampled() -> None:
    ids, assistant = (
        [[6, 7, 20, 21, 8, 20], [20, 22, 9]],
        [[False, False, True, True, False, True], [True, True, False]],
    )
    policy, engine = make(generate=False, action_mask_key=KEY)
    out = policy(sequences(ids, assistant, **{KEY: [torch.tensor([20, 21]), torch.tensor([20])]}))
    assert [request.response_ranges for request in engine.requests] == [((2, 4), (5, 6)), ((1, 2),)]
    for index, row in enumerate(out.unbind(0)):
        expected = expected_log_probs(ids[index], assistant[index], [{20, 21}, {20}][index])
        assert row["log_probs"].full.tolist() == pytest.approx(expected, abs=1e-5)
    assert out[1]["log_probs"].full[1] == -math.inf, "22 is not allowed"


def test_options_of_constraints_act_in_scoring_too() -> None:
    policy, engine = make(generate=False, generate_kwargs={"action_mask": [20, 21], "temperature": 0.5})
    batch = sequences([[6, 20]], [[False, True]])
    policy(batch.clone())
    policy(batch.clone(), action_mask=[20], disallowed_tokens=[9], custom_logit_processor=TemperatureScale(2.0))
    assert [request.constraints for request in engine.requests] == [
        (ActionMask([20, 21]),),
        (TemperatureScale(2.0), ActionMask([20]), DisallowedTokens([9])),
    ]
    with pytest.raises(InputError, match="leave temperature out of the call"):
        policy(batch, action_mask=[20], temperature=1.0)


def test_a_chat_of_several_answers() -> None:
    chat = [
        {"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w14 w15"), ("user", "w2"))
    ]
    data = TensorDict(history=ChatHistory(full=History.from_chats([chat])[0], batch_size=()))
    policy, engine = make("history", generate=False, constraints=ActionMask([20, 21]))
    policy(data)
    (request,) = engine.requests
    ((start, stop),) = request.response_ranges
    assert request.prompt_ids[start:stop] == tuple(TOKENIZER("w14 w15")["input_ids"]) == (20, 21)


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("tokens", lambda: sequences([[6, 7]], None)),
        ("text", lambda: TensorDict(text=Text(full=["w1 w2"], batch_size=1), batch_size=1)),
    ],
)
def test_nothing_says_what_the_constraints_act_on(mode: str, batch: Callable[[], TensorDictBase]) -> None:
    policy, engine = make(mode, generate=False, constraints=ActionMask([20]))
    with pytest.raises(InputError, match=r"row 0: nothing says which .*'all_assistant_mask'.*constraints=\(\)"):
        policy(batch())
    assert engine.requests == []
    policy.get_new_version(constraints=())(batch())
    assert len(engine.requests) == 1


def test_a_sequence_without_a_response_is_scored_as_it_is() -> None:
    policy, engine = make(generate=False, constraints=ActionMask([20]))
    policy(sequences([[6, 7], [20, 7]], [[False, False], [True, False]]))
    assert [(request.constraints, request.response_ranges) for request in engine.requests] == [((), ())] * 2


def test_padded_sequences_count_their_responses_without_pads() -> None:
    policy, engine = make(generate=False, constraints=ActionMask([20]), pad_output=True)
    tokens = Tokens(full=torch.tensor([[PAD_ID, 6, 20]]), padded=True, batch_size=1)
    masks = Masks(
        all_attention_mask=torch.tensor([[False, True, True]]),
        all_assistant_mask=torch.tensor([[False, False, True]]),
        padded=True,
        batch_size=1,
    )
    policy(TensorDict(tokens=tokens, masks=masks, batch_size=1))
    assert engine.requests[0].response_ranges == ((1, 2),)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_new_version_keeps_constraints_as_they_were_read() -> None:
    policy, _ = make(
        constraints=ActionMask([20]).to_str(),
        action_mask_key=KEY,
        action_token_ids=torch.tensor([3, 2]),
        generate_kwargs={"action_mask": mask_of([20]), "custom_logit_processor": 'temperature_scale:{"schedule":2.0}'},
    )
    config = policy.config
    assert config.constraints == (ActionMask([20]),)
    assert config.action_token_ids == (3, 2)
    assert config.generate_kwargs == {
        "action_mask": ActionMask([20]),
        "custom_logit_processor": (TemperatureScale(2.0),),
    }
    assert policy.get_new_version().config == config
    assert policy.get_new_version(action_mask_key=None, action_token_ids=None).in_keys == [("tokens", "prompt")]


class Mine(LogitConstraint, name="mine_of_this_test"):
    def apply(self, logits_V: torch.Tensor, step: Any) -> torch.Tensor:
        logits_V[: step.index + 20] = -math.inf
        return logits_V


def test_a_constraint_of_ones_own() -> None:
    policy, engine = make(engine=RecordingEngine(tokenizer=TOKENIZER, constraints=("mine_of_this_test",)))
    (ids,) = responses(policy(prompts()[:1], custom_logit_processor=Mine()))
    assert engine.requests[0].constraints == (Mine(),)
    assert all(token >= 20 + place for place, token in enumerate(ids))
