"""States at a text, at each of several, and in windows, on the demo model against Hugging Face.

Where a marker stands is counted in the bytes of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.completion_checks import assert_completion, read_by_pieces, rows_by_pieces
from helpers.policy_checks import STATE_RTOL, history_input, prompt_of, relative_error, tokens_input
from helpers.reference_pooling import pool
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    At,
    Between,
    DisallowedTokens,
    Each,
    Every,
    HiddenSpec,
    LastTokens,
    Request,
    Role,
    SGLangHiddenWrapper,
    SGLangServer,
    SpanError,
    Window,
)

LAYERS = (-1, 4)
OF_RESPONSE: dict[str, Any] = {
    "after": At(" capital"),
    "before": At(" capital", "before"),
    "first": At("The", "before"),
    "split": Each("apital of Fr"),
    "each": Each("a"),
    "mean of each": Each("a", "before", pooling="mean"),
    "missing": At("</think>"),
    "none": Each("</think>"),
    "mean of none": Each("</think>", pooling="mean"),
    "at the end": At("<|im_end|>"),
    "before the end": At("<|im_end|>", "before"),
    "window": Window(2, 5),
    "cut": Window(3, 99, pooling="max"),
    "rows of a window": Window(1, 3, pooling=None),
    "past": Window(50, 60),
    "every": Every(3),
    "last of every": Every(3, pooling="last"),
    "rows of the tail": LastTokens(2, pooling=None),
}
OF_PROMPT: dict[str, Any] = {
    "p after": At("France", segment="prompt"),
    "p before": At("France", "before", "prompt"),
    "p first": At("<|im_start|>", "before", "prompt"),
    "p each": Each("<|im_start|>", segment="prompt"),
    "p mean of each": Each("a", segment="prompt", pooling="mean"),
    "p none": Each("</think>", segment="prompt"),
    "p window": Window(1, 70, "prompt", pooling="sum"),
    "p past": Window(900, 960, "prompt"),
    "p every": Every(5, "prompt"),
    "p max of every": Every(7, "prompt", pooling="max"),
}
POEM = "Roses are red, violets are blue, and France is where they grew. " * 6


@pytest.fixture
def wrapper(smol: SGLangServer, tokenizer: PreTrainedTokenizerBase) -> Callable[..., SGLangHiddenWrapper]:
    def make(mode: str, hidden: HiddenSpec, **options: Any) -> SGLangHiddenWrapper:
        greedy = {"max_new_tokens": 12, "temperature": 0}
        return SGLangHiddenWrapper(
            smol, tokenizer=tokenizer, input_mode=mode, hidden=hidden, generate_kwargs=greedy, **options
        )

    return make


def expected_rows(span: Any, prompt: list[int], response: list[int], model_dir: str) -> list[int]:
    if span.segment == "response":
        return rows_by_pieces(span, response, model_dir)
    positions = range(len(prompt))
    if isinstance(span, Window):
        return list(positions[span.start : span.stop])
    if isinstance(span, Every):
        return list(positions[:: span.n])
    return [place for place in read_by_pieces(span, prompt, model_dir) if place >= 0]


def assert_spans(row: TensorDict, spec: HiddenSpec, model_dir: str, *, padded: bool) -> dict[str, list[int]]:
    """Check the spans of one row, and return which rows they have."""
    mask = row["masks"].all_attention_mask
    full, num_prompt = row["tokens"].full, len(row["tokens"].prompt)
    prompt, response = full[:num_prompt][mask[:num_prompt]].tolist(), full[num_prompt:][mask[num_prompt:]].tolist()
    truth = hf_oracle.teacher_force(model_dir, prompt, response, layers=LAYERS)
    hidden, rows = row["hidden_states"], {}
    for name, span in spec.spans.items():
        places = rows[name] = expected_rows(span, prompt, response, model_dir)
        found, pooling = hidden.spans[name], spec.pooling_of(name)
        assert int(hidden.span_counts[name]) == len(places), name
        truth_SKD = torch.stack([truth.rows(span.segment, layer)[places] for layer in LAYERS], 1)
        if pooling is None:
            listed = hidden.span_places[name]
            assert listed.dtype == torch.int64
            assert listed[: len(places)].tolist() == places, name
            assert (len(listed) == len(places)) or padded, name
            assert listed[len(places) :].eq(-1).all(), name
            assert not found[len(places) :].any(), name
            found = found[: len(places)]
        elif not places:
            assert found.isnan().all(), name
            continue
        expected = truth_SKD if pooling is None else pool(truth_SKD.double(), pooling).float()
        assert (found.shape, found.dtype) == (expected.shape, torch.float32), name
        for layer in range(len(LAYERS)) if places else ():
            assert relative_error(found[..., layer, :], expected[..., layer, :]) < STATE_RTOL, name
    return rows


@pytest.mark.parametrize(("pooling", "pad_output"), [("mean", False), ("last", True)])
def test_states_and_windows_cold_and_cached(wrapper: Any, smol_dir: str, pooling: Any, pad_output: bool) -> None:
    """The prompt of the second row comes in chunks; the second call hits the prefix cache."""
    spans = {**OF_RESPONSE, **OF_PROMPT, "user": Role("user", pooling="last")}
    spec = HiddenSpec(("prompt", "response"), pooling, layers=LAYERS, spans=spans)
    policy = wrapper("history", spec, pad_output=pad_output)
    questions = ["What is the capital of France?", f"{pad_output} {pooling} {POEM}What is the capital of France?"]
    checked = HiddenSpec((), pooling, layers=LAYERS, spans={**OF_RESPONSE, **OF_PROMPT})
    for _ in range(2):
        out = policy(history_input(questions))
        for row in out.unbind(0):
            rows = assert_spans(row, checked, smol_dir, padded=pad_output)
            assert rows["after"], "the model does not say what this test is about"
            assert rows["each"]
            assert not rows["missing"]
            assert not rows["p first"]
        leaves = {key for key in policy.out_keys if isinstance(key, tuple) and "span_places" in key}
        assert {key[-1] for key in leaves} == set(spec.unpooled)


def test_several_samples_under_constraints(wrapper: Any, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each sample has rows of its own, and all of them the prompt's."""
    spans = {"each": Each("e"), "at": At(" ", "before"), "p": Every(4, "prompt"), "w": Window(2, 4, pooling="last")}
    spec = HiddenSpec((), layers=LAYERS, spans=spans)
    policy = wrapper(
        "history", spec, num_samples=3, constraints=(DisallowedTokens((tokenizer("France")["input_ids"][0],)),)
    )
    policy = policy.get_new_version(generate_kwargs={"max_new_tokens": 12, "temperature": 1.0})
    out = policy(history_input(["What is the capital of France?", "Name a river."]))
    rows = [assert_spans(row, spec, smol_dir, padded=False) for prompt in out.unbind(0) for row in prompt.unbind(0)]
    assert len({tuple(found["each"]) for found in rows}) > 1


def test_a_stream_a_session_and_a_scored_sequence(smol: SGLangServer, wrapper: Any, smol_dir: str) -> None:
    spans = {"e": Each("e"), "s": At(" ", "before", pooling=None), "n": Every(2, pooling="mean"), "w": Window(0, 3)}
    spec = HiddenSpec(("response",), "last", spans=spans)
    request = Request(
        tuple(prompt_of(70, seed=77)), {"max_new_tokens": 16, "temperature": 1.0}, hidden=spec, spans=spans
    )
    with smol.stream(request) as stream:
        for _ in stream:
            pass
        assert_completion(request, stream.completion, smol_dir, 30)
    with smol.session() as session:
        for _ in range(2):
            completion = session.generate(request)
            whole = Request(completion.prompt_ids, request.sampling, hidden=spec, spans=spans)
            assert_completion(whole, completion, smol_dir, 30)
    scoring = wrapper("tokens", HiddenSpec(("prompt",), spans={**spans, "p": Every(3, "prompt")}), generate=False)
    ids = prompt_of(9, seed=78)
    batch = tokens_input([ids])
    batch["tokens"].full = batch["tokens"].prompt
    (row,) = scoring(batch).unbind(0)
    assert row["hidden_states"].span_places["p"].tolist() == [0, 3, 6]
    truth_ND = hf_oracle.teacher_force(smol_dir, ids, [0]).rows("prompt")
    assert relative_error(row["hidden_states"].spans["p"], truth_ND[::3]) < STATE_RTOL


def test_the_rows_between_markers(wrapper: Any, smol_dir: str) -> None:
    spec = HiddenSpec((), spans={"thought": Between(" capital", ".", pooling=None)})
    (row,) = wrapper("history", spec)(history_input(["What is the capital of France?"])).unbind(0)
    places = row["hidden_states"].span_places["thought"].tolist()
    assert places == list(range(places[0], places[-1] + 1))
    truth = hf_oracle.teacher_force(smol_dir, row["tokens"].prompt.tolist(), row["tokens"].response.tolist())
    assert relative_error(row["hidden_states"].spans["thought"], truth.rows("response")[places]) < STATE_RTOL


def test_a_marker_that_is_asked_for(wrapper: Any) -> None:
    batch = history_input(["What is the capital of France?"])
    for span in (At("</think>", missing="error"), Each("</think>", segment="prompt", missing="error")):
        with pytest.raises(SpanError, match=r"row 0.*'thought'.*</think>.*missing='nan'"):
            wrapper("history", HiddenSpec((), spans={"thought": span}))(batch)
        assert "hidden_states" not in batch[0]
