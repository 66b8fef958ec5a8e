"""Every segment, layer, pooling and span of small random models, on real servers, against Hugging Face; and the logits,
what the server says of them and what `logits_from_hidden` makes of the states.

What a layer id means, and what a head does, is the model's own matter: so the same questions are put to five
architectures, with heads tied and not, a softcapped one, and one with a vocabulary that SGLang pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import hf_oracle, random_models
from helpers.completion_checks import assert_completion
from helpers.logits_checks import assert_choices
from helpers.policy_checks import CHUNKED_PREFILL_SIZE, make_policy, prompt_of, tokens_input
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Tokens
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ActionMask,
    AlignmentError,
    DisallowedTokens,
    HiddenSpec,
    LastTokens,
    LogitsSpec,
    SGLangHiddenWrapper,
    TokenMask,
    WeightsError,
    launch,
    logits_from_hidden,
)
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.spec.hidden import POOLINGS, SEGMENTS
from torchrl_sglang_hidden.spec.logits import STAGES
from torchrl_sglang_hidden.spec.spans import PromptSpan

# Small random models, and how many layers they have: heads tied and not, scaled, softcapped, and one whose vocabulary
# SGLang pads. One has as many layers as models that people train.
ARCHITECTURES = {
    "llama": (random_models.save_random_llama, 5),
    "granite": (random_models.save_random_granite, 36),
    "qwen3": (random_models.save_random_qwen3, 4),
    "gemma3": (random_models.save_random_gemma3, 6),
    "qwen3_moe": (random_models.save_random_qwen3_moe, 4),
}
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}
# Below, at and above the chunk size; the first is one token, which is prompt, boundary and all.
LENGTHS = (1, 3, 17, 64, 65, 150)


@dataclass(frozen=True)
class Served:
    server: LaunchedServer
    model_dir: str
    num_layers: int


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    save, num_layers = ARCHITECTURES[request.param]
    model_dir = save(tmp_path_factory.mktemp("models") / request.param, smol_dir)
    with launch(
        model_dir,
        dtype="float32",
        chunked_prefill_size=CHUNKED_PREFILL_SIZE,
        context_length=1024,
        max_total_tokens=4096,
        sleep_on_idle=True,
    ) as server:
        yield Served(server, str(model_dir), num_layers)


def ask(served: Served, spec: HiddenSpec, prompts: list[list[int]], **fields: Any) -> list[Completion]:
    """Send a greedy request twice and check both: the second finds the prompt in the prefix cache."""
    requests = [Request(tuple(ids), GREEDY, hidden=spec) for ids in prompts]
    requests = [replace(request, **fields) for request in requests]
    for _ in range(2):
        completions = served.server.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert_completion(request, completion, served.model_dir, served.num_layers)
    return completions


def prompts(seed: int) -> list[list[int]]:
    return [prompt_of(length, 100 * seed + length) for length in LENGTHS]


def test_it_knows_its_layers(served: Served) -> None:
    info = served.server.info
    assert info.num_layers == served.num_layers
    assert info.layers == tuple(range(-1, served.num_layers))
    assert info.pools_in_server
    assert info.no_states_because == ""


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_layer_and_segment(served: Served, pooling: Any) -> None:
    layers = tuple(range(-1, served.num_layers))
    ask(served, HiddenSpec(SEGMENTS, pooling, layers), prompts(1))


def test_one_layer_has_no_dimension_of_layers(served: Served) -> None:
    for layer in (0, -2, served.num_layers - 1, -served.num_layers):
        [completion] = ask(served, HiddenSpec(("prompt", "full"), layers=layer), [prompt_of(20, 5)])
        assert completion.hidden["full"].vector.shape == (64,)


def test_layers_come_in_the_order_asked_for(served: Served) -> None:
    [forth] = ask(served, HiddenSpec(("full",), layers=(0, 2, -1)), [prompt_of(20, 6)])
    [back] = ask(served, HiddenSpec(("full",), layers=(-1, 2, 0)), [prompt_of(20, 6)])
    assert torch.equal(forth.hidden["full"].vector, back.hidden["full"].vector.flip(0))


@pytest.mark.parametrize("segments", [("prompt",), ("response",), ("full",), ("prompt", "response")])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_states_of_every_token(served: Served, segments: Any, pooling: Any) -> None:
    ask(served, HiddenSpec(segments, pooling, layers=(1, -1), tokens=True), prompts(2))
    ask(served, HiddenSpec(segments, pooling, tokens=True), prompts(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_states_in_half_the_bytes(served: Served, dtype: torch.dtype) -> None:
    [completion] = ask(served, HiddenSpec(("full",), tokens=True, dtype=dtype), [prompt_of(30, 7)])
    assert completion.token_rows is not None
    assert completion.token_rows.rows_ND.dtype == dtype
    assert completion.hidden["full"].vector.dtype == torch.float32


@pytest.mark.parametrize("pooling", POOLINGS)
def test_spans(served: Served, pooling: Any) -> None:
    for ids in prompts(4)[2:]:
        resolved = {
            "tail": LastTokens(3),
            "all": LastTokens(6),
            "end": PromptSpan(((len(ids) - 2, len(ids)),)),
            "thirds": PromptSpan(tuple((place, place + 1) for place in range(1, len(ids), 3))),
            "middle": PromptSpan(((4, 15),)),
        }
        asked = {name: TokenMask("mask") if isinstance(span, PromptSpan) else span for name, span in resolved.items()}
        spec = HiddenSpec(("prompt", "response"), pooling, layers=(0, -1), spans=asked)
        ask(served, spec, [ids], spans=resolved)
        ask(served, replace(spec, segments=()), [ids], spans=resolved)


@pytest.mark.parametrize("stage", STAGES)
def test_logits(served: Served, stage: Any) -> None:
    """All columns of the vocabulary are there and none of its padding, also where only its end is allowed."""
    vocab_size = served.server.info.vocab_size
    selections: list[dict[str, Any]] = [{"full": True}, {"top_k": 5}, {"token_ids": (vocab_size - 1, 0, 700)}]
    constraints = [(), (ActionMask((5, vocab_size - 1, vocab_size - 2)),), (DisallowedTokens(range(vocab_size - 3)),)]
    requests = [
        Request(
            tuple(ids),
            {"max_new_tokens": 6, "temperature": (1.0, 0.7, 0.0)[index % 3]},
            logits=LogitsSpec(**selection, stage=stage, segments=("full",)),
            constraints=constraints[(index + row) % 3],
        )
        for row, ids in enumerate(prompts(6))
        for index, selection in enumerate(selections)
    ]
    for _ in range(2):
        for request, completion in zip(requests, served.server.generate(requests), strict=True):
            assert_choices(request, completion, served.model_dir)


def test_a_prompt_alone(served: Served) -> None:
    for pooling in POOLINGS:
        for spec in (HiddenSpec(("prompt",), pooling), HiddenSpec(("prompt",), pooling, (1, -1), tokens=True)):
            completions = ask(served, spec, prompts(5), sampling={"max_new_tokens": 0})
            assert all(completion.response_ids == () and completion.text == "" for completion in completions)


def test_a_prompt_alone_is_one_prefill_and_always_the_same(served: Served) -> None:
    request = Request(tuple(prompt_of(40, 8)), {"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",)))
    first, second = served.server.generate([request]) + served.server.generate([request])
    torch.testing.assert_close(first.hidden["prompt"].vector, second.hidden["prompt"].vector, rtol=1e-6, atol=1e-6)


# --- logits from the states -----------------------------------------------------------------------------------------

LOGITS_ATOL = 1e-3
# Plain, scaled, untied, softcapped. The fifth's vocabulary is not its tokenizer's, which a policy refuses.
of_heads = pytest.mark.parametrize("served", ["llama", "granite", "qwen3", "gemma3"], indirect=True)


class Case(NamedTuple):
    policy: SGLangHiddenWrapper
    model_dir: str


@pytest.fixture
def case(served: Served, tokenizer: PreTrainedTokenizerBase) -> Case:
    policy = make_policy(served.server, tokenizer, temperature=1.0, max_new_tokens=12)
    states = HiddenSpec(("prompt", "response", "full"), tokens=True)
    return Case(policy.get_new_version(hidden=states), served.model_dir)


@torch.inference_mode()
def hugging_face(model_dir: str, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = hf_oracle.load(model_dir)(torch.tensor([ids])).logits[0]
    return logits


def generated(case: Case) -> TensorDictBase:
    return case.policy(tokens_input([prompt_of(n, seed=5000 + n) for n in (1, 20, CHUNKED_PREFILL_SIZE + 9)]))


def of(out: TensorDictBase, name: str, segment: str) -> list[torch.Tensor]:
    found: list[torch.Tensor] = out.get((name, segment), as_list=True)
    return found


@of_heads
@torch.no_grad()
def test_logits_of_every_segment_are_hugging_faces(case: Case) -> None:
    out = generated(case)
    model = hf_oracle.load(case.model_dir)
    logits = {
        segment: logits_from_hidden(of(out, "token_hidden_states", segment), model)
        for segment in ("prompt", "response", "full")
    }
    for row, ids in enumerate(of(out, "tokens", "full")):
        expected_NV = hugging_face(case.model_dir, ids.tolist())[:-1]
        num_prompt = len(of(out, "tokens", "prompt")[row])
        for segment, rows_NV in (
            ("full", expected_NV),
            ("prompt", expected_NV[:num_prompt]),
            ("response", expected_NV[num_prompt - 1 :]),
        ):
            assert logits[segment][row].dtype == torch.float32
            torch.testing.assert_close(logits[segment][row], rows_NV, atol=LOGITS_ATOL, rtol=0)


@of_heads
@torch.no_grad()
def test_the_sampled_log_probs_agree(case: Case) -> None:
    out = generated(case)
    model = hf_oracle.load(case.model_dir)
    tokens, log_probs = of(out, "tokens", "response"), of(out, "log_probs", "response")
    states = of(out, "token_hidden_states", "response")
    version = case.policy.model.info.weight_version
    logits = logits_from_hidden(
        states, model, tokens=tokens, log_probs=log_probs, weight_version=out["weight_version"], head_version=version
    )
    assert [row.shape[0] for row in logits] == [len(row) for row in tokens]
    # The same of the whole sequence, where only the response's log-probs were measured.
    logits_from_hidden(
        of(out, "token_hidden_states", "full"),
        model,
        tokens=[row[1:] for row in of(out, "tokens", "full")],
        log_probs=[row[1:] for row in of(out, "log_probs", "full")],
    )
    # Off by one token, and of another temperature.
    with pytest.raises(AlignmentError, match="row 0, token "):
        logits_from_hidden(states, model, tokens=tokens, log_probs=[row.roll(1) for row in log_probs])
    cooler = case.policy(tokens_input([prompt_of(20, seed=5020)]), temperature=0.5)
    with pytest.raises(AlignmentError, match="row 0, token "):
        logits_from_hidden(
            of(cooler, "token_hidden_states", "response"),
            model,
            tokens=of(cooler, "tokens", "response"),
            log_probs=of(cooler, "log_probs", "response"),
        )
    with pytest.raises(WeightsError, match=f"weight version '{version}' and the head of 'next'"):
        logits_from_hidden(states, model, weight_version=out["weight_version"], head_version="next")


@of_heads
@torch.no_grad()
def test_a_scored_sequence_agrees(case: Case) -> None:
    ids = prompt_of(CHUNKED_PREFILL_SIZE + 5, seed=5100)
    scorer = case.policy.get_new_version(generate=False)
    scored = scorer(lazy_stack([TensorDict(tokens=Tokens(full=torch.tensor(ids)), batch_size=())]))[0]
    logits = logits_from_hidden(
        scored["token_hidden_states"].full[:-1],
        hf_oracle.load(case.model_dir),
        tokens=scored["tokens"].full[1:],
        log_probs=scored["log_probs"].full[1:],
    )
    torch.testing.assert_close(logits, hugging_face(case.model_dir, ids)[:-1], atol=LOGITS_ATOL, rtol=0)


@of_heads
@torch.no_grad()
def test_the_head_alone_does_where_nothing_follows_it(case: Case) -> None:
    """And of the others it does not, which the check finds: else these tests would not see a cap or a scale."""
    out = generated(case)
    model = hf_oracle.load(case.model_dir)
    head = model.get_output_embeddings()
    check = {"tokens": of(out, "tokens", "response"), "log_probs": of(out, "log_probs", "response")}
    states = of(out, "token_hidden_states", "response")
    if {"final_logit_softcapping", "logits_scaling"} & model.config.to_dict().keys():
        with pytest.raises(AlignmentError):
            logits_from_hidden(states, head, **check)
    else:
        logits_from_hidden(states, head, **check)
        logits_from_hidden(states, head.weight, **check)
