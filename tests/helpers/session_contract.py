"""What holds for the sessions of every engine: `SessionContract`, which the tests of each engine inherit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engine_contract import assert_same, prompt_of, request
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.errors import (
    EngineError,
    InputError,
    InputTypeError,
    PromptLengthError,
    TokenIdError,
)
from torchrl_sglang_hidden.records import Completion, Request

# What must not be a turn: how to make it, and the error and the words that it raises.
BAD_TURNS: dict[str, tuple[Any, type[InputError], str]] = {
    "empty": (lambda engine: [], PromptLengthError, r"the turn has 0 tokens behind a context of \d+; pass at least 1"),
    "empty request": (lambda engine: request(()), PromptLengthError, r"the turn has 0 tokens"),
    "foreign": (lambda engine: [5, engine.info.vocab_size], TokenIdError, r"outside the vocabulary"),
    "negative": (lambda engine: [-1], TokenIdError, r"token id -1 "),
    "float": (lambda engine: [5.0], InputTypeError, r"5\.0 is a float"),
    "text": (lambda engine: "5", InputTypeError, r"a turn is '5'; expected a Request, or a list of token ids"),
    "number": (lambda engine: 5, InputTypeError, r"a turn is 5"),
    "tensor": (lambda engine: torch.tensor([5]), InputTypeError, r"a turn is tensor"),
    # Alone it would fit.
    "long": (
        lambda engine: request([5] * (engine.info.max_prompt_tokens - 1), max_new_tokens=1),
        PromptLengthError,
        r"over the engine's limit of \d+.* shorten it",
    ),
    "too much": (
        lambda engine: request([5, 6], max_new_tokens=engine.info.context_length - 3),
        PromptLengthError,
        r"over the context length of \d+; lower max_new_tokens",
    ),
}


def scored(prompt_ids: Any, **sampling: Any) -> Request:
    """Return a greedy request for everything. The prompt's log-probs tell which ids the engine really had."""
    return replace(request(prompt_ids, **sampling), score_prompt=True)


def assert_turn(engine: Engine, found: Completion, context: tuple[int, ...], new_ids: tuple[int, ...]) -> None:
    """Check that a turn equals a request with the whole context as its prompt."""
    assert found.prompt_ids == (*context, *new_ids)
    expected = engine.generate([scored(found.prompt_ids)])[0]
    assert_same(found, expected)
    torch.testing.assert_close(found.prompt_log_probs_P, expected.prompt_log_probs_P, atol=1e-3, rtol=0, equal_nan=True)


class SessionContract:
    """What holds for the sessions of every engine. A subclass gives the fixture `engine`."""

    def test_every_turn_goes_on_behind_all_before_it(self, engine: Engine) -> None:
        with engine.session() as session:
            assert session.ids == ()
            for turn in range(3):
                context, new_ids = session.ids, prompt_of(engine, 4 + turn, seed=20 + turn)
                found = session.generate(scored(new_ids))
                assert_turn(engine, found, context, new_ids)
                assert session.ids == (*context, *new_ids, *found.response_ids)

    def test_a_turn_may_be_ids_alone(self, engine: Engine) -> None:
        with engine.session() as session:
            first = session.generate(request(prompt_of(engine, 4, seed=30)))
            found = session.generate([7, 8])
            assert found.prompt_ids == (*first.prompt_ids, *first.response_ids, 7, 8)
            assert found.log_probs_T is not None
            assert len(found.log_probs_T) == len(found.response_ids)
            assert found.hidden == {}

    def test_turns_of_several_sessions_do_not_mix(self, engine: Engine) -> None:
        sessions = [engine.session() for _ in range(3)]
        for turn in range(2):
            for row, session in enumerate(sessions):
                context, new_ids = session.ids, prompt_of(engine, 3 + row, seed=40 + 10 * turn + row)
                assert_turn(engine, session.generate(scored(new_ids)), context, new_ids)
        for session in sessions:
            session.close()

    def test_turns_of_several_threads_go_one_after_the_other(self, engine: Engine) -> None:
        turns = [prompt_of(engine, 3, seed=60 + row) for row in range(3)]
        with engine.session() as session, ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda ids: session.generate(request(ids, max_new_tokens=2)), turns))
            found.sort(key=lambda one: len(one.prompt_ids))
            context: tuple[int, ...] = ()
            for one in found:
                assert one.prompt_ids[: len(context)] == context
                assert one.prompt_ids[len(context) :] in turns
                context = (*one.prompt_ids, *one.response_ids)
            assert session.ids == context

    @pytest.mark.parametrize("bad", BAD_TURNS)
    def test_a_bad_turn_is_refused_and_leaves_the_session_as_it_was(self, engine: Engine, bad: str) -> None:
        make, kind, message = BAD_TURNS[bad]
        with engine.session() as session:
            session.generate(request(prompt_of(engine, 4, seed=70)))
            context, new_ids = session.ids, prompt_of(engine, 3, seed=71)
            with pytest.raises(kind, match=message):
                session.generate(make(engine))
            assert session.ids == context
            assert_turn(engine, session.generate(scored(new_ids)), context, new_ids)

    def test_the_first_turn_may_fail(self, engine: Engine) -> None:
        with engine.session() as session:
            with pytest.raises(PromptLengthError, match="behind a context of 0"):
                session.generate([])
            assert session.generate(request([5, 6])).prompt_ids == (5, 6)

    def test_a_closed_one_says_so(self, engine: Engine) -> None:
        with engine.session() as session:
            found = session.generate(request([5, 6]))
        session.close()
        with pytest.raises(EngineError, match=r"the session was closed by close\(\); open a new one"):
            session.generate([5])
        assert session.ids == (5, 6, *found.response_ids)
