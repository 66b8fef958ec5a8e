"""Compares what an engine returned with Hugging Face, at the level of `Request` and `Completion`."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers import heads_oracle, hf_oracle
from helpers.byte_tokenizers import byte_characters
from helpers.policy_checks import LOG_PROB_ATOL, STATE_RTOL, relative_error
from helpers.reference_pooling import pool
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import canonical_layer
from torchrl_sglang_hidden.spec.places import At, Each, Every, Window
from torchrl_sglang_hidden.spec.spans import Between, LastTokens, PromptSpan, ResponseSpan

Stack = torch.Tensor


def assert_completion(
    request: Request, completion: Completion, model_dir: str, num_layers: int, *, rtol: float = STATE_RTOL
) -> hf_oracle.Truth:
    """Check that every log-prob, segment, span and token state of one completion equals Hugging Face's.

    A prompt that was only read has no response; its truth is that of any one token.
    """
    spec, prompt_ids = request.hidden, completion.prompt_ids
    response_ids = completion.response_ids or (0,)
    layers = () if spec is None else tuple(canonical_layer(layer, num_layers) for layer in spec.layer_ids)
    temperature = request.sampling.get("temperature", 1.0) or 1.0
    images = () if request.images is None else request.images.data
    truth = hf_oracle.teacher_force(model_dir, prompt_ids, response_ids, temperature, layers, images)
    name = f"P={len(prompt_ids)} T={len(completion.response_ids)} {spec}"
    assert prompt_ids == request.prompt_ids, name
    if completion.log_probs_T is not None:
        expected_T = truth.log_probs_T[: len(completion.response_ids)]
        torch.testing.assert_close(completion.log_probs_T, expected_T, atol=LOG_PROB_ATOL, rtol=0, msg=name)
    assert_scores_of(request, completion, model_dir)
    if spec is None:
        assert (completion.hidden, completion.spans, completion.token_rows) == ({}, {}, None), name
        return truth

    def rows(segment: str) -> Stack:
        stacked = torch.stack([truth.rows(segment, layer) for layer in layers], 1)
        return stacked if isinstance(spec.layers, tuple) else stacked[:, 0]

    def check(what: str, found: torch.Tensor, count: int, rows_ND: Stack, pooling: str | None) -> None:
        assert count == len(rows_ND), f"{what}: {count} rows, expected {len(rows_ND)}; {name}"
        if pooling is not None and not count:
            assert found.isnan().all(), f"{what}; {name}"
            return
        expected = rows_ND if pooling is None else pool(rows_ND.double(), pooling).float()
        assert (found.shape, found.dtype) == (expected.shape, torch.float32), f"{what}; {name}"
        error = relative_error(found.flatten(), expected.flatten())
        assert error < rtol or not count, f"{what}: relative error {error:.2e}; {name}"

    assert set(completion.hidden) == (set(spec.segments) if spec.pooling else set()), name
    for segment, pooled in completion.hidden.items():
        check(segment, pooled.vector, pooled.count, rows(segment), spec.pooling)
    assert set(completion.spans) == set(spec.spans), name
    for key, pooled in completion.spans.items():
        span, pooling = request.spans[key], spec.pooling_of(key)
        if isinstance(span, PromptSpan):
            places = [place for start, stop in span.intervals for place in range(start, stop)]
            check(key, pooled.vector, pooled.count, rows("prompt")[places], pooling)
        else:
            places = rows_by_pieces(span, completion.response_ids, model_dir)
            check(key, pooled.vector, pooled.count, rows("response")[places], pooling)
        listed = tuple(places) if pooling is None or isinstance(span, At | Each) else None
        assert pooled.places == listed, f"{key}: {pooled.places}, expected {listed}; {name}"
    if spec.tokens:
        found = completion.token_rows
        assert found is not None, name
        first = 0 if spec.segments != ("response",) else len(prompt_ids) - 1
        expected_ND = rows("prompt") if spec.segments == ("prompt",) else rows("full")[first:]
        assert (found.first, found.rows_ND.shape) == (first, expected_ND.shape), name
        tolerance = max(rtol, 4e-3) if found.rows_ND.dtype != torch.float32 else rtol
        error = relative_error(found.rows_ND.float().flatten(), expected_ND.flatten())
        assert error < tolerance, f"token states: relative error {error:.2e}; {name}"
    else:
        assert completion.token_rows is None, name
    return truth


def assert_scores_of(request: Request, completion: Completion, model_dir: str) -> None:
    """Check the scores of the storm's heads, and that their rule ended the response where it says so."""
    spec = request.heads
    if spec is None:
        assert completion.scores == {}
        return
    assert list(completion.scores) == list(spec.heads)
    prompt_ids, response_ids = completion.prompt_ids, completion.response_ids or (0,)
    images = () if request.images is None else request.images.data
    states_size = hf_oracle.load(model_dir).config.get_text_config().hidden_size
    for name, scores in completion.scores.items():
        head = heads_oracle.storm_head(name, states_size)
        expected = heads_oracle.expected(head, model_dir, prompt_ids, response_ids, heads_oracle.STORM_LAYERS, images)
        for segment, found, asked in (
            ("prompt", scores.prompt_P, spec.prompt_tokens),
            ("response", scores.response_T, spec.response_tokens),
        ):
            assert (found is not None) is asked
            if found is not None:
                heads_oracle.assert_scores(found, expected[segment], f"{name}, {segment}, {spec}")
        for segment, one in scores.pooled.items():
            truth = pool(torch.from_numpy(expected[segment])[:, None], str(spec.pooling)).numpy()
            scale = one.count if spec.pooling == "sum" else 1  # errors add up with the scores
            heads_oracle.assert_scores(one.vector[None] / scale, truth / scale, f"{name}, {segment}, {spec}")
        for span, one in scores.spans.items():
            assert one.places == tuple(range(0, len(completion.response_ids), 3)), span
            heads_oracle.assert_scores(one.vector, expected["response"][::3], f"{name}, {span}")
        assert (scores.pooled.keys(), scores.spans.keys()) == (
            set(spec.segments if spec.pooling else ()),
            spec.spans.keys(),
        )
    rule = spec.rule
    if rule is not None and spec.response_tokens:
        scores_T = completion.scores[rule.head].response_T
        assert scores_T is not None
        holding = [token for token, score in enumerate(scores_T.tolist()) if rule.holds(score)]
        assert holding in ([], [len(scores_T) - 1]), f"{spec}: {holding} of {len(scores_T)}"
        assert (completion.finish_reason == "head") <= bool(holding)


@functools.cache
def _tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def rows_by_pieces(span: ResponseSpan, ids: Sequence[int], model_dir: str) -> list[int]:
    """Return the rows of a response that a span covers, by counting the bytes of each token of a byte-level model."""
    rows = list(range(len(ids)))
    match span:
        case LastTokens():
            return rows[-span.count :]
        case Window():
            return rows[span.start : span.stop]
        case Every():
            return rows[:: span.n]
        case Between():
            raise NotImplementedError(span)
    return [read + 1 for read in read_by_pieces(span, ids, model_dir) if read + 1 < len(ids)]


def read_by_pieces(span: At | Each, ids: Sequence[int], model_dir: str) -> list[int]:
    """Return the token that each state of a span has read last, of a byte-level model; -1 before the first."""
    tokenizer, to_byte = _tokenizer(model_dir), {char: byte for byte, char in enumerate(byte_characters())}
    ends, text = [0], b""
    for token, token_id in zip(tokenizer.convert_ids_to_tokens(list(ids)), ids, strict=True):
        special = token_id in tokenizer.added_tokens_decoder
        text += token.encode() if special else bytes(to_byte[char] for char in token)
        ends.append(len(text))
    found = [(one.start(), one.end()) for one in re.finditer(re.escape(span.marker.encode()), text)]
    places = []
    for start, end in found[:1] if isinstance(span, At) else found:
        touched = [place for place in range(len(ids)) if ends[place] < end and ends[place + 1] > start]
        places.append(touched[-1] if span.where == "after" else touched[0] - 1)
    return sorted(set(places))
