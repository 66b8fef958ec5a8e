"""Which rows of a prompt and of a response are kept of the logits, however the steps cut them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.logits_cases import V, one_of
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce import token_logits as logits_module
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec

# --- the rows of a prompt ---------------------------------------------------------------------------------------------


def rows_of(first: int, stop: int) -> TokenLogits:
    """Return a row for each token, filled with the token's number."""
    return TokenLogits(torch.arange(first, stop)[:, None].float(), torch.arange(first, stop)[:, None])


def prompt_of(num_prompt: int, start: int = 1, scored: bool = False) -> RequestLogits:
    spec = LogitsSpec(top_k=1, segments=("prompt",))
    return RequestLogits(WantedLogits(spec, prompt_from=start, scored=scored), range(num_prompt))


def bring(one: RequestLogits, first: int, stop: int) -> None:
    one.add_prompt(first, rows_of(first, stop), torch.arange(first, stop).float(), stop - first)


def found_of(one: RequestLogits) -> list[int]:
    found = one.finish()
    if found.prompt is None:
        return []
    assert found.prompt.token_ids_NC is not None
    assert found.prompt.token_ids_NC.flatten().tolist() == found.prompt.values_NC.flatten().tolist()
    assert found.log_probs_N is not None
    assert found.log_probs_N.tolist() == found.prompt.values_NC.flatten().tolist()
    return found.prompt.token_ids_NC.flatten().tolist()


@pytest.mark.parametrize(
    ("start", "chunks", "planned"),
    [
        (1, [(0, 6)], [(1, 6)]),
        (1, [(0, 2), (2, 5), (5, 6)], [(1, 3), (3, 6), None]),
        (1, [(0, 1), (1, 6)], [(1, 2), (2, 6)]),
        (4, [(0, 6)], [(4, 6)]),
        (4, [(0, 3), (3, 6)], [None, (4, 6)]),
        (4, [(0, 4), (4, 6)], [(4, 5), (5, 6)]),
        (4, [(3, 6)], [(4, 6)]),
        (4, [(4, 6)], [None]),  # a hit that went too far
        (1, [(1, 6)], [None]),
        (5, [(0, 6)], [(5, 6)]),
        (6, [(0, 6)], [None]),
        (9, [(0, 6)], [None]),
        (1, [(0, 2), (3, 6)], [(1, 3), None]),  # a gap
        (1, [(0, 3), (2, 6)], [(1, 4), (4, 6)]),  # computed again
        (1, [(0, 6), (0, 6)], [(1, 6), None]),
        (1, [(0, 4), (4, 9)], [(1, 5), (5, 6)]),  # with tokens behind the prompt, after a retraction
    ],
)
def test_which_rows_a_step_brings(start: int, chunks: Any, planned: Any) -> None:
    one = prompt_of(6, start)
    assert [one.plan_prompt(*chunk) for chunk in chunks] == planned
    for step in planned:
        if step is not None:
            bring(one, *step)
    covered = [token for step in planned if step is not None for token in range(*step)]
    assert found_of(one) == covered


def test_nothing_of_the_prompt_is_wanted() -> None:
    one = RequestLogits(WantedLogits(LogitsSpec(full=True)), range(6))
    assert (one.plan_prompt(0, 6), one.first_needed) == (None, None)
    assert one.finish().prompt is None


@pytest.mark.parametrize(("num_prompt", "start"), [(1, 1), (6, 6), (6, 7)])
def test_a_prompt_without_a_row(num_prompt: int, start: int) -> None:
    one = prompt_of(num_prompt, start)
    assert (one.first_needed, one.plan_prompt(0, num_prompt)) == (None, None)


def test_what_must_be_computed() -> None:
    one = prompt_of(6, 3)
    assert one.first_needed == 2, "the row of token 3 is at the position of token 2"
    one.plan_prompt(0, 4)
    assert one.first_needed == 2, "planned is not arrived"
    bring(one, 3, 5)
    assert one.first_needed == 4
    bring(one, 5, 6)
    assert one.first_needed is None


def test_what_was_planned_and_never_ran_is_planned_again() -> None:
    one = prompt_of(6)
    assert one.plan_prompt(0, 3) == (1, 4)
    bring(one, 1, 4)
    assert one.plan_prompt(3, 6) == (4, 6)
    one.restart()
    assert one.plan_prompt(0, 3) is None, "it is there"
    assert one.plan_prompt(3, 6) == (4, 6)
    bring(one, 4, 6)
    assert found_of(one) == [1, 2, 3, 4, 5]


def test_rows_that_come_twice_or_too_early_are_left_out() -> None:
    one = prompt_of(6)
    bring(one, 1, 3)
    bring(one, 1, 3)
    bring(one, 4, 6)
    assert found_of(one) == [1, 2]
    bring(one, 3, 6)
    assert found_of(one) == [1, 2, 3, 4, 5]


@settings(max_examples=60)
@given(data=st.data())
def test_any_chunks_bring_every_row_once(data: st.DataObject) -> None:
    """With prefix hits as far as they are allowed, and with retractions after which a part is computed again."""
    num_prompt = data.draw(st.integers(1, 12))
    start = data.draw(st.integers(1, num_prompt))
    one, position = prompt_of(num_prompt, start), 0
    for _ in range(50):
        if position == num_prompt:
            break
        if data.draw(st.integers(0, 3)) == 0:
            one.restart()
            most = num_prompt - 1 if one.first_needed is None else one.first_needed
            position = data.draw(st.integers(0, most))
        stop = data.draw(st.integers(position + 1, num_prompt))
        step = one.plan_prompt(position, stop)
        if step is not None and data.draw(st.integers(0, 4)) == 0:
            one.restart()  # it never ran
            position = 0
            continue
        if step is not None:
            bring(one, *step)
        position = stop
    else:
        return
    assert found_of(one) == list(range(start, num_prompt))
    assert one.first_needed is None


# --- the rows of a response -------------------------------------------------------------------------------------------


def test_rows_of_the_response_in_order() -> None:
    one = RequestLogits(WantedLogits(LogitsSpec(top_k=1)), (1,))
    for index in (0, 2, 1, 1, 3, 2, 3):
        one.add_response(index, rows_of(index, index + 1))
    found = one.finish()
    assert (found.constrained, found.response.token_ids_NC.flatten().tolist()) == (4, [0, 1, 2, 3])
    assert (found.prompt, found.log_probs_N, found.fault) == (None, None, "")


def test_a_gap_leaves_the_count_short() -> None:
    one = RequestLogits(WantedLogits(LogitsSpec(full=True)), (1,))
    for index in (0, 2, 3):
        one.add_response(index, TokenLogits(torch.zeros(1, V), None))
    found = one.finish()
    assert (found.constrained, found.response.values_NC.shape, found.response.token_ids_NC) == (1, (1, V), None)


def test_tokens_are_counted_without_rows() -> None:
    one = one_of(ActionMask((1,)))
    for index in range(3):
        one.add_response(index, None)
    assert (one.finish().constrained, one.finish().response) == (3, None)


@pytest.mark.parametrize("ids", [False, True])
def test_more_bytes_than_there_may_be_are_refused(monkeypatch: pytest.MonkeyPatch, ids: bool) -> None:
    """The limit counts prompt and response together. Kept rows are dropped, later ones too; tokens still count."""
    monkeypatch.setattr(logits_module, "MAX_ANSWER_BYTES", 5 * 2 * (4 + 8 * ids))
    one = RequestLogits(WantedLogits(LogitsSpec(top_k=2, segments=("full",)), prompt_from=1), range(4))

    def rows(count: int) -> TokenLogits:
        return TokenLogits(torch.zeros(count, 2), torch.zeros(count, 2, dtype=torch.int64) if ids else None)

    one.add_prompt(1, rows(3), None, 3)
    one.add_response(0, rows(1))
    one.add_response(1, rows(1))
    found = one.finish()
    assert (found.refused, len(found.prompt.values_NC), len(found.response.values_NC)) == ("", 3, 2)
    one.add_response(2, rows(1))
    one.add_response(3, rows(1))
    found = one.finish()
    assert (found.prompt, found.response, found.constrained, found.fault) == (None, None, 4, "")
    assert found.refused == "the logits are over 0 MiB for one request; ask for fewer tokens or columns"


def test_nothing_is_kept_of_logits_that_were_refused() -> None:
    """For example when a head with adapters gives no logits of a prompt."""
    one = RequestLogits(WantedLogits(LogitsSpec(top_k=1)), (1,))
    one.refused = "the server's LoRA adapters act on the head"
    one.add_response(0, rows_of(0, 1))
    found = one.finish()
    assert (found.constrained, found.response, found.refused) == (1, None, one.refused)


def test_a_prompt_of_more_bytes_than_there_may_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still computed only once: nobody waits for rows that are not kept."""
    monkeypatch.setattr(logits_module, "MAX_ANSWER_BYTES", 40)
    one = prompt_of(6)
    bring(one, 1, 5)
    found = one.finish()
    assert (found.prompt, found.log_probs_N.tolist()) == (None, [1, 2, 3, 4])
    assert found.refused != ""
    assert one.first_needed == 4


@pytest.mark.parametrize(
    ("wanted", "wants_sampled"),
    [
        (WantedLogits(), False),
        (WantedLogits(LogitsSpec(full=True)), True),
        (WantedLogits(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1), False),
        (WantedLogits(LogitsSpec(full=True, segments=("full",)), prompt_from=1), True),
        (WantedLogits(constraints=(ActionMask((1,)),)), True),
        # The one token that SGLang draws behind a sequence that is scored is nobody's.
        (WantedLogits(constraints=(ActionMask((1,)),), prompt_from=1, scored=True, response_ranges=((1, 2),)), False),
    ],
)
def test_what_wants_the_sampled_tokens(wanted: WantedLogits, wants_sampled: bool) -> None:
    assert wanted.wants_sampled is wants_sampled
