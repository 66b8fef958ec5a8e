"""What goes wrong with one row of a batch: the others keep theirs, and the error says which row it was."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.engine_contract import assert_all_same, assert_same
from helpers.fake_engine import Answer, RecordingEngine, response_of

from torchrl_sglang_hidden import (
    ActionMask,
    AlignmentError,
    Between,
    ConstraintError,
    HiddenSpec,
    RequestAbortedError,
    SpanError,
)
from torchrl_sglang_hidden.engines import generate_samples
from torchrl_sglang_hidden.engines.row_errors import generate_rows, refused_rows
from torchrl_sglang_hidden.errors import PromptLengthError, TokenIdError
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

ALL = HiddenSpec(SEGMENTS)
ROWS = [Request((6 + row, 7), hidden=ALL) for row in range(4)]


def abort(*rows: int, queued: bool = False) -> RecordingEngine:
    """Return an engine that aborts some rows of each batch, with what they have; or in its queue, with nothing."""

    def spoil(answers: Answer) -> None:
        for row in rows:
            meta = answers[row]["meta_info"]
            meta["finish_reason"] = {"type": "abort", "message": "out of memory"}
            if queued:
                answers[row].update(output_ids=[], text="")
                for field in meta.keys() - {"id", "finish_reason", "weight_version"}:
                    del meta[field]

    return RecordingEngine(fault=spoil)


def test_an_abort_carries_what_finished() -> None:
    with pytest.raises(RequestAbortedError, match=r"row 1 .*out of memory") as caught:
        abort(1, 2).generate(ROWS)
    found = caught.value.completions
    assert [one.finish_reason == "abort" for one in found] == [False, True, True, False]
    expected = RecordingEngine().generate(ROWS)
    assert_all_same([found[0], found[3]], [expected[0], expected[3]])
    # An aborted row has its tokens, log-probs and states so far.
    assert_same(replace(found[1], finish_reason=expected[1].finish_reason), expected[1])
    assert found[1].error is caught.value
    assert "row 2 " in str(found[2].error)


@pytest.mark.parametrize("way", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_a_copy_of_the_error_carries_it_too(way: object) -> None:
    with pytest.raises(RequestAbortedError) as caught:
        abort(1).generate(ROWS[:2])
    again = way(caught.value)  # type: ignore[operator]
    assert (str(again), len(again.completions)) == (str(caught.value), 2)


@pytest.mark.parametrize("queued", [False, True])
def test_an_abort_comes_back_where_it_is_wanted(queued: bool) -> None:
    requests = [replace(one, return_errors=True) for one in ROWS]
    found = abort(1, queued=queued).generate(requests)
    assert [one.error is None for one in found] == [True, False, True, True]
    assert found[1].finish_reason == "abort"
    assert found[1].response_ids == (() if queued else tuple(response_of(ROWS[1].prompt_ids)))
    assert found[1].log_probs_T is not None
    assert len(found[1].log_probs_T) == len(found[1].response_ids)
    assert len(found[1].hidden) == (0 if queued else 3)


def test_a_row_that_wants_its_error_does_not_hide_anothers() -> None:
    requests = [replace(one, return_errors=row == 1) for row, one in enumerate(ROWS)]
    with pytest.raises(RequestAbortedError, match="row 2 "):
        abort(1, 2).generate(requests)


def test_one_response_without_a_marker_keeps_the_others() -> None:
    """Only the span is missing of that row: its tokens and other states are there."""
    span = Between(" ", None)
    spec = HiddenSpec(SEGMENTS, spans={"b": span})
    requests = [replace(one, hidden=spec, spans={"b": span}) for one in ROWS]
    engine = RecordingEngine(respond=lambda ids: [33] if ids[0] == 7 else [20, 21, 22])
    with pytest.raises(SpanError, match=r"row 1 .*span 'b': the marker ' ' is not in the response") as caught:
        engine.generate(requests)
    found = engine.generate([replace(one, return_errors=True) for one in requests])
    assert [str(one.error) for one in found if one.error] == [str(caught.value)]
    assert [list(one.spans) for one in found] == [["b"], [], ["b"], ["b"]]
    assert (found[1].response_ids, found[1].finish_reason, list(found[1].hidden)) == ((33,), "length", list(SEGMENTS))
    assert_all_same(found, caught.value.completions)


def test_constraints_that_left_nothing_leave_no_response() -> None:
    nothing = Request((7, 7), hidden=ALL, constraints=(ActionMask((6,)),), sampling={"max_new_tokens": 2})

    def fail(answers: Answer) -> None:
        for row in answers[1:2]:
            for answer in row["meta_info"].values():
                if isinstance(answer, list) and answer and isinstance(answer[0], dict) and "fault" in answer[0]:
                    answer[0]["fault"] = "token 1 of the response: 0 tokens are left"

    engine = RecordingEngine(fault=fail)
    with pytest.raises(ConstraintError, match=r"row 1 .*: token 1 of the response: 0 tokens are left"):
        engine.generate([nothing] * 3)
    found = engine.generate([replace(nothing, return_errors=True)] * 3)
    assert [one.response_ids for one in found] == [(6, 6), (), (6, 6)]
    assert (found[1].finish_reason, dict(found[1].hidden)) == ("error", {})


# --- before anything is sent ------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_sent() -> None:
    engine = RecordingEngine()
    long = Request((6,) * engine.info.context_length)
    no_room = Request((6,) * 40, sampling={"max_new_tokens": 40})
    errors = refused_rows([ROWS[0], long, no_room, Request(())], engine.info)
    assert [type(error) for error in errors] == [type(None)] + [PromptLengthError] * 3
    assert [str(error)[:6] for error in errors[1:]] == ["row 1:", "row 2:", "row 3:"]


@pytest.mark.parametrize(
    ("bad", "error"),
    [(Request((6, 96)), TokenIdError), (Request((6,), sampling={"max_new_tokens": 64}), PromptLengthError)],
    ids=["an id that is not there", "no prompt leaves room"],
)
def test_what_concerns_the_call_is_raised(bad: Request, error: type[Exception]) -> None:
    with pytest.raises(error, match="row 1: "):
        refused_rows([ROWS[0], bad], RecordingEngine().info)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_other_rows_are_sent_and_counted_as_in_the_whole_batch(num_samples: int) -> None:
    refused = [PromptLengthError("row 0: too long"), None, PromptLengthError("row 2: too long"), None]
    engine = abort(1)

    def generate(requests: list[Request]) -> list[Completion]:
        return engine.generate([replace(one, return_errors=True) for one in requests for _ in range(num_samples)])

    found = generate_rows(ROWS, refused, "v7", generate, num_samples=num_samples)
    assert [one.prompt_ids for one in found] == [one.prompt_ids for one in ROWS for _ in range(num_samples)]
    assert [one.finish_reason == "error" for one in found] == [bad for bad in (1, 0, 1, 0) for _ in range(num_samples)]
    (aborted,) = (index for index, one in enumerate(found) if one.finish_reason == "abort")
    assert str(found[aborted].error).startswith(f"row {aborted} ")
    assert aborted == 3


def test_an_error_of_the_whole_call_names_its_row_in_the_whole_batch() -> None:
    def spoil(answers: Answer) -> None:
        answers[1]["meta_info"]["prompt_tokens"] = 99

    refused = [PromptLengthError("row 0: too long"), None, PromptLengthError("row 2: too long"), None]
    with pytest.raises(AlignmentError, match=r"^row 3 \(request recorded-1\): sent a prompt of 2 .* took 99"):
        generate_rows(ROWS, refused, "v7", RecordingEngine(fault=spoil).generate)


def test_nothing_is_sent_where_no_row_can_be() -> None:
    found = generate_rows(ROWS[:1], [SpanError("row 0: no")], "v7", lambda requests: pytest.fail("sent"))
    assert (found[0].response_ids, found[0].weight_version) == ((), "v7")
    assert found[0].log_probs_T is not None
    assert found[0].log_probs_T.equal(torch.empty(0))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_that_was_aborted_has_its_prompts_part() -> None:
    engine, calls = RecordingEngine(), []

    def spoil(answers: Answer) -> None:
        calls.append(len(answers))
        if len(calls) % 2 == 0:
            answers[2]["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}

    engine.fault = spoil
    with pytest.raises(RequestAbortedError, match="row 2 ") as caught:
        generate_samples(engine, ROWS[:2], 2)
    found = caught.value.completions
    assert [list(one.hidden) for one in found] == [list(SEGMENTS)] * 4
    again = generate_samples(engine, [replace(one, return_errors=True) for one in ROWS[:2]], 2)
    assert [one.finish_reason == "abort" for one in again] == [False, False, True, False]


def test_a_prompt_that_was_aborted_on_its_way_ahead() -> None:
    engine, calls = RecordingEngine(), []

    def spoil(answers: Answer) -> None:
        calls.append(len(answers))
        if len(calls) == 1:
            answers[1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}

    engine.fault = spoil
    found = generate_samples(engine, [replace(one, return_errors=True) for one in ROWS[:2]], 2)
    assert [one.error is None for one in found] == [True, True, False, False]
    assert all(one.response_ids for one in found)
    assert "prompt" not in found[2].hidden
    assert [str(one.error)[:6] for one in found[2:]] == ["row 2 ", "row 3 "]
