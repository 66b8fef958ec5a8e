"""Spans of a prompt: which of its tokens each means, in every input mode, and what is refused before anything is sent.

1. A mask's True places, pads dropped with the ids. Its length is the prompt's, its dtype bool.
2. A message's words, however often they stand elsewhere in the chat, and however the ids were cut.
3. The last tokens, and those between markers.
4. What cannot be found names its row and its span, and no row is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers.byte_tokenizers import byte_tokenizer, fallback_tokenizer
from helpers.fake_engine import PAD_ID, RecordingEngine, bos_tokenizer, tiny_tokenizer
from helpers.small_tokenizers import letter_by_letter, letters_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import Between, HiddenSpec, LastTokens, Role, SGLangHiddenWrapper, TokenMask, Turn
from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    PromptLengthError,
    SGLangHiddenError,
    SpanError,
    TokenIdError,
)
from torchrl_sglang_hidden.policy.prompts import InputMode
from torchrl_sglang_hidden.spec.spans import PromptSpan, Span

TOKENIZER = tiny_tokenizer()
LETTERS = letters_tokenizer()
Chat = list[tuple[str, str]]


def make(
    mode: InputMode,
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    *,
    spans: dict[str, Span] | None = None,
    **options: Any,
) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = RecordingEngine(tokenizer=tokenizer, context_length=4096, max_prompt_tokens=4000, vocab_size=5000)
    hidden = HiddenSpec((), spans=spans or {"it": TokenMask("mask")})
    return SGLangHiddenWrapper(engine, tokenizer=tokenizer, input_mode=mode, hidden=hidden, **options), engine


def intervals(engine: RecordingEngine, name: str = "it") -> list[Any]:
    found = [request.spans[name] for request in engine.requests]
    return [span.intervals if isinstance(span, PromptSpan) else span for span in found]


def places(engine: RecordingEngine, name: str = "it") -> list[list[int]]:
    return [[place for start, stop in row for place in range(start, stop)] for row in intervals(engine, name)]


def words(engine: RecordingEngine, tokenizer: PreTrainedTokenizerBase, name: str = "it") -> list[str]:
    """Return the text of each request's span."""
    return [
        tokenizer.decode([request.prompt_ids[place] for place in row])
        for request, row in zip(engine.requests, places(engine, name), strict=True)
    ]


def history_of(chat: Chat) -> History:
    return History.from_chats([[{"role": role, "content": content} for role, content in chat]])[0]


def chats(*given_chats: Chat, key: str = "prompt", **others: Any) -> TensorDictBase:
    rows = [TensorDict(history=ChatHistory(**{key: history_of(chat)}, batch_size=())) for chat in given_chats]
    for name, values in others.items():
        for row, value in zip(rows, values, strict=True):
            row.set(name, value)
    return lazy_stack(rows)


def ragged(*rows: list[int], masks: Sequence[Any] = ()) -> TensorDictBase:
    tds = [TensorDict(tokens=Tokens(prompt=torch.tensor(ids), batch_size=()), batch_size=()) for ids in rows]
    for td, mask in zip(tds, masks, strict=False):
        td["mask"] = torch.tensor(mask)
    return lazy_stack(tds)


# --- masks ------------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(2, 95), st.booleans()), min_size=1, max_size=8).filter(
            lambda row: any(inside for _, inside in row)
        ),
        min_size=1,
        max_size=4,
    ),
    padded=st.booleans(),
)
def test_a_mask_of_ids(rows: list[list[tuple[int, bool]]], padded: bool) -> None:
    policy, engine = make("tokens")
    ids, masks = [[i for i, _ in row] for row in rows], [[inside for _, inside in row] for row in rows]
    if padded:
        width = max(map(len, ids))
        left = [width - len(row) for row in ids]
        # A pad that the mask says is in the span is a pad all the same.
        batch: TensorDictBase = TensorDict(
            tokens=Tokens(
                prompt=torch.tensor([[PAD_ID] * n + row for n, row in zip(left, ids, strict=True)]),
                padded=True,
                batch_size=len(rows),
            ),
            mask=torch.tensor([[True] * n + row for n, row in zip(left, masks, strict=True)]),
            batch_size=len(rows),
        )
    else:
        batch = ragged(*ids, masks=masks)
    policy(batch)
    assert [list(request.prompt_ids) for request in engine.requests] == ids
    assert places(engine) == [[place for place, inside in enumerate(mask) if inside] for mask in masks]


def test_a_mask_is_in_the_keys_that_are_read() -> None:
    spans: dict[str, Span] = {"a": TokenMask(("my", "mask")), "b": TokenMask("other"), "c": TokenMask(("my", "mask"))}
    policy, engine = make("tokens", spans=spans)
    assert policy.in_keys == [("tokens", "prompt"), ("my", "mask"), "other"]
    batch = ragged([6, 7])
    batch["my", "mask"], batch["other"] = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    policy(batch)
    assert [places(engine, name) for name in "abc"] == [[[0]], [[1]], [[0]]]


def test_masks_of_texts_and_chats_have_an_entry_per_token() -> None:
    policy, engine = make("text")
    row = TensorDict(text=Text(prompt="w1 w2 w3", batch_size=()), mask=torch.tensor([False, True, True]), batch_size=())
    policy(row)
    assert words(engine, TOKENIZER) == ["w2 w3"]
    policy, engine = make("history")
    policy(chats([("user", "w1")], mask=[torch.tensor([False] * 2 + [True] + [False] * 3)]))
    assert words(engine, TOKENIZER) == ["w1"]


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (None, MissingKeyError, r"row 1, span 'it': TokenMask.* has no 'mask'; it has \[.*'prompt'\)"),
        (torch.ones(3), InputTypeError, r"row 1, span 'it':.*tensor of torch\.float32; expected .* torch\.bool"),
        (torch.ones(3, dtype=torch.int64), InputTypeError, r"row 1.*torch\.int64"),
        (torch.ones(2).bool(), InputError, r"row 1.*shape \(2,\), and the prompt's ids \(3,\); give both the same"),
        (torch.ones(4).bool(), InputError, r"row 1.*shape \(4,\)"),
        (torch.ones(1, 3).bool(), InputError, r"row 1.*shape \(1, 3\)"),
        (torch.zeros(3).bool(), SpanError, r"row 1, span 'it': a mask of 3 tokens is False everywhere"),
    ],
)
@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_masks_that_are_none(mode: InputMode, mask: Any, error: type[SGLangHiddenError], text: str) -> None:
    policy, engine = make(mode)
    good = torch.ones(3).bool()
    rows = []
    for value in (good, mask):
        of_mode = Text(prompt="w1 w2 w3", batch_size=()) if mode == "text" else Tokens(prompt=torch.tensor([6, 7, 8]))
        rows.append(TensorDict({mode: of_mode}, batch_size=()))
        if value is not None:
            rows[-1].set("mask", value)
    with pytest.raises(error, match=text):
        policy(lazy_stack(rows))
    assert engine.requests == []


def test_a_mask_that_is_true_on_pads_only_is_empty() -> None:
    policy, _ = make("tokens")
    td = TensorDict(
        tokens=Tokens(prompt=torch.tensor([[PAD_ID, 6]]), padded=True, batch_size=1),
        mask=torch.tensor([[True, False]]),
        batch_size=1,
    )
    with pytest.raises(SpanError, match=r"row 0, span 'it': a mask of 1 tokens"):
        policy(td)


def test_a_mask_that_is_no_tensor() -> None:
    policy, _ = make("tokens")
    td = TensorDict(tokens=Tokens(prompt=torch.tensor([[6]]), batch_size=1), mask=["yes"], batch_size=1)
    with pytest.raises(
        InputTypeError, match=r"row 0, span 'it': .*there is a NonTensorData; expected a tensor of torch\.bool"
    ):
        policy(td)


def test_a_key_through_a_tensor() -> None:
    policy, _ = make("tokens", spans={"it": TokenMask(("mask", "deep"))})
    with pytest.raises(InputTypeError, match=r"row 0, span 'it'"):
        policy(ragged([6], masks=[[True]]))


# --- messages ---------------------------------------------------------------------------------------------------------

# Words that stand elsewhere too: in the headers, in other messages, at the start of a longer one.
CHAT: Chat = [
    ("system", "w1"), ("user", "user"), ("assistant", "w1 w2"), ("user", "w1"), ("assistant", "assistant w1 w2 w3"),
    ("user", "w2"),
]  # fmt: skip


@pytest.mark.parametrize("turn", [*range(len(CHAT)), -1, -6])
def test_the_words_of_a_turn(turn: int) -> None:
    policy, engine = make("history", spans={"it": Turn(turn)})
    policy(chats(CHAT, [*CHAT[:turn], *CHAT[turn:]]))
    text = TOKENIZER.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=False)
    before = [{"role": role, "content": content} for role, content in CHAT[: turn % len(CHAT)]]
    head = TOKENIZER.apply_chat_template(before, tokenize=False) if before else ""
    assert text.startswith(head)
    start = len(TOKENIZER(head)["input_ids"]) + 2  # <|start|> role
    length = len(CHAT[turn][1].split())
    assert intervals(engine) == [((start, start + length),)] * 2


def test_the_words_of_a_role() -> None:
    policy, engine = make("history", spans={role: Role(role) for role in ("user", "assistant", "system")})
    policy(chats(CHAT, [("system", "w4"), ("user", ""), ("user", "w5"), ("assistant", "w6")]))
    of_role = {role: [c for r, c in CHAT if r == role] for role in ("user", "assistant", "system")}
    for role, others in (("user", "w5"), ("assistant", "w6"), ("system", "w4")):
        assert words(engine, TOKENIZER, role) == [" ".join(of_role[role]), others]
        assert len(intervals(engine, role)[0]) == len(of_role[role])


@pytest.mark.parametrize(
    ("span", "chat", "text"),
    [
        (Turn(1), [("user", "w1")], r"row 1, span 'it': Turn\(index=1\): the chat has 1 messages, of \['user'\]"),
        (Turn(-2), [("user", "w1")], r"Turn\(index=-2\): the chat has 1 messages"),
        (
            Role("tool"),
            [("user", "w1")],
            r"row 1, span 'it': Role\(name='tool'\): .*no message of this role.*\['user'\]",
        ),
        (Turn(0), [("user", "")], r"row 1, span 'it': Turn\(index=0\): the chat's messages \[0\] are empty"),
        (Role("user"), [("user", ""), ("user", "")], r"the chat's messages \[0, 1\] are empty"),
    ],
)
def test_turns_that_are_not_there(span: Span, chat: Chat, text: str) -> None:
    policy, engine = make("history", spans={"it": span})
    good: Chat = [("user", "w1"), ("tool", "w2"), ("user", "w3")]
    with pytest.raises(SpanError, match=text):
        policy(chats(good, chat))
    assert engine.requests == []


@pytest.mark.parametrize("mode", ["text", "tokens"])
@pytest.mark.parametrize("span", [Turn(0), Role("user")])
def test_only_chats_have_messages(mode: InputMode, span: Span) -> None:
    with pytest.raises(
        InputError, match=rf"the span 'it', {type(span).__name__}.*input_mode='{mode}'.*only history mode"
    ):
        make(mode, spans={"it": span})
    policy, _ = make("history", spans={"it": span})
    with pytest.raises(InputError, match="only history mode"):
        policy.get_new_version(input_mode=mode)


def test_messages_that_fill_a_chat_up_do_not_count() -> None:
    policy, engine = make("history", spans={"it": Turn(-1)})
    policy(chats([("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("<none>", "")]))
    assert words(engine, TOKENIZER) == ["w3"]


TEMPLATES = {
    "strips": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}",
    "system into the first": "<|start|>user\n{% for m in messages %}{{ m.content }}\n{% endfor %}<|end|>",
    "a title that is a word": "abc: {% for m in messages %}{{ m.content }}\nabc {% endfor %}",
    "in quotes": "{% for m in messages %}{{ m.content | tojson }}\n{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_templates_that_keep_the_words(template: str) -> None:
    policy, engine = make(
        "history", LETTERS, spans={"first": Turn(0), "second": Turn(1)}, chat_template=template, prefer_tokens=True
    )
    policy(chats([("system", "abc"), ("user", "abc")], [("user", "he llo"), ("assistant", "he")]))
    assert words(engine, LETTERS, "first") == ["abc", "he llo"]
    assert words(engine, LETTERS, "second") == ["abc", "he"]
    assert [
        a[0][0] < b[0][0] for a, b in zip(intervals(engine, "first"), intervals(engine, "second"), strict=True)
    ] == [
        True,
        True,
    ]


@pytest.mark.parametrize("template", ["{{ m.content | upper }}", "{{ m.content }} {{ m.content }}", "{{ m.role }}"])
def test_a_template_that_rewrites_the_words(template: str) -> None:
    policy, engine = make(
        "history", spans={"it": Turn(1)}, chat_template=f"{{% for m in messages %}}{template} {{% endfor %}}"
    )
    with pytest.raises(InputError, match=r"row 0, span 'it': the chat template rewrites the user's message 1"):
        policy(chats([("system", "w1"), ("user", "w2")]))
    assert engine.requests == []


def test_only_the_message_that_is_asked_for_must_be_kept() -> None:
    template = "{% for m in messages %}{{ m.content if loop.first else m.content | upper }} {% endfor %}"
    policy, engine = make("history", spans={"it": Turn(0)}, chat_template=template)
    policy(chats([("user", "w1 w2"), ("user", "w2")]))
    assert words(engine, TOKENIZER) == ["w1 w2"]


def test_an_answer_whose_thoughts_the_template_looks_at() -> None:
    # As Qwen3's: an empty thought where there is none, so that the frame around other words is another one.
    template = (
        "{% for m in messages %}<|start|> {{ m.role }} {% if m.role == 'assistant' and 'w90' not in m.content %}"
        "w80 {% endif %}{{ m.content }} <|end|> {% endfor %}"
    )
    policy, engine = make("history", spans={"it": Role("assistant")}, chat_template=template)
    policy(chats([("user", "w1"), ("assistant", "w90 w2"), ("user", "w3"), ("assistant", "w4")]))
    assert places(engine) == [[6, 7, 16]]


@pytest.mark.parametrize("template", ["{{ messages[0].content[0].text }} w1", "{{ messages[0].content[0].text[1:] }}"])
def test_a_message_of_parts(template: str) -> None:
    policy, engine = make("history", spans={"it": Turn(0)}, chat_template=template)
    chat = History(role="user", content="w2", batch_size=())
    row = lazy_stack([chat])
    row.set("content", [[{"type": "text", "text": "w3"}]])
    given = TensorDict(history=ChatHistory(prompt=row, batch_size=()), batch_size=())
    if "w1" in template:
        policy(given)
        assert engine.requests[0].spans["it"].intervals == ((0, 1),)
        return
    with pytest.raises(InputError, match=r"row 0, span 'it': the chat template rewrites the user's message 0, part 0"):
        policy(given)


# --- messages in ids that were cut otherwise --------------------------------------------------------------------------

CONTENT = st.text(alphabet="abcdelorstu ?", min_size=1, max_size=10).filter(lambda text: text == text.strip())


@given(contents=st.lists(CONTENT, min_size=1, max_size=4), data=st.data())
def test_preferred_ids_are_those_that_the_span_is_of(contents: list[str], data: st.DataObject) -> None:
    chat = [(("user", "assistant")[turn % 2], content) for turn, content in enumerate(contents)]
    turn = data.draw(st.integers(0, len(contents) - 1))
    text = LETTERS.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat], tokenize=False, add_generation_prompt=True
    )
    ids = letter_by_letter(text)
    policy, engine = make("history", LETTERS, spans={"it": Turn(turn)}, prefer_tokens=True)
    batch = chats(chat, chat)
    row = batch[0]
    row["tokens"] = Tokens(prompt=torch.tensor(ids), batch_size=())
    policy(lazy_stack([row, batch[1].set("tokens", Tokens(prompt=torch.tensor([4]), batch_size=()))]))
    assert list(engine.requests[0].prompt_ids) == ids
    assert words(engine, LETTERS)[0] == contents[turn]
    # The tokenizer's own ids may hold a letter of the frame: every letter is in, and no token without one.
    own = words(engine, LETTERS)[1]
    assert contents[turn] in own
    span = intervals(engine)[1][0]
    inner = engine.requests[1].prompt_ids[span[0] + 1 : span[1] - 1]
    assert LETTERS.decode(inner) in contents[turn]


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, fallback_tokenizer])
@given(data=st.data())
def test_ids_cut_through_characters(
    make_tokenizer: Callable[[], tuple[PreTrainedTokenizerBase, list[bytes]]], data: st.DataObject
) -> None:
    tokenizer, tokens = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}é{{ m.role }}😀{{ m.content }}é{% endfor %}"
    tokenizer.add_special_tokens({"pad_token": "<t>"})
    policy, engine = make("history", tokenizer, spans={"it": Turn(1)}, prefer_tokens=True)
    row = chats([("user", "日本"), ("assistant", "ab 😀日本")])[0]
    head, words, tail = (text.encode() for text in ("éuser😀日本ééassistant😀", "ab 😀日本", "é"))
    rest, ids = head + words + tail, []
    while rest:
        ids.append(data.draw(st.sampled_from([i for i, token in enumerate(tokens) if rest.startswith(token)])))
        rest = rest[len(tokens[ids[-1]]) :]
    row["tokens"] = Tokens(prompt=torch.tensor(ids), batch_size=())
    policy(row)
    assert list(engine.requests[0].prompt_ids) == ids
    ends = list(accumulate(len(tokens[token]) for token in ids))
    inside = [
        place
        for place, end in enumerate(ends)
        if end > len(head) and end - len(tokens[ids[place]]) < len(head) + len(words)
    ]
    assert places(engine) == [inside]


def test_ids_that_are_not_the_chats_text_are_refused() -> None:
    options: dict[str, Any] = {"tokenizer": bos_tokenizer(), "tokenizer_kwargs": {"add_special_tokens": True}}
    policy, engine = make("history", spans={"it": Turn(0)})
    policy = policy.get_new_version(**options)
    with pytest.raises(InputError, match=r"row 0, span 'it': Turn.*8 ids do not decode.*leave prefer_tokens"):
        policy(chats([("user", "w1 w2")]))
    assert engine.requests == []


# --- last tokens and markers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fewer", "start"), [(1, False, 3), (4, False, 0), (4, True, 0), (9, True, 0)])
def test_the_last_tokens(count: int, fewer: bool, start: int) -> None:
    policy, engine = make("tokens", spans={"it": LastTokens(count, "prompt", allow_fewer=fewer)})
    policy(ragged([6, 7, 8, 9]))
    assert intervals(engine) == [((start, 4),)]


def test_more_last_tokens_than_there_are() -> None:
    policy, engine = make("tokens", spans={"it": LastTokens(3, "prompt")})
    with pytest.raises(SpanError, match=r"row 1, span 'it': LastTokens\(count=3.*2 tokens; lower.*allow_fewer=True"):
        policy(ragged([6, 7, 8], [6, 7]))
    assert engine.requests == []


def test_between_markers_of_the_prompt() -> None:
    spans: dict[str, Span] = {"it": Between("user", "<|end|>", "prompt"), "rest": Between("w1", None, "prompt")}
    policy, engine = make("history", spans=spans)
    policy(chats([("user", "w1 w2")], [("system", "w1"), ("user", "w3")]))
    assert words(engine, TOKENIZER) == ["w1 w2", "w3"]
    assert words(engine, TOKENIZER, "rest")[0] == "w2 <|end|> <|start|> assistant"
    with pytest.raises(SpanError, match=r"row 0, span 'it': the marker 'user' is not in the prompt"):
        policy(chats([("system", "w1")]))
    assert len(engine.requests) == 2


def test_spans_of_a_response_are_left_to_the_engine() -> None:
    spans: dict[str, Span] = {"it": LastTokens(1), "two": Between(None, "w1", unclosed="end")}
    policy, engine = make("tokens", spans=spans)
    policy(ragged([6, 7]))
    assert dict(engine.requests[0].spans) == spans


# --- rows that are the engine's to refuse, and rows that want none ----------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "error"), [([], PromptLengthError), ([-1], TokenIdError), ([2**40], TokenIdError), ([5000], TokenIdError)]
)
def test_rows_that_no_engine_takes(ids: list[int], error: type[InputError]) -> None:
    policy, engine = make("tokens", spans={"it": Between("w1", None, "prompt"), "last": LastTokens(1, "prompt")})
    empty = torch.tensor(ids, dtype=torch.int64)
    with pytest.raises((error, SpanError) if ids == [5000] else error, match="row 0"):
        policy(TensorDict(tokens=Tokens(prompt=empty, batch_size=()), batch_size=()))
    assert engine.requests == []


def test_a_row_that_wants_no_states_needs_no_span() -> None:
    policy, engine = make("history", spans={"it": Role("tool")})
    policy(chats([("tool", "w1")], [("user", "w2")], return_hidden_states=[torch.tensor(True), torch.tensor(False)]))
    assert [request.hidden is None for request in engine.requests] == [False, True]
    assert [dict(request.spans) for request in engine.requests][1] == {}


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_spans_of_a_given_sequence() -> None:
    spans: dict[str, Span] = {
        "it": Role("assistant"), "mask": TokenMask("mask"), "last": LastTokens(2, "prompt"),
        "word": Between("user", "<|end|>", "prompt"), "sampled": LastTokens(1), "later": Between("w1", None),
    }  # fmt: skip
    policy, engine = make("history", spans=spans, generate=False)
    chat: Chat = [("user", "w1 w2"), ("assistant", "w3 w4")]
    mask = torch.tensor([True, False, False, False, False] + [False] * 4 + [True])
    out = policy(chats(chat, key="full", mask=[mask]))
    assert engine.requests[0].hidden is not None
    assert list(engine.requests[0].spans) == list(engine.requests[0].hidden.spans) == ["it", "mask", "last", "word"]
    assert words(engine, TOKENIZER) == ["w3 w4"]
    assert words(engine, TOKENIZER, "word") == ["w1 w2"]
    assert places(engine, "mask") == [[0, 9]]
    assert places(engine, "last") == [[8, 9]]
    written = {("hidden_states", part, name) for part in ("spans", "span_counts") for name in engine.requests[0].spans}
    assert {key for key in policy.out_keys if len(key) == 3} == written
    assert all(key in out for key in policy.out_keys)
    assert policy.in_keys == [("history", "full"), "mask"]
