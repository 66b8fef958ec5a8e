"""What a policy writes of its sampling beside log-probs: entropies, supports, routed experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import policy_batches
from helpers.fake_engine import NUM_LAYERS, PAD_ID, RecordingEngine, experts_ND, logits_V, make_info
from helpers.policy_batches import TOKENIZER, batch_of, flat

from torchrl_sglang_hidden import (
    CapabilityError,
    HiddenSpec,
    InputError,
    InputTypeError,
    SamplingRecords,
    SGLangHiddenWrapper,
)
from torchrl_sglang_hidden.errors import RequestAbortedError
from torchrl_sglang_hidden.records import Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests

ALL = {"return_entropy": True, "return_sampling_mask": True, "return_routed_experts": True, "top_k": 4}


def response_to(prompt_ids: Sequence[int]) -> list[int]:
    """Return four, two or one tokens for the prompts of `batch_of`."""
    return [7 + len(prompt_ids) + i for i in range(1 + len(prompt_ids) % 4)]


def make(mode: str, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = RecordingEngine(tokenizer=TOKENIZER, respond=response_to)
    return policy_batches.make(mode, engine=engine, **options)


def ids_of(row: Any, name: str) -> list[int]:
    ids: list[int] = row.get(("tokens", name)).tolist()
    return ids


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropies_are_those_of_the_distribution_that_was_drawn_from(temperature: float) -> None:
    policy, _ = make("tokens", generate_kwargs={"return_entropy": True, "temperature": temperature})
    assert "sampling" in policy.out_keys
    for row in flat(policy(batch_of("tokens"))):
        ids, response = ids_of(row, "prompt"), ids_of(row, "response")
        expected, preferred = [], len(response_to(ids))
        for place, token in enumerate(response):
            logits = logits_V(ids)
            if place < preferred:
                logits[token] = 20.0  # the fake engine's way to choose it
            expected.append(torch.distributions.Categorical(logits=logits / temperature).entropy())
            ids.append(token)
        found_T = row["sampling"].entropy
        torch.testing.assert_close(found_T, torch.stack(expected), atol=1e-5, rtol=0)
        assert found_T.dtype == torch.float32


@pytest.mark.parametrize("mode", ["tokens", "text", "history"])
def test_supports_and_behaviour_log_probs(mode: str) -> None:
    policy, engine = make(mode, generate_kwargs={"return_sampling_mask": True, "top_k": 4})
    out = policy(batch_of(mode))
    assert engine.payloads[0]["sampling_logprobs_mode"] == ["support"] * 3
    width = max(1 + token % 3 for row in flat(out) for token in ids_of(row, "response"))
    for row in flat(out):
        sampling, response = row["sampling"], ids_of(row, "response")
        assert sampling.entropy is None
        assert sampling.token_ids.shape == sampling.token_log_probs.shape == (len(response), width)
        for token, ids_S, log_probs_S, own in zip(
            response, sampling.token_ids, sampling.token_log_probs, sampling.log_probs, strict=True
        ):
            count = 1 + token % 3
            assert ids_S.tolist() == [*range(token, token + count), *[-1] * (width - count)]
            assert log_probs_S.tolist() == pytest.approx([-math.log(count)] * count + [-math.inf] * (width - count))
            assert own == log_probs_S[0]


@pytest.mark.parametrize("padded", [False, True])
def test_routed_experts_are_aligned_as_token_states(padded: bool) -> None:
    policy, _ = make("tokens", generate_kwargs={"return_routed_experts": True}, pad_output=padded)
    for row in flat(policy(batch_of("tokens"))):
        found, real_N = row["routed_experts"], row["masks"].all_attention_mask
        prompt, response = ids_of(row, "prompt"), ids_of(row, "response")
        left = int(real_N.int().argmax()) if padded else 0
        full = row["tokens"].full[real_N].tolist()
        num_prompt = len(prompt) - left
        own = experts_ND(full[:-1])
        assert found.full.dtype == torch.int32
        assert found.full[left : left + len(own)].equal(own)
        assert found.prompt[left:].equal(own[:num_prompt])
        assert found.response[: len(full) - num_prompt].equal(own[num_prompt - 1 :])
        assert len(found.full) == len(prompt) + len(response) - 1
        assert (found.full[:left] == -1).all()
        assert (found.full[left + len(own) :] == -1).all()


def test_padded_records_are_dense() -> None:
    policy, _ = make("tokens", generate_kwargs=ALL, pad_output=True, num_samples=2, inplace=False)
    out = policy(batch_of("tokens"))
    sampling, responses = out["sampling"], out["tokens"].response
    pads = responses == PAD_ID
    assert sampling.entropy.shape == sampling.log_probs.shape == responses.shape
    assert sampling.token_ids.shape[:-1] == responses.shape
    assert out["routed_experts"].response.shape == (*responses.shape, NUM_LAYERS, 2)
    assert (sampling.token_ids[sampling.log_probs.isnan()] == -1).all()
    assert sampling.log_probs.isnan()[~pads].sum() == 0


def test_options_of_a_call_win() -> None:
    policy, engine = make("tokens")
    assert not {"sampling", "routed_experts"} & set(policy.out_keys)
    out = policy(batch_of("tokens"), **ALL)
    assert {"sampling", "routed_experts"} <= set(out.keys())
    assert engine.requests[0].records == SamplingRecords(True, True, True)
    policy(batch_of("tokens"))
    assert engine.requests[-1].records == SamplingRecords()
    assert not {"return_sampling_mask", "return_routed_experts"} & engine.payloads[-1].keys()


def test_a_prompt_that_is_only_read_has_experts_alone() -> None:
    policy, engine = make("tokens", generate_kwargs={**ALL, "max_new_tokens": 0}, hidden=HiddenSpec(("prompt",)))
    out = policy(batch_of("tokens"))
    assert engine.requests[0].records == SamplingRecords(routed_experts=True)
    assert out.get("sampling", None) is None
    for row in flat(out):
        assert row["routed_experts"].prompt.equal(experts_ND(ids_of(row, "prompt")))
        assert row["routed_experts"].response is None


def test_scoring_records_nothing() -> None:
    policy, engine = make("tokens", generate_kwargs=ALL)
    scorer = policy.get_new_version(generate=False, input_key=("tokens", "prompt"))
    assert not {"sampling", "routed_experts"} & set(scorer.out_keys)
    scorer(batch_of("tokens"))
    assert engine.requests[-1].records == SamplingRecords()
    with pytest.raises(InputError, match="leave return_entropy out of the call"):
        scorer(batch_of("tokens"), return_entropy=True)


@pytest.mark.parametrize("name", ["return_entropy", "return_sampling_mask", "return_routed_experts"])
def test_options_are_flags(name: str) -> None:
    with pytest.raises(InputTypeError, match=f"{name}='yes': expected True or False"):
        make("tokens", generate_kwargs={name: "yes"})


def test_keys_may_be_renamed_and_left_out() -> None:
    policy, _ = make("tokens", generate_kwargs=ALL, sampling_key=("a", "b"), routed_experts_key=None)
    out = policy(batch_of("tokens"))
    assert flat(out)[0]["a", "b"].entropy is not None
    assert out.get("routed_experts", None) is None


REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"entropy": True}, {}, {"pools_in_server": False}, CapabilityError, "return_entropy .*without the server half"),
    (
        {"routed_experts": True},
        {},
        {"returns_routed_experts": False},
        CapabilityError,
        "without --enable-return-routed-experts",
    ),
    ({"sampling_mask": True}, {"top_k": 4}, {"max_sampling_mask": 0}, CapabilityError, "does not give it.*launch"),
    ({"sampling_mask": True}, {}, {}, InputError, r"return_sampling_mask with top_k=-1: SGLang takes 1\.\.8; lower"),
    ({"sampling_mask": True}, {"top_k": 9}, {}, InputError, "top_k=9.*--sampling-mask-max-tokens"),
    (
        {"sampling_mask": True},
        {"top_k": 8, "processor": "{}"},
        {"takes_processors": True},
        InputError,
        "custom_logit_processor",
    ),
]


@pytest.mark.parametrize(("records", "sampling", "info", "error", "words"), REFUSED)
def test_records_that_cannot_be_had(records: Any, sampling: Any, info: Any, error: Any, words: str) -> None:
    sampling = dict(sampling)
    processor = sampling.pop("processor", None)
    one = Request((5, 6), sampling, records=SamplingRecords(**records), processor=processor)
    with pytest.raises(error, match=f"row 1: {words}|row 1: .*{words}"):
        check_requests([Request((5,)), one], make_info(**info))


@pytest.mark.parametrize("sampling", [{"top_k": 8}, {"top_k": 1}, {"temperature": 0.0}, {"temperature": 1e-7}])
def test_sampling_masks_at_their_limits(sampling: dict[str, Any]) -> None:
    check_requests([Request((5, 6), sampling, records=SamplingRecords(sampling_mask=True))], make_info())


def test_an_aborted_response_has_what_came() -> None:
    policy, engine = make("tokens", generate_kwargs=ALL)

    def abort(rows: list[dict[str, Any]]) -> None:
        meta = rows[1]["meta_info"]
        meta["finish_reason"] = {"type": "abort", "message": "no room"}
        for name in ("output_token_sampling_mask", "output_token_sampling_logprobs", "routed_experts"):
            del meta[name]

    engine.fault = abort
    with pytest.raises(RequestAbortedError, match="row 1") as caught:
        policy(batch_of("tokens"))
    aborted = caught.value.completions[1]
    assert aborted is not None
    assert (aborted.sampling_mask, aborted.routed_experts) == (None, None)
