"""`ragged`: what it builds, that the policy reads it in every mode, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_engine import RecordingEngine, pooled_D, response_of, states_ND, tiny_tokenizer
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.data.llm.history import ContentBase
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

from torchrl_sglang_hidden import (
    HiddenSpec,
    InputError,
    InputTypeError,
    PromptLengthError,
    SGLangHiddenWrapper,
    TokenIdError,
    TokenMask,
    ragged,
)

TOKENIZER = tiny_tokenizer()
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
IDS = [TOKENIZER(text)["input_ids"] for text in TEXTS]
CHATS = [
    [{"role": "user", "content": TEXTS[0]}],
    [
        {"role": "user", "content": TEXTS[1]},
        {"role": "assistant", "content": "w9"},
        {"role": "user", "content": "w3 w3"},
    ],
    [{"role": "system", "content": "w10"}, {"role": "user", "content": TEXTS[2]}],
]
ROWS: dict[str, list[Any]] = {"tokens": IDS, "text": TEXTS, "history": CHATS}
CLASSES = {"tokens": Tokens, "text": Text, "history": ChatHistory}
MODES = list(ROWS)


def make(mode: str, **options: Any) -> SGLangHiddenWrapper:
    return SGLangHiddenWrapper(
        RecordingEngine(tokenizer=TOKENIZER),
        **{"tokenizer": TOKENIZER, "input_mode": mode, "hidden": HiddenSpec(("prompt", "response", "full")), **options},
    )


def ids_sent(policy: SGLangHiddenWrapper) -> list[list[int]]:
    return [list(request.prompt_ids) for request in policy.model.requests]


def ids_of(mode: str, *, scored: bool = False) -> list[list[int]]:
    """Return the ids of `ROWS`, by the tokenizer alone."""
    if mode != "history":
        return IDS
    return [
        TOKENIZER(TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=not scored))["input_ids"]
        for chat in CHATS
    ]


class TestWhatItBuilds:
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("mode", MODES)
    def test_torchrls_own_class_with_one_segment(self, mode: str, full: bool) -> None:
        td = ragged(**{mode: ROWS[mode]}, full=full)
        assert td.batch_size == (3,)
        assert set(td.keys()) == {mode}
        assert isinstance(td[mode], CLASSES[mode])
        assert isinstance(td[0][mode], CLASSES[mode])
        segment, other = ("full", "prompt") if full else ("prompt", "full")
        assert td.get((mode, segment), as_list=True) is not None
        assert getattr(td[mode], other) is None

    def test_ids_are_int64_whatever_they_came_as(self) -> None:
        rows = [[1, 2], (3,), torch.tensor([4, 5, 6], dtype=torch.int32), np.array([7]), [np.int64(8), torch.tensor(9)]]
        found = ragged(tokens=rows).get(("tokens", "prompt"), as_list=True)
        assert [ids.tolist() for ids in found] == [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
        assert {ids.dtype for ids in found} == {torch.int64}

    def test_rows_of_a_tensor_or_a_generator(self) -> None:
        dense = ragged(tokens=torch.arange(6).reshape(2, 3))
        assert dense["tokens"].prompt.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert list(ragged(text=(text for text in TEXTS))["text"].prompt) == TEXTS

    def test_chats_come_as_messages_or_as_histories(self) -> None:
        stacked = History.from_chats(CHATS)
        for rows in (CHATS, [stacked[0], CHATS[1], stacked[2]], stacked):
            td = ragged(history=rows)
            assert [len(td[row]["history"].prompt) for row in range(3)] == [1, 3, 2]
            assert td[1]["history"].prompt[2].content == "w3 w3"

    def test_parts_and_tool_calls_of_a_message(self) -> None:
        part = ContentBase(type="text", text="w1", batch_size=())
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
        td = ragged(history=[[{"role": "user", "content": part}], [call]])
        assert td[0]["history"].prompt[0].content.text == "w1"
        assert list(td[1]["history"].prompt[0].tool_calls) == [{"name": "f"}]

    @pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2, 1)])
    def test_any_batch_size_in_row_major_order(self, shape: tuple[int, ...]) -> None:
        td = ragged(tokens=[[i] * (1 + i) for i in range(6)], batch_size=shape, place=torch.arange(6))
        assert td.batch_size == shape
        assert td["place"].flatten().tolist() == list(range(6))
        policy = make("tokens")
        out = policy(td)
        assert ids_sent(policy) == [[i] * (1 + i) for i in range(6)]
        assert out["hidden_states", "prompt"].shape == (*shape, 8)

    def test_the_device(self) -> None:
        td = ragged(tokens=[[1], [2, 3]], device="meta", weight=[1.0, 2.0])
        assert td.device == td["weight"].device == td[0]["tokens"].prompt.device == torch.device("meta")
        assert ragged(tokens=[[1]]).device is None


class TestFurtherFields:
    def test_ragged_dense_text_and_nested(self) -> None:
        td = ragged(
            tokens=IDS,
            action_mask=[[1], [2, 3], [4]],
            weight=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
            query=["a", "b", "c"],
            states=[True, False, True],
            masks={"all_assistant_mask": [[True] * len(ids) for ids in IDS]},
        )
        assert [ids.tolist() for ids in td.get("action_mask", as_list=True)] == [[1], [2, 3], [4]]
        assert td["weight"].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
        assert list(td["query"]) == ["a", "b", "c"]
        assert td["states"].tolist() == [True, False, True]
        masks = td.get(("masks", "all_assistant_mask"), as_list=True)
        assert [mask.tolist() for mask in masks] == [[True] * len(ids) for ids in IDS]

    def test_a_mask_of_the_rows_own_lengths_reaches_the_engine(self) -> None:
        masks = [[False, True, True], [True], [True, False, False, False]]
        policy = make("tokens", hidden=HiddenSpec(("prompt",), spans={"mine": TokenMask("mine")}))
        out = policy(ragged(tokens=IDS, mine=masks))
        assert out["hidden_states", "span_counts", "mine"].tolist() == [2, 1, 1]

    def test_the_assistants_tokens_of_sequences_to_score(self) -> None:
        masks = [[False, True, True], [True], [True, False, False, False]]
        out = make("tokens", generate=False)(ragged(tokens=IDS, full=True, masks={"all_assistant_mask": masks}))
        assert [mask.tolist() for mask in out.get(("masks", "all_assistant_mask"), as_list=True)] == masks


class TestThroughThePolicy:
    @pytest.mark.parametrize("pad_output", [False, True])
    @pytest.mark.parametrize("mode", MODES)
    def test_generation(self, mode: str, pad_output: bool) -> None:
        policy = make(mode, pad_output=pad_output)
        out = policy(ragged(**{mode: ROWS[mode]}))
        assert ids_sent(policy) == ids_of(mode)
        for row, ids in zip(out.unbind(0), ids_of(mode), strict=True):
            response = response_of(ids)
            assert row["tokens"].response[: len(response)].tolist() == response
            expected = pooled_D(states_ND(ids, response), "response", "mean", len(ids))
            torch.testing.assert_close(row["hidden_states"].response.double(), expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_scoring(self, mode: str) -> None:
        policy = make(mode, generate=False)
        out = policy(ragged(**{mode: ROWS[mode]}, full=True))
        assert ids_sent(policy) == ids_of(mode, scored=True)
        lengths = [len(log_probs) for log_probs in out.get(("log_probs", "full"), as_list=True)]
        assert lengths == [len(ids) for ids in ids_of(mode, scored=True)]

    @pytest.mark.parametrize("mode", MODES)
    def test_an_output_is_an_input_again(self, mode: str) -> None:
        policy = make(mode)
        once = policy(ragged(**{mode: ROWS[mode]}))
        first = [ids.tolist() for ids in once.get(("tokens", "full"), as_list=True)]
        again = policy(once)
        assert ids_sent(policy) == 2 * ids_of(mode)
        assert [ids.tolist() for ids in again.get(("tokens", "full"), as_list=True)] == first

    @pytest.mark.parametrize("inplace", [True, False, "empty"])
    @pytest.mark.parametrize("mode", MODES)
    def test_as_collectors_stack_and_store(self, mode: str, inplace: bool | str) -> None:
        policy = make(mode, inplace=inplace)
        steps = [policy(ragged(**{mode: ROWS[mode][:2]})), policy(ragged(**{mode: ROWS[mode][1:]}))]
        both = lazy_stack(steps, -1)
        assert both.batch_size == (2, 2)
        buffer = ReplayBuffer(storage=LazyStackStorage(4), batch_size=4)
        buffer.extend(both.reshape(-1))
        expected = ids_of(mode)
        stored = [row["tokens"].prompt.tolist() for row in buffer[:].unbind(0)]
        assert stored == [expected[0], expected[1], expected[1], expected[2]]

    @pytest.mark.parametrize("mode", MODES)
    def test_several_samples(self, mode: str) -> None:
        out = make(mode, num_samples=2)(ragged(**{mode: ROWS[mode]}))
        assert out.batch_size == (3, 2)

    def test_candidates(self) -> None:
        assert make("tokens").score(ragged(tokens=IDS), ["w1", "w2 w3"])["logits"].shape == (3, 2)


BAD: dict[str, tuple[type[InputError], str, dict[str, Any]]] = {
    "nothing": (InputError, r"no prompts; expected exactly one of tokens=, text= and history=", {}),
    "a misspelt kind": (InputError, r"no prompts, and the fields \['token'\]", {"token": [[1]]}),
    "two kinds": (InputError, r"got \['text', 'tokens'\]; expected exactly one", {"tokens": [[1]], "text": ["a"]}),
    "full of another type": (InputTypeError, "full=1: expected True or False", {"text": ["a"], "full": 1}),
    "no rows of ids": (PromptLengthError, r"tokens=\[\] has 0 rows; pass at least 1", {"tokens": []}),
    "no rows of text": (PromptLengthError, r"text=\[\] has 0 rows", {"text": []}),
    "no chats": (PromptLengthError, r"history=\[\] has 0 rows", {"history": []}),
    "an empty row": (PromptLengthError, "tokens, row 1: 0 ids; SGLang needs at least 1", {"tokens": [[1], []]}),
    "an empty tensor": (PromptLengthError, "tokens, row 0: 0 ids", {"tokens": [torch.tensor([]).long()]}),
    "an empty text": (PromptLengthError, "text, row 1: an empty string, 0 tokens", {"text": ["a", ""]}),
    "an empty chat": (PromptLengthError, "history, row 0: 0 messages; expected at least 1", {"history": [[]]}),
    "an empty History": (
        PromptLengthError, "history, row 0: 0 messages", {"history": [History.from_chats([CHATS[0]])[0][:0]]},
    ),
    "one row alone": (InputTypeError, r"row 0: 1 is a int; .* ragged\(tokens=\[\[1, 2\]\]\)", {"tokens": [1, 2]}),
    "one tensor alone": (InputTypeError, r"row 0: a tensor of shape \(\);", {"tokens": torch.tensor([1, 2])}),
    "an id alone": (InputTypeError, r"tokens=3 is a int; expected one entry per row: tokens=\[…\]", {"tokens": 3}),
    "a tensor id alone": (InputTypeError, "has no dimension of rows", {"tokens": torch.tensor(3)}),
    "a mapping": (InputTypeError, "is a dict; expected one entry per row", {"tokens": {"a": [1]}}),
    "ids too deep": (InputTypeError, r"row 0: token 0 is \[1\], a list; .* one flat list", {"tokens": [[[1]]]}),
    "a tensor too deep": (InputTypeError, r"a tensor of shape \(1, 2\)", {"tokens": [torch.ones(1, 2).long()]}),
    "a float": (InputTypeError, "row 1: token 1 is 1.5, a float; expected an int", {"tokens": [[1], [2, 1.5]]}),
    "a bool": (InputTypeError, "row 0: token 0 is True, a bool", {"tokens": [[True]]}),
    "a float tensor": (InputTypeError, "ids of torch.float32; expected integers", {"tokens": [torch.ones(2)]}),
    "a bool tensor": (InputTypeError, "ids of torch.bool", {"tokens": [torch.ones(2).bool()]}),
    "a text among ids": (InputTypeError, r"row 1: 'a' is a str; .* ragged\(text=…\)", {"tokens": [[1], "a"]}),
    "a negative id": (TokenIdError, "row 1: token 1 has id -1; expected ids in 0", {"tokens": [[1], [2, -1]]}),
    "a negative id in a tensor": (TokenIdError, "row 0: id -1; .* no padding", {"tokens": [torch.tensor([2, -1])]}),
    "an id beyond int64": (TokenIdError, f"token 0 has id {2**64}", {"tokens": [[2**64]]}),
    "a text alone": (InputTypeError, r"text='abc' is a str; expected one entry per row: text=\[…\]", {"text": "abc"}),
    "a text too deep": (InputTypeError, r"row 0: \['a'\] is a list; expected a string", {"text": [["a"]]}),
    "ids among texts": (InputTypeError, r"row 1: \[1\] is a list; .* ragged\(tokens=…\)", {"text": ["a", [1]]}),
    "a chat alone": (InputTypeError, r"is a dict; .* ragged\(history=\[\[", {"history": CHATS[0]}),
    "a History alone": (
        InputTypeError, r"History of shape \(\); expected one chat, \[turns\]",
        {"history": History.from_chats([CHATS[1]])[0]},
    ),
    "a text among chats": (InputTypeError, "row 0: 'Hi' is a str; expected a list of messages", {"history": ["Hi"]}),
    "a message of another type": (InputTypeError, r"row 0, message 0: \['x'\] is a list", {"history": [[["x"]]]}),
    "no role": (InputTypeError, "row 0, message 0: role None; expected a string", {"history": [[{"content": "x"}]]}),
    "no content": (InputTypeError, "message 0: content None; expected a string", {"history": [[{"role": "user"}]]}),
    "a part as a string": (
        InputTypeError, "message 0: content .* ContentBase, or all dicts",
        {"history": [[{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]]},
    ),
    "an unknown field of a message": (
        InputError, r"row 0, message 0: unknown fields \['name'\]; a History has role, content",
        {"history": [[{"role": "user", "content": "x", "name": "y"}]]},
    ),
    "a field too long": (
        InputError, "query: 2 values; expected one value for each of the 1 rows", {"text": ["a"], "query": ["a", "b"]},
    ),
    "a nested field too short": (
        InputError, r"masks\['m'\]: 1 values; expected one value for each of the 2 rows",
        {"text": ["a", "b"], "masks": {"m": [[True]]}},
    ),
    "a misspelt argument": (InputError, "devce: 'cpu', a str; expected one value", {"text": ["a"], "devce": "cpu"}),
    "a scalar field": (InputError, "weight: 1.0, a float", {"text": ["a"], "weight": 1.0}),
    "a tensor without rows": (InputError, "weight: .* a Tensor; expected", {"text": ["a"], "weight": torch.ones(())}),
    "another batch size": (
        InputError, r"batch_size=\(2,\) with 1 rows; expected a shape of 1", {"text": ["a"], "batch_size": (2,)},
    ),
    "no batch size": (InputError, r"batch_size=\(\) with 1 rows", {"text": ["a"], "batch_size": ()}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_remedy(name: str) -> None:
    error, message, arguments = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        ragged(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("mode", MODES)
def test_a_vocabulary_is_the_engines_to_know(mode: str) -> None:
    """The rows that `ragged` takes are checked again where they are sent."""
    policy = make("tokens")
    with pytest.raises(TokenIdError, match="row 1"):
        policy(ragged(tokens=[[1], [2, 10**6]]))
    assert policy.model.requests == []
    with pytest.raises(InputError, match=mode):
        make(mode)(wrong_kind(mode))


def wrong_kind(mode: str) -> TensorDictBase:
    other = MODES[MODES.index(mode) - 1]
    return ragged(**{other: ROWS[other]})


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("tokens", torch.ones(2, 3, 4).long()),
        ("tokens", "w1"),
        ("text", torch.tensor([[1, 2], [3, 4]])),
        ("history", ["w1", "w2"]),
    ],
)
def test_what_the_policy_cannot_read_names_ragged(mode: str, value: Any) -> None:
    wrong = TensorDict({mode: TensorDict({"prompt": value}, batch_size=2)}, batch_size=2)
    with pytest.raises(InputTypeError, match=rf"row 0.*ragged\({mode}=…\)"):
        make(mode)(wrong)


def test_what_is_no_tensordict_names_ragged() -> None:
    with pytest.raises(InputTypeError, match=r"the policy reads a TensorDict, such as ragged\(…\)"):
        make("text")(TEXTS)
