"""An accelerator without memory for logits costs the requests that asked for them, and not the server."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden.reduce.token_logits import NextToken, RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import next_tokens, prompt_logits
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.token_rows import PromptPart, SamplingRow
from torchrl_sglang_hidden.spec.constraints import DisallowedTokens
from torchrl_sglang_hidden.spec.logits import LogitsSpec

V, INF = 6, float("inf")
REMEDY = "start the server with a lower mem_fraction_static"
DENY = (DisallowedTokens((2,)),)


def requests_of(count: int, wanted: WantedLogits) -> list[RequestLogits]:
    return [RequestLogits(wanted, (1, 2, 3)) for _ in range(count)]


def sampling(requests: Sequence[RequestLogits]) -> StepLogits:
    rows = tuple(SamplingRow(n, n, 0, request, 9, ()) for n, request in enumerate(requests))
    return StepLogits(rows, (), tuple(object() for _ in requests), V, len(requests))


def finish(step: StepLogits) -> None:
    commits = [SimpleNamespace(output_index=0)] * len(step.reqs)
    step.taken().copy_to_host(torch.clone).consume(SimpleNamespace(reqs=list(step.reqs)), commits)


@pytest.mark.parametrize("room", [4, 2, 1])
def test_constraints_are_applied_to_as_many_rows_as_there_is_room_for(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = next_tokens.constrain

    def constrain(rows_NV: torch.Tensor, tokens: Sequence[NextToken]) -> Any:
        if len(tokens) > room:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(tokens))
        return plain(rows_NV, tokens)

    monkeypatch.setattr(next_tokens, "constrain", constrain)
    requests = requests_of(7, WantedLogits(constraints=DENY))
    step, logits_BV = sampling(requests), torch.zeros(7, V)
    step.constrain(logits_BV, None)
    assert (max(sizes), sum(sizes)) == (min(room, 4), 7)
    assert logits_BV[:, 2].tolist() == [-INF] * 7
    finish(step)
    assert all((request.finish().constrained, request.finish().fault) == (1, "") for request in requests)


def test_a_rank_does_not_go_on_with_a_token_that_the_others_do_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank samples for itself. One that leaves a constraint out would sample another token, in silence."""

    def constrain(rows_NV: torch.Tensor, tokens: Sequence[NextToken]) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(next_tokens, "constrain", constrain)
    step = sampling(requests_of(2, WantedLogits(constraints=DENY)))
    step.collective = True
    with pytest.raises(torch.OutOfMemoryError):
        step.constrain(torch.zeros(2, V), None)


def test_a_constraint_that_cannot_be_applied_is_an_error_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = next_tokens.constrain
    poor, good = requests_of(1, WantedLogits(constraints=DENY))[0], requests_of(1, WantedLogits(constraints=DENY))[0]

    def constrain(rows_NV: torch.Tensor, tokens: Sequence[NextToken]) -> Any:
        if any(token.request is poor for token in tokens):
            raise torch.OutOfMemoryError("no memory")
        return plain(rows_NV, tokens)

    monkeypatch.setattr(next_tokens, "constrain", constrain)
    step, logits_BV = sampling([good, poor]), torch.zeros(2, V)
    step.constrain(logits_BV, None)
    assert logits_BV[:, 2].tolist() == [-INF, 0]
    finish(step)
    assert (good.finish().fault, good.finish().constrained) == ("", 1)
    assert "had no memory left for its constraints" in poor.finish().fault
    assert REMEDY in poor.finish().fault


def test_logits_that_cannot_be_copied_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = next_tokens.select_rows

    def select_rows(logits_BV: torch.Tensor, rows: Any, columns: Any, *more: Any) -> Any:
        if columns[0].kind == "full":
            raise torch.OutOfMemoryError("no memory")
        return plain(logits_BV, rows, columns, *more)

    monkeypatch.setattr(next_tokens, "select_rows", select_rows)
    poor, good = (requests_of(1, WantedLogits(spec))[0] for spec in (LogitsSpec(full=True), LogitsSpec(top_k=2)))
    step = sampling([poor, good])
    step.take_raw(torch.zeros(2, V))
    finish(step)
    assert (good.finish().refused, good.finish().response.values_NC.shape) == ("", (1, 2))
    assert (poor.finish().response, poor.finish().constrained) == (None, 1)
    assert REMEDY in poor.finish().refused


def prompts(requests: Sequence[RequestLogits]) -> StepLogits:
    parts = tuple(PromptPart(n, 3 * n, 1, 3, request) for n, request in enumerate(requests))
    return StepLogits((), parts, tuple(object() for _ in requests), V, 3 * len(requests))


PROMPT = WantedLogits(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1, scored=True)


@pytest.mark.parametrize("where", ["in the head", "behind it"])
def test_logits_of_prompts_that_do_not_fit_are_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one call of the head; the other calls are made all the same."""
    monkeypatch.setattr(prompt_logits, "PIECE_BYTES", 4 * V * 2)
    plain, calls = prompt_logits.prompt_logits_of, [0, 0]

    def failing(place: int) -> None:
        calls[place] += 1
        if calls[place] == 2:
            raise torch.OutOfMemoryError("no memory")

    def head(states_ND: torch.Tensor) -> torch.Tensor:
        failing(0) if where == "in the head" else None
        return states_ND

    def behind(*args: Any) -> Any:
        failing(1) if where == "behind it" else None
        return plain(*args)

    monkeypatch.setattr(next_tokens, "prompt_logits_of", behind)
    requests = requests_of(3, PROMPT)
    step = prompts(requests)
    step.take_prompts(torch.zeros(9, V), head)
    finish(step)
    assert [bool(request.finish().refused) for request in requests] == [False, True, False]
    assert REMEDY in requests[1].finish().refused
    assert [len(requests[n].finish().log_probs_N) for n in (0, 2)] == [2, 2]


def test_a_rank_without_memory_does_not_leave_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the head it goes on with the calls that the others make. In the head it cannot, and ends: that is seen."""
    monkeypatch.setattr(prompt_logits, "PIECE_BYTES", 4 * V * 2)
    calls: list[int] = []

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    def head(states_ND: torch.Tensor) -> torch.Tensor:
        calls.append(len(states_ND))
        return states_ND

    monkeypatch.setattr(next_tokens, "prompt_logits_of", no_memory)
    requests = requests_of(3, PROMPT)
    prompts(requests).take_prompts(torch.zeros(9, V), head, collective=True)
    assert (calls, [bool(request.refused) for request in requests]) == ([2, 2, 2], [True] * 3)
    with pytest.raises(torch.OutOfMemoryError):
        prompts(requests).take_prompts(torch.zeros(9, V), no_memory, collective=True)


def test_what_was_taken_is_not_kept_by_the_step() -> None:
    """SGLang keeps the step's object for two more steps, and what copies to the host does not keep the step."""
    spec = LogitsSpec(full=True, segments=("full",), stage="processed")
    requests = requests_of(2, WantedLogits(spec, DENY, prompt_from=1))
    step = sampling(requests)
    step.prompts = prompts(requests).prompts
    step.input_ids = torch.zeros(6)
    step.num_rows = 6
    step.take_prompts(torch.zeros(6, V), lambda rows: rows)
    step.constrain(torch.zeros(2, V), None)
    taken = step.taken()
    tensors = [
        taken.choosable_R, taken.sampled[0].logits.values_NC, taken.prompts[0].columns[0][1].values_NC,
    ]  # fmt: skip
    alive = [weakref.ref(tensor) for tensor in tensors]
    host = taken.copy_to_host(torch.clone)
    del taken, tensors
    assert [tensor() for tensor in alive] == [None, None, None]
    assert step.input_ids is None
    assert [len(group.logits.values_NC) for group in host.sampled] == [2]
