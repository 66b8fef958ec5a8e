"""Spans whose rows the server half lists: held against the tokens, however an answer is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_engine import make_info, states_ND
from helpers.sample_requests import PROMPT, RESPONSE, STOCK, read, request, rows_for, spoiled

from torchrl_sglang_hidden import At, Each, Every, HiddenSpec, LastTokens, Request, TokenMask, Window
from torchrl_sglang_hidden.errors import AlignmentError, InputError, ProtocolError, SpanError
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.spec.spans import PromptSpan

# The fake engine without a tokenizer writes the ids with a blank between them.
SPANS: dict[str, Any] = {
    "each": Each(" "),
    "at": At(" "),
    "tail": LastTokens(2, pooling=None),
    "every": Every(2),
    "mean": Each(" ", "before", pooling="mean"),
    "past": Window(90, 91),
    "none": At("x"),
    "prompt": PromptSpan(((0, 1), (2, 3)), pooling=None),
    "no prompt": PromptSpan(()),
}
ASKED = {**SPANS, "prompt": TokenMask("m", pooling=None), "no prompt": At("x", segment="prompt")}


def asking(**more: Any) -> Request:
    return request(HiddenSpec(("response",), "last", spans=ASKED, **more), spans=SPANS)


@pytest.mark.parametrize("layers", [-1, (0, -1)])
def test_rows_stand_where_they_were_found(layers: Any) -> None:
    one = asking(layers=layers)
    (found,) = read(rows_for([one]), [one])
    depth = () if layers == -1 else (2,)
    assert found.spans["tail"].places == (len(RESPONSE) - 2, len(RESPONSE) - 1)
    assert found.spans["every"].places == tuple(range(0, len(RESPONSE), 2))
    assert found.spans["prompt"].places == (0, 2)
    assert found.spans["prompt"].vector.shape == (2, *depth, 8)
    states = states_ND(PROMPT, RESPONSE)
    last = found.spans["tail"].vector if layers == -1 else found.spans["tail"].vector[:, 1]
    torch.testing.assert_close(last, states[-2:], rtol=1e-5, atol=1e-6)
    for name in ("past", "none", "no prompt"):
        assert (found.spans[name].count, found.spans[name].vector.shape) == (0, (*depth, 8)), name
        assert found.spans[name].vector.isnan().all(), name
    assert found.error is None


Spoil = Callable[[dict[str, Any]], Any]
NAMES = ["response", *(name for name in SPANS if name != "no prompt")]


def place_of(answer: dict[str, Any], name: str) -> list[Any]:
    return next(place for place in answer["places"] if place[1] == name)


BAD: dict[str, tuple[Spoil, type[Exception], str]] = {
    "no rows": (lambda a: a["rows_of_spans"].pop("each"), AlignmentError, r"the rows of Each\(.* are None"),
    "a row that is not there": (
        lambda a: a["rows_of_spans"].update(at=[len(RESPONSE)]), AlignmentError, r"the rows of At\(.*expected up to 1"
    ),
    "two rows of one": (lambda a: a["rows_of_spans"].update(at=[0, 1]), AlignmentError, r"the rows of At\(.*up to 1"),
    "fewer rows": (lambda a: a["rows_of_spans"]["each"].pop(), AlignmentError, r"rows of states for the span 'each'"),
    "other rows": (lambda a: a["rows_of_spans"].update(tail=[0, 1]), AlignmentError, r"LastTokens\(.*at rows \[0, 1\]"),
    "no rows of an interval": (lambda a: a["rows_of_spans"].update(every=[]), AlignmentError, r"Every\(.*at rows \[\]"),
    "a number of rows": (
        lambda a: place_of(a, "mean").__setitem__(2, 9), AlignmentError, r"9 rows of states for the span 'mean'"
    ),
    "rows of what is pooled": (
        lambda a: place_of(a, "at").__setitem__(3, 1), AlignmentError, r"states of shape \(1, 1, 8\).*span 'at'"
    ),
    "rows of what is empty": (
        lambda a: place_of(a, "none").__setitem__(2, 1), AlignmentError, r"1 rows of states for the span 'none'"
    ),
    "rows in disorder": (lambda a: a["rows_of_spans"].update(each=[2, 1]), ProtocolError, r"not in order"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_add_up(case: str) -> None:
    spoil, error, words = BAD[case]
    one = asking()
    rows = rows_for([one])
    read(rows, [one])
    with pytest.raises(error, match=words):
        read(spoiled(rows, lambda row: spoil(row["meta_info"][CHANNEL][0])), [one])


def test_stock_states_have_rows_and_windows() -> None:
    spans = {name: SPANS[name] for name in ("tail", "every", "past", "prompt", "no prompt")}
    one = request(HiddenSpec(("response",), "last", spans={name: ASKED[name] for name in spans}), spans=spans)
    (found,) = read(rows_for([one], **STOCK), [one], **STOCK)
    states = states_ND(PROMPT, RESPONSE)
    torch.testing.assert_close(found.spans["every"].vector, states[len(PROMPT) - 1 :][::2], rtol=1e-5, atol=1e-6)
    assert (found.spans["past"].count, found.spans["no prompt"].count) == (0, 0)
    assert found.spans["prompt"].places == (0, 2)


@pytest.mark.parametrize(
    ("asked", "resolved", "error", "words"),
    [
        (TokenMask("m"), PromptSpan(()), SpanError, r"TokenMask\(key='m'\) has 0 positions"),
        (At("x", segment="prompt", missing="error"), PromptSpan(()), SpanError, r"has 0 positions"),
        (Window(0, 1, "prompt"), Window(0, 1, "prompt"), TypeError, r"is not resolved"),
    ],
)
def test_spans_that_are_not_sent(asked: Any, resolved: Any, error: type[Exception], words: str) -> None:
    one = request(HiddenSpec(("response",), spans={"s": asked}), spans={"s": resolved})
    with pytest.raises(error, match=words):
        check_requests([one], make_info())


def test_too_many_rows_of_a_span() -> None:
    ids = tuple([7] * 5000)
    hidden = HiddenSpec((), spans={"s": TokenMask("m", pooling=None)})
    one = Request(ids, hidden=hidden, spans={"s": PromptSpan(((0, 4097),), pooling=None)})
    with pytest.raises(InputError, match=r"row 0, span 's': 4097 rows, over the limit of 4096"):
        check_requests([one], make_info(context_length=9000, max_prompt_tokens=8000))
