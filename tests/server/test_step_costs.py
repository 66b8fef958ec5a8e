"""A step costs as many tensor operations for 256 requests as for 8, and none of them waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_sglang_hidden.reduce import device as device_module
from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server import prompt_logits
from torchrl_sglang_hidden.server.next_tokens import StepLogits
from torchrl_sglang_hidden.server.token_rows import PromptPart, SamplingRow
from torchrl_sglang_hidden.spec.constraints import ActionMask, DisallowedTokens, TemperatureScale
from torchrl_sglang_hidden.spec.logits import LogitsSpec

V = 40
PROCESSED = {"stage": "processed", "segments": ("full",)}
# Masks of equal text are one object in the server.
MASK, BEGINNING = ActionMask((1, 2, 3)), [ActionMask((n, 1), positions=(n,)) for n in range(3)]
# What each of the requests wants, by its number.
WANTED: dict[str, Callable[[int], WantedLogits]] = {
    "one mask": lambda n: WantedLogits(constraints=(MASK,)),
    "masks of their own": lambda n: WantedLogits(constraints=(ActionMask((n % V, 1)), DisallowedTokens((n % 7 + 5,)))),
    "masks that begin and end": lambda n: WantedLogits(constraints=(BEGINNING[n % 3],)),
    "temperatures": lambda n: WantedLogits(constraints=(TemperatureScale([1.0 + n / 99, 2.0]),)),
    "top-k": lambda n: WantedLogits(LogitsSpec(top_k=4)),
    "token ids": lambda n: WantedLogits(LogitsSpec(token_ids=(3, 1, 2))),
    "token ids of their own": lambda n: WantedLogits(LogitsSpec(token_ids=(n % V, (n + 1) % V))),
    "all logits": lambda n: WantedLogits(LogitsSpec(full=True)),
    "all of it": lambda n: WantedLogits(
        LogitsSpec(token_ids=(3, 1, 2), **PROCESSED), (MASK, TemperatureScale(2.0)), prompt_from=1
    ),
    "scores": lambda n: WantedLogits(LogitsSpec(top_k=2, segments=("full",)), (MASK,), 1, True, ((1, 3),)),
}


class Count(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def steps(requests: Sequence[RequestLogits], index: int) -> tuple[StepLogits, Any, list[Any]]:
    """Return a step that samples token ``index`` of each request, its batch, and what SGLang commits."""
    reqs = tuple(object() for _ in requests)
    rows = tuple(SamplingRow(n, n, index, request, 9, ()) for n, request in enumerate(requests))
    step = StepLogits(rows, (), reqs, V, len(requests))
    return step, SimpleNamespace(reqs=list(reqs)), [SimpleNamespace(output_index=index)] * len(requests)


def decode(requests: Sequence[RequestLogits], index: int) -> None:
    step, batch, commits = steps(requests, index)
    logits_BV = torch.zeros(len(requests), V)
    step.take_raw(logits_BV)
    step.constrain(logits_BV, torch.ones(len(requests), 1))
    step.taken().copy_to_host(torch.clone).consume(batch, commits)


def prefill(requests: Sequence[RequestLogits]) -> list[int]:
    """Compute three tokens of each request's prompt; return the sizes of what the head got."""
    sizes: list[int] = []

    def head(states_ND: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states_ND))
        return states_ND

    parts = tuple(PromptPart(n, 3 * n, *request.plan_prompt(0, 3), request) for n, request in enumerate(requests))
    step = StepLogits((), parts, tuple(object() for _ in requests), V, 3 * len(requests))
    step.take_prompts(torch.zeros(3 * len(requests), V), head)
    step.taken().copy_to_host(torch.clone).consume(SimpleNamespace(reqs=[]), [])
    return sizes


def make(kind: str, count: int) -> list[RequestLogits]:
    return [RequestLogits(WANTED[kind](n), [1, 2, 3]) for n in range(count)]


def operations(kind: str, count: int, warm: int) -> list[str]:
    """Return the operations of a step in the middle of the responses."""
    requests = make(kind, count)
    for index in range(warm):
        decode(requests, index)
    counting = Count()
    with counting:
        decode(requests, warm)
    assert all(request.finish().constrained == (0 if request.wanted.scored else warm + 1) for request in requests)
    return counting.names


@pytest.mark.parametrize("kind", [kind for kind in WANTED if kind != "scores"])
@pytest.mark.parametrize("warm", [1, 3])
def test_a_decode_step_costs_the_same_for_any_number_of_rows(kind: str, warm: int) -> None:
    operations(kind, 3, warm)  # masks that several requests have are made once
    few, many = operations(kind, 8, warm), operations(kind, 256, warm)
    assert few == many
    assert 0 < len(few) < 40


def test_masks_of_the_same_rows_are_put_together_once() -> None:
    """The matrix of 256 masks of 150 000 tokens is 38 MB."""
    first, later = operations("masks of their own", 8, 0), operations("masks of their own", 8, 3)
    assert ["aten.stack.default" in names for names in (first, later)] == [True, False]


@pytest.mark.parametrize("kind", ["all of it", "scores"])
def test_a_prefill_step_costs_the_same_for_any_number_of_prompts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logits, "MAX_PIECE_ROWS", 10**6)
    names = []
    for count in (8, 256):
        counting, requests = Count(), make(kind, count)
        prefill(make(kind, 2))  # what is kept of masks and column ids
        with counting:
            sizes = prefill(requests)
        assert sizes == [2 * count], "the head is read once"
        assert all(len(request.finish().prompt.values_NC) == 2 for request in requests)
        names.append(counting.names)
    assert names[0] == names[1]


def test_the_head_is_called_for_rows_not_for_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logits, "PIECE_BYTES", 4 * V * 100)
    assert prefill(make("scores", 256)) == [100, 100, 100, 100, 100, 12]


class NoCopies(TorchDispatchMode):
    """Refuses an operation on a device that begins or ends on the host, outside of the one helper."""

    helping = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in [*_flat(args), *_flat(kwargs or {}), *_flat(found)] if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in tensors}
        assert self.helping or kinds != {"cpu", "meta"}, f"{func} copies between host and device"
        return found


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    return [inner for value in values for inner in _flat(value)] if isinstance(values, (list, tuple)) else [values]


@pytest.mark.parametrize("kind", WANTED)
def test_no_step_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device "meta" an operation that needs a value, or tensors of host and device at once, fails."""
    mode, plain = NoCopies(), device_module.on_device

    def helping(*args: Any) -> torch.Tensor:
        mode.helping = True
        try:
            return plain(*args)
        finally:
            mode.helping = False

    for module in ("columns", "constraining", "masks_on_device", "ids_on_device"):
        monkeypatch.setattr(f"torchrl_sglang_hidden.reduce.{module}.on_device", helping)
    for module in ("next_tokens", "prompt_logits"):
        monkeypatch.setattr(f"torchrl_sglang_hidden.server.{module}.on_device", helping)
    requests = make(kind, 5)
    step, _, _ = steps(requests, 1)
    logits_BV = torch.zeros(7, V + 2, device="meta")
    parts = tuple(PromptPart(n, 3 * n, 1, 3, one) for n, one in enumerate(requests) if one.wanted.prompt_from)
    prompts = StepLogits((), parts, step.reqs, V, 15)
    with mode:
        step.take_raw(logits_BV)
        step.constrain(logits_BV, torch.ones(7, 1, device="meta"))
        prompts.take_prompts(torch.zeros(15, V + 2, device="meta"), lambda rows: rows)
    assert len(prompts.taken().prompts) == (1 if parts else 0)
