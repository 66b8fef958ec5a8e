"""Log-probs as SGLang writes them: numbers, -inf by name, and an error where there is no number."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fake_engine import make_info
from helpers.sample_requests import request

from torchrl_sglang_hidden import CapabilityError
from torchrl_sglang_hidden.errors import AlignmentError, EngineError, ProtocolError
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.log_probs import read_log_probs

IDS = (7, 8, 9)


def entries(*values: Any) -> list[Any]:
    return [[value, token_id, None] for value, token_id in zip(values, IDS, strict=True)]


def test_the_first_of_the_input_has_none() -> None:
    found = read_log_probs("row 0", "input", entries(None, -1.5, -0.25), IDS)
    assert math.isnan(found[0])
    assert found[1:].tolist() == [-1.5, -0.25]
    assert read_log_probs("row 0", "input", entries(None, -1.5, -0.25), IDS, start=1).tolist() == [-1.5, -0.25]


@pytest.mark.parametrize("smallest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -math.inf])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_token_of_probability_0_has_minus_infinity(side: Any, smallest: float) -> None:
    """SGLang clamps -inf to the smallest number that its log-probs' dtype has."""
    assert read_log_probs("row 0", side, entries(-1.0, smallest, -65504.0), IDS).tolist() == [-1.0, -math.inf, -65504.0]


@pytest.mark.parametrize(
    ("value", "words"), [(None, "null, which is how JSON has NaN and -inf"), (math.nan, "nan"), (math.inf, "inf")]
)
@pytest.mark.parametrize(("side", "segment"), [("input", "prompt"), ("output", "response")])
@pytest.mark.parametrize("place", [1, 2])
def test_what_is_no_number_is_named_by_row_and_token(
    side: Any, segment: str, place: int, value: float | None, words: str
) -> None:
    values: list[Any] = [-1.0, -2.0, -3.0]
    values[place] = value
    expected = (
        rf"row 4: the log-prob of {segment} token {10 + place} \(id {IDS[place]}\) is {words}; .*dtype='bfloat16'"
    )
    for start in range(place + 1):
        with pytest.raises(EngineError, match=expected):
            read_log_probs("row 4", side, entries(*values), IDS, start=start, first=10)


def test_the_first_of_several_is_named() -> None:
    with pytest.raises(EngineError, match=r"token 1 \(id 8\) is nan"):
        read_log_probs("row 0", "output", entries(-1.0, math.nan, None), IDS)
    with pytest.raises(EngineError, match=r"token 0 \(id 7\) is null"):
        read_log_probs("row 0", "output", entries(None, math.nan, None), IDS)


def test_what_cannot_be_read() -> None:
    for wrong in (entries("a", -1.0, -1.0), [[-1.0]] * 3, 7, [None] * 3):
        with pytest.raises(ProtocolError, match="row 0: the output log-probs cannot be read"):
            read_log_probs("row 0", "output", wrong, IDS)
    with pytest.raises(AlignmentError, match="row 0: 3 log-probs for 2 output tokens"):
        read_log_probs("row 0", "output", entries(-1.0, -1.0, -1.0), IDS[:2])


@pytest.mark.parametrize("temperature", [0.5, 1.5, 1e-5])
def test_log_probs_without_the_temperature_are_refused(temperature: float) -> None:
    """SGLang's are of temperature 1 under SGLANG_RETURN_ORIGINAL_LOGPROB=1, and the tokens are not."""
    raw = make_info(raw_log_probs=True)
    one = request(temperature=temperature)
    check_requests([one], make_info())
    with pytest.raises(CapabilityError, match=r"row 1: .*SGLANG_RETURN_ORIGINAL_LOGPROB=1, .*TemperatureScale\("):
        check_requests([request(), one], raw)


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 1}, {}])
def test_log_probs_that_the_temperature_leaves_alone_are_not(changes: dict[str, Any]) -> None:
    check_requests([request(**changes)], make_info(raw_log_probs=True))


def test_who_asks_for_no_log_probs_may_have_any_temperature() -> None:
    raw = make_info(raw_log_probs=True)
    check_requests([replace(request(temperature=0.5), return_log_probs=False)], raw)
    check_requests([request(None, temperature=0.5, max_new_tokens=0)], raw)


def test_rows_of_images_have_no_log_prob_and_other_ids_none_elsewhere() -> None:
    """SGLang gives id 0 at rows of images, and for the last id of the vocabulary, whose log-prob is its own."""
    ids = (5, 95, 95, 94, 95, 93, 7)
    entries = [[-0.5, token_id, None] for token_id in (5, 0, 0, 94, 0, 93, 7)]
    entries[0][0] = None
    places = {"images": (1, 2, 4), "vocab_size": 97}
    found = read_log_probs("row 0", "input", entries, ids, **places)
    assert found.isnan().tolist() == [True, True, True, False, True, False, False]
    for place, wrong in ((1, 95), (3, 9), (6, 0), (0, 0)):
        other = [list(entry) for entry in entries]
        other[place][1] = wrong
        with pytest.raises(AlignmentError, match="or of other ids"):
            read_log_probs("row 0", "input", other, ids, **places)
    last = read_log_probs("row 0", "input", [[None, 5, None], [-0.25, 0, None]], (5, 96), vocab_size=97)
    assert last.tolist()[1] == -0.25
