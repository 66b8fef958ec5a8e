"""What holds for every tokenizer and template, over random chats: over 10,000 of them.

1. The ids that are sent are those that are recorded, and the text is theirs.
2. The masks have what the assistant said, and nothing else.
3. A turn begins with the ids of the turn before, prompt and response; or a warning or an error says that it does not.
4. Whatever goes wrong is an error of this package.

The chats are the same in each run. ``TORCHRL_SGLANG_HIDDEN_TEST_SEED=1`` draws others.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from helpers.random_chats import (
    CASES,
    MODES,
    Answer,
    Case,
    Talk,
    Talking,
    answers,
    chats,
    check_text,
    spoken,
    texts,
    wild_chats,
    writes,
)
from helpers.templates_zoo import GENERATION_TIGHT, QWEN3, R1, ZooTemplate
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tensordict import lazy_stack

from torchrl_sglang_hidden import InputError, SGLangHiddenError, ragged

SEED = int(os.environ.get("TORCHRL_SGLANG_HIDDEN_TEST_SEED", "0"))
NUM_TURNS = 2
# Examples of each case, and chats of each example; a scored chat costs a fifth of one with two turns.
SCORED, TALKED, WILD = 8, 4, 8
ROWS = 5
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def hold(case: Case, strategy: st.SearchStrategy[Any], claim: Callable[[Any], None], examples: int) -> None:
    """Hold a claim against examples of its own for each case."""
    check = settings(max_examples=examples)(given(strategy)(claim))
    seed(zlib.crc32(f"{case}{SEED}".encode()))(check)()


def batch_of(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(rows, min_size=ROWS, max_size=ROWS)


def test_there_are_ten_thousand_chats() -> None:
    assert len(CASES) * (SCORED + TALKED) * ROWS >= 10_000


# --- scoring ----------------------------------------------------------------------------------------------------------


@every_case
def test_scored_chats_are_marked_where_the_assistant_speaks(case: Case) -> None:
    tokenizer = case.make_tokenizer()

    def claim(batch: list[list[dict[str, Any]]]) -> None:
        policy, engine = case.make_policy(tokenizer, generate=False)
        known: list[tuple[list[dict[str, Any]], list[tuple[int, int]]]] = []
        for chat in batch:
            ranges = spoken(case, chat, tokenizer) if writes(case, chat, tokenizer) else None
            if ranges is not None:
                known.append((chat, ranges))
                continue
            with pytest.raises(InputError, match="row 0"):
                policy(ragged(history=[chat], full=True))
        if not known:
            return
        out = policy(ragged(history=[chat for chat, _ in known], full=True))
        assert len(engine.requests) == len(known)
        for (chat, ranges), row, request in zip(known, out.unbind(0), engine.requests, strict=True):
            ids, text = list(request.prompt_ids), case.render(chat, tokenizer)
            assert row["tokens"].full.tolist() == ids
            assert row["text"].full == text
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            assert encoded["input_ids"] == ids
            mask = row["masks"].all_assistant_mask.tolist()
            assert mask == [
                any(start < until and end > since for since, until in ranges)
                for start, end in encoded["offset_mapping"]
            ]
            assert row["masks"].all_attention_mask.all()
            if case.keeps(text):
                check_text(tokenizer, ids, text)

    hold(
        case,
        batch_of(st.sampled_from(("assistant", "user")).flatmap(lambda role: chats(case.template, ends_with=role))),
        claim,
        SCORED,
    )


@pytest.mark.parametrize(
    ("template", "said", "then"),
    [(QWEN3, "</think>", None), (R1, "hm</think>yes", "hm</think>yes, you said?")],
    ids=["in the template's frame", "in the next question"],
)
def test_words_that_the_template_rewrites_are_not_found_elsewhere(
    template: ZooTemplate, said: str, then: str | None
) -> None:
    """Shrunk from random chats."""
    case = Case("byte_level", template, native=True)
    policy, engine = case.make_policy(case.make_tokenizer(), generate=False)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    chat += [{"role": "user", "content": then}] if then else []
    with pytest.raises(InputError, match=r"row 0.*rewrites the assistant's message 1"):
        policy(ragged(history=[chat], full=True))
    assert not engine.requests


# --- turns ------------------------------------------------------------------------------------------------------------


@every_case
def test_turns_go_on_from_what_was_sampled(case: Case) -> None:
    tokenizer = case.make_tokenizer()

    def claim(drawn: tuple[list[tuple[list[dict[str, Any]], list[tuple[Answer, str]], str]], bool]) -> None:
        rows, padded = drawn
        for mode in MODES:
            talks = [Talk(ragged(history=[chat])[0], turns) for chat, turns, of_mode in rows if of_mode == mode]
            for _ in range(NUM_TURNS):
                if talks:
                    talks = Talking(case, tokenizer, mode, padded).turn(talks)

    turns = st.lists(st.tuples(answers(), texts()), min_size=NUM_TURNS, max_size=NUM_TURNS)
    rows = st.tuples(chats(case.template, ends_with="user"), turns, st.sampled_from(tuple(MODES)))
    hold(case, st.tuples(batch_of(rows), st.booleans()), claim, TALKED)


@pytest.mark.parametrize("mode", ["prefer", "strict", "append"])
@pytest.mark.parametrize("letters", ["", "Paris"])
def test_a_tokenizer_that_writes_a_blank_before_a_text_goes_on_behind_ids(letters: str, mode: str) -> None:
    """Shrunk from random chats: no blank comes before what follows the ids, and nothing is said or refused."""
    case = Case("sentencepiece_first", GENERATION_TIGHT, native=True)
    tokenizer = case.make_tokenizer()
    answer = Answer("", tuple(tokenizer.convert_tokens_to_ids(list(letters))), "eos")
    chat = [{"role": "user", "content": "hi"}]
    talks = [Talk(ragged(history=[chat])[0], [(answer, "\x07a"), (answer, "")])]
    talks = Talking(case, tokenizer, mode, padded=False).turn(talks)
    sampled = case.sample(answer, tokenizer)
    policy, engine = case.make_policy(tokenizer, inplace=False, **MODES[mode])
    engine.to_sample = [sampled]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(lazy_stack([talks[0].row]))
    before, sent = talks[0].ids, list(engine.requests[0].prompt_ids)
    assert before[-len(sampled) :] == sampled
    assert sent[: len(before)] == before
    assert tokenizer.decode(sent[len(before) :]).lstrip("\n").startswith("<|im_start|>user\n\x07a<|im_end|>")


# --- bad input --------------------------------------------------------------------------------------------------------


@every_case
def test_what_cannot_be_served_is_an_error_of_this_package(case: Case) -> None:
    tokenizer = case.make_tokenizer()

    def claim(drawn: tuple[list[dict[str, Any]], str]) -> None:
        chat, mode = drawn
        generate = mode != "score"
        policy, engine = case.make_policy(tokenizer, generate=generate, **MODES.get(mode, {}))
        engine.to_sample = [[0]]
        try:
            td = ragged(history=[chat], full=not generate)
        except InputError:
            return
        refusal: SGLangHiddenError | None = None
        try:
            policy(td)
        except SGLangHiddenError as error:
            refusal = error
        assert refusal is None or "row 0" in str(refusal)
        assert len(engine.requests) == (refusal is None)

    modes = st.sampled_from(("score", *MODES))
    hold(case, st.tuples(wild_chats(), modes), claim, WILD)


@pytest.mark.parametrize("mode", ["history", "text"])
def test_half_a_surrogate_pair_is_named(mode: str) -> None:
    case = CASES[0]
    policy, engine = case.make_policy(case.make_tokenizer(), input_mode=mode)
    bad: Any = "ok \ud83e" if mode == "text" else [{"role": "user", "content": "ok \ud83e"}]
    good: Any = "ok" if mode == "text" else [{"role": "user", "content": "ok"}]
    with pytest.raises(InputError, match=r"row 1.*'\\ud83e' at character \d+.*surrogate.*remove it"):
        policy(ragged(**{mode: [good, bad]}))
    with pytest.raises(InputError, match=r"candidate 1.*'\\ud83e' at character 3.*remove it"):
        policy.score(ragged(**{mode: [good]}), ["yes", "ok \ud83e"])
    assert not engine.requests
