"""Scores of small heads on the demo model, against Hugging Face and the head in float64; and the stop rule."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers import heads_oracle, hf_oracle
from helpers.policy_checks import (
    CHUNKED_PREFILL_SIZE,
    LOG_PROB_ATOL,
    STATE_RTOL,
    prompt_of,
    relative_error,
    tokens_input,
)
from tensordict import TensorDict
from torchrl.modules.llm.policies import Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    At,
    Completion,
    Every,
    HeadSpec,
    HiddenSpec,
    InputError,
    LastTokens,
    LogitsSpec,
    Request,
    RequestRejectedError,
    SGLangHiddenWrapper,
    SGLangServer,
    WeightsError,
    Window,
)
from torchrl_sglang_hidden.engines.resuming import join_completions, rest_of
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.spec.spans import PromptSpan

D, LAYERS = 576, (4, 29)
HEADS = {
    "linear": heads_oracle.make_head("linear", D, seed=1, normalize="standard"),
    "mlp": heads_oracle.make_head("mlp", D, seed=2, layer=4, normalize="layer", activation="gelu", scale=2),
    "gated": heads_oracle.make_head("gated", D, seed=3, layer=29, normalize="rms", output="sigmoid", scale=2),
    "tanh": heads_oracle.make_head("mlp", D, seed=4, normalize="rms", activation="tanh", scale=2),
}
NAMES = tuple(HEADS)
ALL = ("prompt", "response", "full")


@pytest.fixture(scope="module")
def versions(smol: SGLangServer) -> Iterator[dict[str, str]]:
    yield {name: smol.push_head(name, head) for name, head in HEADS.items()}
    for name in HEADS:
        smol.drop_head(name)


def greedy(ids: list[int], max_new_tokens: int = 8, **fields: Any) -> Request:
    return Request(tuple(ids), {"temperature": 0, "max_new_tokens": max_new_tokens}, **fields)


def assert_scored(completion: Completion, spec: HeadSpec, model_dir: str, versions: dict[str, str]) -> None:
    assert completion.scores.keys() == set(spec.heads)
    prompt, response = list(completion.prompt_ids), list(completion.response_ids)
    for name, scores in completion.scores.items():
        expected = heads_oracle.expected(HEADS[name], model_dir, prompt, response, LAYERS)
        what = f"{name}, P={len(prompt)}, T={len(response)}"
        assert scores.version == versions[name]
        assert (scores.prompt_P is not None, scores.response_T is not None) == (spec.of_prompt, spec.of_response)
        if scores.prompt_P is not None:
            heads_oracle.assert_scores(scores.prompt_P, expected["prompt"], f"{what}, prompt")
        if scores.response_T is not None:
            heads_oracle.assert_scores(scores.response_T, expected["response"], f"{what}, response")


def test_cold_cached_chunked_and_mixed(smol: SGLangServer, smol_dir: str, versions: dict[str, str]) -> None:
    """Each kind of head, cold and from the prefix cache, in one batch with requests that ask for other things."""
    long = prompt_of(2 * CHUNKED_PREFILL_SIZE + 9, seed=7100)
    requests = [
        greedy(long, heads=HeadSpec(NAMES, ALL)),
        greedy(prompt_of(9, seed=7101), heads=HeadSpec(("mlp", "linear"))),
        greedy(prompt_of(12, seed=7102), hidden=HiddenSpec(ALL, layers=(-1, 4)), logits=LogitsSpec(top_k=3)),
        greedy(prompt_of(5, seed=7103)),
        greedy(prompt_of(7, seed=7104), heads=HeadSpec(("gated",), ("prompt",))),
        greedy(prompt_of(11, seed=7105), hidden=HiddenSpec(("prompt",), tokens=True), heads=HeadSpec(NAMES, ("full",))),
        greedy(prompt_of(1, seed=7106), heads=HeadSpec(NAMES, ALL)),
    ]
    for _ in range(2):
        for request, completion in zip(requests, smol.generate(requests), strict=True):
            if request.heads is None:
                assert completion.scores == {}
            else:
                assert_scored(completion, request.heads, smol_dir, versions)
    (longer,) = smol.generate([greedy([*long, *prompt_of(5, seed=7107)], heads=HeadSpec(NAMES, ALL))])
    assert_scored(longer, HeadSpec(NAMES, ALL), smol_dir, versions)
    # The response alone leaves the whole prompt to the prefix cache.
    (cached,) = smol.generate([greedy(long, heads=HeadSpec(NAMES))])
    assert cached.cached_tokens > CHUNKED_PREFILL_SIZE
    assert_scored(cached, HeadSpec(NAMES), smol_dir, versions)


@pytest.mark.parametrize(("pad_output", "num_samples"), [(False, None), (True, 2)])
def test_a_policy_writes_scores(
    smol: SGLangServer,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    versions: dict[str, str],
    pad_output: bool,
    num_samples: int | None,
) -> None:
    policy = SGLangHiddenWrapper(
        smol,
        tokenizer=tokenizer,
        input_mode="tokens",
        hidden=None,
        heads=HeadSpec(("mlp", "gated"), ALL),
        pad_output=pad_output,
        num_samples=num_samples,
        generate_kwargs={"max_new_tokens": 6, "temperature": 1.0 if num_samples else 0},
    )
    out = policy(tokens_input([prompt_of(9, seed=7201), prompt_of(14, seed=7202)]))
    assert ("head_scores", "response", "mlp") in policy.out_keys
    groups = out.unbind(0)
    for row in groups if num_samples is None else [row for group in groups for row in group.unbind(0)]:
        mask, num_prompt = row["masks"].all_attention_mask, len(row["tokens"].prompt)
        prompt = row["tokens"].prompt[mask[:num_prompt]].tolist()
        response = row["tokens"].response[mask[num_prompt:]].tolist()
        for name in ("mlp", "gated"):
            expected = heads_oracle.expected(HEADS[name], smol_dir, prompt, response, LAYERS)
            assert row["head_scores", "versions", name] == versions[name]
            for segment in ALL:
                found = row["head_scores", segment, name]
                if pad_output:
                    assert len(found) == len(getattr(row["tokens"], segment)) - (segment == "full")
                heads_oracle.assert_scores(found[~found.isnan()], expected[segment], f"{name}, {segment}")
    scorer = policy.get_new_version(generate=False, num_samples=None, input_key=("tokens", "full"))
    scored = scorer(
        TensorDict(tokens=Tokens(full=torch.tensor([prompt_of(9, seed=7201)]), batch_size=1), batch_size=1)
    )[0]
    expected = heads_oracle.expected(HEADS["mlp"], smol_dir, prompt_of(9, seed=7201), [1], LAYERS)["prompt"]
    heads_oracle.assert_scores(scored["head_scores", "full", "mlp"], expected, "scored")


@pytest.mark.parametrize(("pooling", "num_samples"), [("mean", None), (None, 2)])
def test_scores_of_segments_and_boundaries(
    smol: SGLangServer,
    smol_dir: str,
    tokenizer: PreTrainedTokenizerBase,
    versions: dict[str, str],
    pooling: Any,
    num_samples: int | None,
) -> None:
    """One number for each, beside requests for other things; a long prompt cold, then with a part of it cached."""
    prompts = [prompt_of(CHUNKED_PREFILL_SIZE + 5, seed=7250), prompt_of(11, seed=7251)]
    asked = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    (free,) = smol.generate([Request(tuple(prompts[1]), asked)])
    marker, found_boundary = tokenizer.decode(free.response_ids[3]), False
    spans = {
        "boundary": At(marker, pooling="last"),
        "all": Every(5),
        "start": Window(0, 6, segment="prompt", pooling="max"),
    }
    policy = SGLangHiddenWrapper(
        smol,
        tokenizer=tokenizer,
        input_mode="tokens",
        hidden=HiddenSpec(),
        heads=HeadSpec(("mlp", "gated"), ALL, pooling=pooling, spans=spans),
        num_samples=num_samples,
        generate_kwargs=asked,
    )
    for _ in range(2):
        rows = policy(tokens_input(prompts)).unbind(0)
        for row in rows if num_samples is None else [row for group in rows for row in group.unbind(0)]:
            prompt, response = row["tokens"].prompt.tolist(), row["tokens"].response.tolist()
            for name in ("mlp", "gated"):
                truth = heads_oracle.expected(HEADS[name], smol_dir, prompt, response, LAYERS)
                for segment in ALL:
                    expected = truth[segment].mean(keepdims=True) if pooling == "mean" else truth[segment]
                    found = row["head_scores", segment, name]
                    heads_oracle.assert_scores(found[None] if pooling == "mean" else found, expected, segment)
                in_spans = row["head_scores", "spans"]
                heads_oracle.assert_scores(in_spans["all", name], truth["response"][::5], "all")
                heads_oracle.assert_scores(
                    in_spans["start", name][None], truth["prompt"][:6].max(keepdims=True), "start"
                )
                at = row_behind(marker, response, tokenizer)
                boundary = truth["response"][at : at + 1] if at < len(response) else np.array([np.nan])
                np.testing.assert_allclose(in_spans["boundary", name][None], boundary, atol=heads_oracle.SCORE_ATOL)
                found_boundary |= at < len(response)
    assert found_boundary


def row_behind(marker: str, response: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the first row whose state has read the marker; T or more where there is none."""
    return next((n for n in range(1, len(response)) if marker in tokenizer.decode(response[:n])), len(response))


@pytest.mark.parametrize("least", [0, 5])
def test_a_score_ends_a_response(smol: SGLangServer, smol_dir: str, versions: dict[str, str], least: int) -> None:
    """With the token that fulfils the rule as its last, and all that belongs to it cut there too."""
    prompts = [prompt_of(9 + row, seed=7300 + row) for row in range(4)]
    asked: dict[str, Any] = {
        "hidden": HiddenSpec(("response", "full"), layers=(-1, 4), tokens=True),
        "logits": LogitsSpec(top_k=2),
    }
    ignoring = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    free = smol.generate([Request(tuple(ids), ignoring, heads=HeadSpec(("linear",)), **asked) for ids in prompts])
    rules = [heads_oracle.rule_that_ends_at(one.scores["linear"].response_T, least) for one in free]
    stopping = [
        Request(tuple(ids), ignoring, heads=HeadSpec(("linear",), stop_when=f"linear {rule}"), **asked)
        for ids, (rule, _) in zip(prompts, rules, strict=True)
    ]
    beside = [Request(tuple(ids), ignoring, heads=HeadSpec(("linear",))) for ids in prompts[:2]]
    mixed = smol.generate([*stopping, *beside])
    for whole, cut, (_, last) in zip(free, mixed, rules, strict=False):
        assert cut.finish_reason == "head"
        assert cut.response_ids == whole.response_ids[: last + 1]
        assert len(cut.log_probs_T) == len(cut.logits.values_NC) == len(cut.scores["linear"].response_T) == last + 1
        assert cut.hidden["response"].count == last + 1
        assert_scored(cut, HeadSpec(("linear",)), smol_dir, versions)
        truth = hf_oracle.teacher_force(smol_dir, list(cut.prompt_ids), list(cut.response_ids), layers=LAYERS)
        torch.testing.assert_close(cut.log_probs_T, truth.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
        for place, layer in enumerate((-1, 4)):
            for segment in ("response", "full"):
                error = relative_error(cut.hidden[segment].vector[place], truth.pooled(segment, "mean", layer))
                assert error < STATE_RTOL, (segment, layer, error)
    assert [one.finish_reason for one in mixed[4:]] == ["length"] * 2
    assert [len(one.response_ids) for one in mixed[4:]] == [12] * 2


def test_a_score_ends_a_stream(smol: SGLangServer, versions: dict[str, str]) -> None:
    ids = prompt_of(9, seed=7300)
    ignoring = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    (free,) = smol.generate([Request(tuple(ids), ignoring, heads=HeadSpec(("linear",)))])
    rule, last = heads_oracle.rule_that_ends_at(free.scores["linear"].response_T, 2)
    spec = HeadSpec(("linear", "gated"), ("prompt", "response"), stop_when=f"linear {rule}")
    with smol.stream(Request(tuple(ids), ignoring, heads=spec)) as stream:
        chunks = list(stream)
        whole = stream.completion
    for name, scores in whole.scores.items():
        assert torch.equal(torch.cat([chunk.scores[name] for chunk in chunks]), scores.response_T)
    assert sum((chunk.ids for chunk in chunks), ()) == whole.response_ids == free.response_ids[: last + 1]
    assert whole.finish_reason == "head"
    torch.testing.assert_close(
        whole.scores["linear"].response_T, free.scores["linear"].response_T[: last + 1], atol=1e-5, rtol=0
    )


def test_a_rule_and_another_end_at_once(smol: SGLangServer, versions: dict[str, str]) -> None:
    """A stop token says so itself, and its text is trimmed as ever; the last token that is allowed is the rule's."""
    ids = tuple(prompt_of(9, seed=7300))
    always = HeadSpec(("linear",), stop_when="linear > -1e30")
    ignoring: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    (free,) = smol.generate([Request(ids, ignoring)])
    # SGLang looks at no stop token under ignore_eos.
    stop = {"temperature": 0, "max_new_tokens": 3, "stop_token_ids": [free.response_ids[0]]}
    by_token, by_length, never = smol.generate(
        [
            Request(ids, stop, heads=always),
            Request(ids, {**ignoring, "max_new_tokens": 1}, heads=always),
            Request(ids, ignoring, heads=HeadSpec(("linear",), stop_when="linear < -1e30")),
        ]
    )
    assert [one.finish_reason for one in (by_token, by_length, never)] == ["stop", "head", "length"]
    assert [len(one.response_ids) for one in (by_token, by_length, never)] == [1, 1, 3]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooled_scores_of_a_response_in_two_parts(
    smol: SGLangServer, smol_dir: str, versions: dict[str, str], pooling: Any
) -> None:
    spans = {"end": LastTokens(2), "start": Window(0, 3, segment="prompt", pooling="sum")}
    spec = HeadSpec(("mlp", "gated"), ALL, pooling=pooling, spans=spans)
    ids = prompt_of(9, seed=7350)
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    resolved = {"end": LastTokens(2), "start": PromptSpan(((0, 3),), pooling="sum")}
    whole = Request(tuple(ids), sampling, heads=spec, head_spans=resolved)
    (first,) = smol.generate([replace(whole, sampling={**sampling, "max_new_tokens": 3})])
    (rest,) = smol.generate([rest_of(whole, first)])
    joined = join_completions(whole, first, rest)
    assert (len(joined.response_ids), joined.error) == (8, None)
    for name, scores in joined.scores.items():
        truth = heads_oracle.expected(HEADS[name], smol_dir, ids, list(joined.response_ids), LAYERS)
        reduce = np.mean if pooling == "mean" else np.max
        for segment in ALL:
            assert scores.pooled[segment].count == len(truth[segment])
            heads_oracle.assert_scores(
                scores.pooled[segment].vector[None], reduce(truth[segment], keepdims=True), segment
            )
        heads_oracle.assert_scores(
            scores.spans["end"].vector[None], reduce(truth["response"][-2:], keepdims=True), "end"
        )
        heads_oracle.assert_scores(scores.spans["start"].vector[None], truth["prompt"][:3].sum(keepdims=True), "start")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "prompt"),
    [
        ("/generate", {"text": "The capital"}),
        ("/v1/completions", {"prompt": "The capital"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_other_clients_read_a_stop(
    smol: SGLangServer, versions: dict[str, str], route: str, prompt: dict[str, Any], stream: bool
) -> None:
    """On SGLang's OpenAI routes too, whose clients know no other reasons than OpenAI's."""
    request = greedy([5, 6], heads=HeadSpec(("linear",), stop_when="linear > -1e30"))
    (params,) = to_payload([request], smol.info, binary=False)["sampling_params"]
    if route == "/generate":
        body = {**prompt, "sampling_params": {**params, "ignore_eos": True}}
    else:
        body = {**prompt, "model": "default", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        body["custom_params"] = params["custom_params"]
    answer = httpx.post(smol.url + route, json={**body, "stream": stream}, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    lines = answer.text.splitlines() if stream else [f"data: {answer.text}"]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    if route == "/generate":
        reasons = [part["meta_info"]["finish_reason"] for part in parts]
        assert [one for one in reasons if one] == [{"type": "stop", "head": "linear > -1e+30"}]
    else:
        choices = [choice for part in parts for choice in part["choices"]]
        reasons = [(one["finish_reason"], one.get("matched_stop")) for one in choices if one["finish_reason"]]
        assert reasons == [("stop", None)]


def test_a_head_that_is_pushed_again(smol: SGLangServer, smol_dir: str) -> None:
    """Requests under way keep the head that they began with; those behind it have the new one, and say which."""
    old, new = (heads_oracle.make_head("linear", D, seed=seed, normalize="rms") for seed in (11, 12))
    ids = prompt_of(10, seed=7400)
    request = greedy(ids, 8, heads=HeadSpec(("again",)))
    ignoring = replace(request, sampling={"temperature": 0, "max_new_tokens": 40, "ignore_eos": True})
    first = smol.push_head("again", old, version="one")
    with smol.stream(ignoring) as stream:
        next(iter(stream))
        assert smol.push_head("again", new) == smol.push_head("again", new)
        for _ in stream:
            pass
        under_way = stream.completion
    (behind,) = smol.generate([request])
    assert (under_way.scores["again"].version, first) == ("one", "one")
    assert behind.scores["again"].version not in ("one", "")
    for completion, head in ((under_way, old), (behind, new)):
        expected = heads_oracle.expected(head, smol_dir, ids, list(completion.response_ids), LAYERS)["response"]
        heads_oracle.assert_scores(completion.scores["again"].response_T, expected, "again")
    with pytest.raises(RequestRejectedError, match=r"has version .* with other weights"):
        smol.push_head("again", old, version=behind.scores["again"].version)
    with smol.stream(ignoring) as stream:
        next(iter(stream))
        smol.drop_head("again")
        last = [chunk.scores["again"] for chunk in stream][-1]
        assert torch.equal(last, stream.completion.scores["again"].response_T[-len(last) :])
    with pytest.raises(RequestRejectedError, match=r"no head .again.*push_head"):
        smol.generate([request])


@pytest.mark.parametrize("segments", [("response",), ALL])
def test_a_session(smol: SGLangServer, smol_dir: str, versions: dict[str, str], segments: Any) -> None:
    """Positions count from the context's beginning."""
    spec = HeadSpec(("mlp", "gated"), segments)
    pooled = replace(spec, pooling="mean")
    with smol.session() as session:
        for seed in (7600, 7601):
            completion = session.generate(greedy(prompt_of(9, seed=seed), 4, heads=spec))
            assert_scored(completion, spec, smol_dir, versions)
        last = session.generate(greedy(prompt_of(9, seed=7602), 4, heads=pooled))
    assert len(completion.prompt_ids) == 9 + 4 + 9
    for name, scores in last.scores.items():
        truth = heads_oracle.expected(HEADS[name], smol_dir, list(last.prompt_ids), list(last.response_ids), LAYERS)
        for segment in segments:
            heads_oracle.assert_scores(scores.pooled[segment].vector[None], truth[segment].mean(keepdims=True), segment)


def test_heads_that_cannot_be_served(smol: SGLangServer, tmp_path: Any) -> None:
    """Each is refused with a name, and the server goes on."""
    from torchrl_sglang_hidden.protocol.head_call import HeadCall

    narrow, far = heads_oracle.make_head("linear", 8), heads_oracle.make_head("linear", D, layer=30)
    with pytest.raises(WeightsError, match=r"reads states of 8 numbers, and the model's have 576"):
        smol.push_head("bad", narrow)
    with pytest.raises(InputError, match=r"layers=30: the model has 30 layers"):
        smol.push_head("bad", far)
    (tmp_path / "head.safetensors").write_bytes(b"not a head")
    with pytest.raises(WeightsError, match="no safetensors file that describes a head"):
        smol.push_head("bad", tmp_path / "head.safetensors")
    # What another client may send, past the checks of this one.
    for head, said in (
        (narrow, "reads states of 8 numbers"),
        (far, "reads layer 30, whose states the server does not give"),
    ):
        with pytest.raises(RequestRejectedError, match=said):
            smol._endpoints[0].call("get_weights_by_name", {"name": HeadCall("bad", "1", head.to_bytes()).pack()})
    for name, said in (
        (HeadCall("bad", "1", b"{}").pack(), "no safetensors file"),
        (HeadCall("bad").pack()[:-9], "cannot be read"),
        (HeadCall("bad").pack(), "no head 'bad'"),
    ):
        with pytest.raises(RequestRejectedError, match=said):
            smol._endpoints[0].call("get_weights_by_name", {"name": name})
    with pytest.raises(RequestRejectedError, match="no head 'bad'"):
        smol.generate([greedy(prompt_of(5, seed=1), heads=HeadSpec(("bad",)))])
    assert smol.generate([greedy(prompt_of(5, seed=1))])[0].finish_reason == "length"


def test_many_at_once_without_waiting(smol: SGLangServer, smol_dir: str, versions: dict[str, str]) -> None:
    """Requests of every kind of head that come and end at any time, half of them by a rule."""

    async def run() -> list[Completion]:
        async def one(index: int) -> Completion:
            await asyncio.sleep(0.02 * (index % 7))
            names = NAMES[index % 4 :] + NAMES[: index % 3]
            stop = f"{names[0]} > {0.2 * (index % 5)}" if index % 2 else None
            spec = HeadSpec(tuple(dict.fromkeys(names)), ALL if index % 3 == 0 else ("response",), stop)
            sampling = {"temperature": 1.0, "max_new_tokens": 4 + index % 9}
            (completion,) = await smol.agenerate(
                [Request(tuple(prompt_of(5 + index, seed=7500 + index)), sampling, heads=spec)]
            )
            assert_scored(completion, spec, smol_dir, versions)
            return completion

        return await asyncio.gather(*(one(index) for index in range(12)))

    reasons = {completion.finish_reason for completion in asyncio.run(run())}
    assert {"head", "length"} <= reasons
