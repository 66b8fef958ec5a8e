"""Entropies of sampled tokens in the server half: exact, beside constraints and logits, in few operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import Operations

from torchrl_sglang_hidden.reduce.entropy import entropy_rows
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import next_tokens
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.token_rows import SamplingRow
from torchrl_sglang_hidden.spec.constraints import ActionMask
from torchrl_sglang_hidden.spec.logits import LogitsSpec

V, PADDING = 11, 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def reference(logits_RV: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits_RV.double()).entropy().float()


def step_of(*ones: RequestLogits | None, index: int = 0) -> StepLogits:
    rows = [SamplingRow(row, row, index, one, 9, ()) for row, one in enumerate(ones) if one is not None]
    return StepLogits(tuple(rows), (), tuple(ones), V, len(ones))


def consume(step: StepLogits, index: int = 0, skipped: tuple[int, ...] = ()) -> None:
    commits = [None if row in skipped else SimpleNamespace(output_index=index) for row in range(len(step.reqs))]
    step.taken().copy_to_host(torch.clone).consume(SimpleNamespace(reqs=list(step.reqs)), commits)


def asking(*constraints: Any, spec: LogitsSpec | None = None, entropy: bool = True) -> RequestLogits:
    return RequestLogits(WantedLogits(spec, constraints, entropy=entropy), (1, 2, 3))


@pytest.mark.parametrize("temperature", [None, 1.0, 0.3, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_equal_the_formula(temperature: float | None, dtype: torch.dtype) -> None:
    logits_BV = numbers(4, V + PADDING).to(dtype)
    logits_BV[2, 3:9] = -torch.inf
    logits_BV[3, 1:] = -torch.inf
    for rows in ((0, 1, 2, 3), (1, 3)):
        given = None if temperature is None else torch.full((4, 1), temperature)
        found_R1 = entropy_rows(logits_BV, rows, V, given)
        expected_R = reference(logits_BV[list(rows), :V].float() / (temperature or 1.0))
        assert found_R1.dtype == torch.float32
        torch.testing.assert_close(found_R1[:, 0], expected_R, atol=1e-5, rtol=0)
        assert found_R1[-1, 0] == 0


def test_a_large_vocabulary_loses_nothing() -> None:
    logits_BV = numbers(2, 150_000, seed=1)
    torch.testing.assert_close(entropy_rows(logits_BV, (0, 1), 150_000)[:, 0], reference(logits_BV), atol=1e-4, rtol=0)
    flat = entropy_rows(torch.zeros(1, 150_000), (0,), 150_000)
    assert float(flat) == pytest.approx(float(torch.tensor(150_000.0).log()), abs=1e-4)


def test_rows_of_a_response_beside_logits_and_constraints() -> None:
    plain, masked, other = asking(), asking(ActionMask((2, 5)), spec=LogitsSpec(top_k=2)), asking(entropy=False)
    expected: list[list[torch.Tensor]] = [[], []]
    for index in range(3):
        step = step_of(plain, masked, None, index=index)
        logits_BV = numbers(3, V + PADDING, seed=index)
        expected[0].append(reference(logits_BV[0, :V] / 0.5))
        expected[1].append(reference(logits_BV[1, [2, 5]] / 0.5))
        step.take_raw(logits_BV)
        step.constrain(logits_BV, torch.full((3, 1), 0.5))
        consume(step, index)
    for one, entropies in zip((plain, masked), expected, strict=True):
        found_T = one.finish().entropy_T
        assert found_T is not None
        torch.testing.assert_close(found_T, torch.stack(entropies), atol=1e-5, rtol=0)
    logits = masked.finish().response
    assert logits is not None
    assert logits.values_NC.shape == (3, 2)
    assert (other.wants_sampled, other.finish().entropy_T) == (False, None)


def test_a_token_that_is_not_committed_has_none() -> None:
    one, two = asking(), asking()
    step = step_of(one, two)
    step.constrain(numbers(2, V), None)
    consume(step, skipped=(0,))
    assert one.finish().entropy_T is None
    assert len(two.finish().entropy_T) == 1


def test_a_rank_that_does_not_answer_keeps_none() -> None:
    quiet = RequestLogits(WantedLogits(entropy=True), (1,), kept=False)
    assert (quiet.wants_entropy, quiet.wants_sampled) == (False, False)


def test_no_memory_costs_the_entropies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    one = asking()
    step = step_of(one)
    monkeypatch.setattr(next_tokens, "entropy_rows", fail)
    step.constrain(numbers(1, V), None)
    consume(step)
    found = one.finish()
    assert found.entropy_T is None
    assert "no memory left for the entropies of its tokens" in found.refused


def test_the_number_of_requests_does_not_count() -> None:
    def operations(num_requests: int) -> int:
        ones = [asking() for _ in range(num_requests)]
        counts = []
        for index in range(2):
            step, logits_BV = step_of(*ones, index=index), numbers(num_requests, V)
            with Operations() as count:
                step.constrain(logits_BV, torch.ones(num_requests, 1))
                consume(step, index)
            counts.append(count.count)
        return counts[1]

    assert operations(8) == operations(256) <= 14
