"""States at a text, at each of several, and in windows, through the policy over the fake engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, states_ND
from helpers.policy_batches import TOKENIZER, flat, make, tokens_batch

from torchrl_sglang_hidden import At, Each, Every, HiddenSpec, LastTokens, SGLangHiddenWrapper, Window
from torchrl_sglang_hidden.errors import AlignmentError, InputError, SpanError
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.span_base import MAX_SPAN_ROWS

ANSWERS = ["w1 w2 w3 w2", "w3 w4"]
SPANS: dict[str, Any] = {
    "each": Each("w2"),
    "mean": Each("w2", "before", pooling="mean"),
    "at": At("w2"),
    "window": Window(1, 3, pooling="max"),
    "past": Window(9, 10),
    "every": Every(2),
    "tail": LastTokens(1, pooling=None),
    "prompt": At("w1", segment="prompt"),
}
# w2 is the last token of the first answer: no state has read it.
ROWS: dict[str, list[list[int]]] = {
    "each": [[2], []],
    "mean": [[1, 3], []],
    "at": [[2], []],
    "window": [[1, 2], [1]],
    "past": [[], []],
    "every": [[0, 2], [0]],
    "tail": [[3], [1]],
    "prompt": [[], [0]],
}


def answering(*answers: str, spans: Any, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    """Return a policy that answers its n-th prompt, of one token, with the n-th text."""
    texts = {6 + index: TOKENIZER(text)["input_ids"] for index, text in enumerate(answers)}
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=lambda prompt_ids: texts[prompt_ids[0]])
    return make("tokens", engine=engine, hidden=HiddenSpec(("response",), "last", spans=spans), **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_rows_are_those_of_the_markers(num_samples: int | None, padded: bool) -> None:
    policy, _ = answering(*ANSWERS, spans=SPANS, num_samples=num_samples, pad_output=padded)
    out = policy(tokens_batch([6], [7]))
    assert all(key in out for key in policy.out_keys)
    for index, row in enumerate(flat(out)):
        number = index // (num_samples or 1)
        states, hidden = states_ND([6 + number], TOKENIZER(ANSWERS[number])["input_ids"]), row["hidden_states"]
        for name, rows in ROWS.items():
            found, rows_SD = hidden.spans[name], states[rows[number]]
            assert int(hidden.span_counts[name]) == len(rows[number]), name
            if name in policy.config.hidden.unpooled:  # type: ignore[union-attr]
                size = max(map(len, rows)) if padded else len(rows[number])
                assert hidden.span_places[name].tolist() == [*rows[number], *[-1] * (size - len(rows[number]))], name
                assert len(found) == size
                torch.testing.assert_close(found[: len(rows_SD)], rows_SD, rtol=1e-5, atol=1e-6)
                assert not found[len(rows_SD) :].any()
            elif not rows[number]:
                assert found.isnan().all(), name
            else:
                expected = {"mean": rows_SD.mean(0), "window": rows_SD.amax(0)}.get(name, rows_SD[-1])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("span", [Each("w2"), At("w2"), Each("w2", pooling="mean")])
def test_rows_that_another_tokenizer_found_are_an_error(span: Any) -> None:
    policy, engine = answering(*ANSWERS, spans={"why": span})
    generate = engine.generate

    def elsewhere(requests: Sequence[Request]) -> list[Completion]:
        first, *more = generate(requests)
        spans = {"why": dataclasses.replace(first.spans["why"], places=(1,))}
        return [dataclasses.replace(first, spans=spans), *more]

    engine.generate = elsewhere  # type: ignore[method-assign]
    with pytest.raises(AlignmentError, match=r"row 0, sample 0, span 'why': 1 rows .*, \(1,\) there and \(2,\) here;"):
        policy(tokens_batch([6], [7]))


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (At("w9", missing="error"), r"row 0.*span 'why'.*the marker is not in the response"),
        (Each("w9", segment="prompt", missing="error"), r"row 0.*span 'why'.*the marker is not in the prompt"),
        (At("w", "before", "prompt", "error"), r"row 0.*span 'why'.*the marker begins the prompt"),
    ],
)
def test_a_marker_that_must_be_there(span: Any, words: str) -> None:
    policy, _ = answering(*ANSWERS, spans={"why": span})
    with pytest.raises(SpanError, match=words):
        policy(tokens_batch([6], [7]))


def test_a_row_without_its_marker_has_nan_and_an_error() -> None:
    policy, _ = answering(*ANSWERS, spans={"why": Each("w2", missing="error")}, on_error="nan", pad_output=True)
    rows = flat(policy(tokens_batch([6], [7])))
    assert [row["error"][:9] for row in rows] == ["", "SpanError"]
    assert [int(row["hidden_states"].span_counts["why"]) for row in rows] == [1, 0]
    assert rows[1]["hidden_states"].spans["why"].isnan().all()
    assert rows[1]["hidden_states"].span_places["why"].tolist() == [-1]


def test_more_rows_than_a_span_may_have_are_refused() -> None:
    engine = RecordingEngine(context_length=9000, max_prompt_tokens=8000)
    policy, _ = make("tokens", engine=engine, hidden=HiddenSpec((), spans={"all": Every(1, "prompt")}))
    with pytest.raises(InputError, match=rf"row 0, span 'all': {MAX_SPAN_ROWS + 1} rows, over the limit of"):
        policy(tokens_batch([6] * (MAX_SPAN_ROWS + 1)))
    assert not engine.payloads


def test_more_rows_of_a_response_than_a_span_may_have_are_a_fault() -> None:
    many = MAX_SPAN_ROWS + 1
    engine = RecordingEngine(context_length=9000, max_prompt_tokens=8000, respond=lambda _: [7] * many)
    options: dict[str, Any] = {"engine": engine, "generate_kwargs": {"max_new_tokens": many}}
    with pytest.raises(SpanError, match=rf"row 0.*span 'all'.*Every\(n=1.*{many} rows, over the limit"):
        make("tokens", hidden=HiddenSpec((), spans={"all": Every(1)}), **options)[0](tokens_batch([6]))
