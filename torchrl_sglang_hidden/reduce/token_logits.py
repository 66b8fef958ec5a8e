"""What is done to logits and kept of them, for one request: pure torch, without SGLang.

Knows nothing of batches, wires or TensorDicts. Rows stand at the token that is drawn from them, as log-probs do. Which
rows a forward step must bring is planned before it is computed (`RequestLogits.plan_given`); what was cut from them is
added afterwards (`add`, `add_given`), in order, so that a gap leaves the count short.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, MAX_ANSWER_BYTES, TokenLogits
from torchrl_sglang_hidden.spec.constraints import ConstraintStep, LogitConstraint, TemperatureScale, TokenConstraint
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["Choosing", "FoundLogits", "RequestLogits", "WantedLogits", "constrain", "cut", "on_device"]


Kind = TypeVar("Kind", bound=LogitConstraint)


@dataclass(frozen=True, slots=True)
class WantedLogits:
    """What one request wants of logits.

    Args:
        spec: which come back; None for none.
        constraints: what changes them, in the order given.
        given: the first prompt token whose row is wanted, at least 1; None for none.
        scored: whether the log-probs of the prompt's tokens from ``given`` on are wanted.
        responses: parts of the prompt that constraints act on as if they were being sampled.
        response_limit: most tokens of the response, or of each of those.
    """

    spec: LogitsSpec | None = None
    constraints: tuple[LogitConstraint, ...] = ()
    given: int | None = None
    scored: bool = False
    responses: tuple[tuple[int, int], ...] = ()
    response_limit: int = DEFAULT_NEW_TOKENS

    @property
    def constrains(self) -> bool:
        """Whether constraints act on the tokens that are sampled: of a scored prompt they act on its responses."""
        return bool(self.constraints) and not self.scored

    @property
    def chooses(self) -> bool:
        """Whether anything is wanted of the tokens that are sampled."""
        return self.constrains or (self.spec is not None and self.spec.of_response)


@dataclass(frozen=True, slots=True)
class FoundLogits:
    """What came of one request's logits.

    Args:
        response: of the sampled tokens, or None.
        given: of the prompt's, or None.
        log_probs_N: of the prompt's tokens from `WantedLogits.given` on, float32; or None.
        constrained: of how many sampled tokens the constraints were looked at.
        fault: why the constraints could not be kept; or empty.
        refused: why logits could not be had; or empty.
    """

    response: TokenLogits | None = None
    given: TokenLogits | None = None
    log_probs_N: torch.Tensor | None = None
    constrained: int = 0
    fault: str = ""
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Choosing:
    """One token that is to be chosen, or was: where the constraints of its request stand.

    Args:
        one: the request's.
        index: of the token in its response, from 0.
        max_new_tokens: most tokens of that response.
        response_ids: makes int64 ``[index]``, the ids before it, on the logits' device.
        start: where that response starts in the request's ids; None for behind them.
    """

    one: RequestLogits
    index: int
    max_new_tokens: int
    response_ids: Callable[[], torch.Tensor] = field(repr=False)
    start: int | None = None


class RequestLogits:
    """The logits of one request while it is computed.

    Args:
        wanted: what it wants.
        prompt_ids: its P ids; P may be all that is read of them.

    Attributes:
        refused: why logits could not be had; or empty.
    """

    def __init__(self, wanted: WantedLogits, prompt_ids: Sequence[int]) -> None:
        self.wanted = wanted
        self.prompt_ids = prompt_ids
        self.refused = ""
        self._faults: list[tuple[int | None, str]] = []
        # By what they do: a user's subclass of a mask may change logits in a way of its own.
        self._own: list[LogitConstraint] = []
        self._temperatures: list[TemperatureScale] = []
        self._masks: list[TokenConstraint] = []
        for one in wanted.constraints:
            if isinstance(one, TemperatureScale) and type(one).apply is TemperatureScale.apply:
                self._temperatures.append(one)
            elif isinstance(one, TokenConstraint) and type(one).apply is TokenConstraint.apply:
                self._masks.append(one)
            else:
                self._own.append(one)
        self._bytes = 0
        self._combined: dict[tuple[int, ...], torch.Tensor] = {}
        self._constrained = 0
        self._rows: list[TokenLogits] = []
        self._given_rows: list[TokenLogits] = []
        self._log_probs: list[torch.Tensor] = []
        # Nothing of the prompt is waited for where nothing of it is wanted.
        self._done = len(prompt_ids) if wanted.given is None else wanted.given
        self._planned = self._done

    @property
    def reads_response(self) -> bool:
        """Whether a constraint may read the ids before the token that is chosen."""
        return bool(self._own)

    # --- the prompt --------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Plans from what has arrived, after the request went back into the queue."""
        self._planned = self._done

    @property
    def first_needed(self) -> int | None:
        """The first position that must be computed for a row that is still to come; None where there is none."""
        return self._done - 1 if self._done < len(self.prompt_ids) else None

    def plan_given(self, start: int, stop: int) -> tuple[int, int] | None:
        """Notes the prompt tokens whose rows the positions ``start … stop-1`` bring, as ``(first, behind the last)``.

        None where they bring none, or not the next one.
        """
        last = min(stop + 1, len(self.prompt_ids))
        if start > self._planned - 1 or last <= self._planned:
            return None
        first, self._planned = self._planned, last
        return first, last

    def place_of(self, token: int) -> tuple[int, int] | None:
        """The part that constraints act on with prompt token ``token`` in it, as ``(start, stop)``; or None."""
        return next(((start, stop) for start, stop in self.wanted.responses if start <= token < stop), None)

    def add_given(self, first: int, rows: TokenLogits | None, log_probs_N: torch.Tensor | None, count: int) -> None:
        """Adds what the positions before the prompt tokens ``first … first+count-1`` brought."""
        if first != self._done:
            return
        self._keep(self._given_rows, rows)
        if log_probs_N is not None:
            self._log_probs.append(log_probs_N)
        self._done += count

    # --- the response ------------------------------------------------------------------------------------------------

    def add(self, index: int, row: TokenLogits | None) -> None:
        """Adds what response token ``index`` was drawn from, ``[1, C]``."""
        if index != self._constrained:
            return
        self._constrained += 1
        self._keep(self._rows, row)

    def _keep(self, rows: list[TokenLogits], row: TokenLogits | None) -> None:
        if row is None or self.refused:
            return
        self._bytes += row.nbytes
        if self._bytes > MAX_ANSWER_BYTES:
            # Clients of this package ask for less; others must not fill the server's memory.
            self.refused = (
                f"the logits are over {MAX_ANSWER_BYTES // 2**20} MiB for one request; ask for fewer tokens or columns"
            )
            self._rows, self._given_rows = [], []
            return
        rows.append(row)

    # --- constraints -------------------------------------------------------------------------------------------------

    def fail(self, fault: str, index: int | None) -> None:
        """Notes why the constraints could not be kept.

        Args:
            fault: in words.
            index: the response's token; None for one of the prompt. Under overlap scheduling a token behind the last
                one is chosen too, and thrown away: what fails there is nobody's fault.
        """
        self._faults.append((index, fault))

    def apply_own(self, logits_V: torch.Tensor, step: Choosing) -> torch.Tensor:
        """The user's own constraints, which may be anybody's code."""
        acting = self._acting(self._own, step)
        if not acting:
            return logits_V
        at = ConstraintStep(step.index, step.max_new_tokens, self.prompt_ids[: step.start], step.response_ids())
        for constraint in acting:
            with self._guarded(constraint, step):
                changed_V = constraint.apply(logits_V.clone(), at)
                if not isinstance(changed_V, torch.Tensor) or changed_V.shape != logits_V.shape:
                    raise TypeError(f"expected logits of shape {tuple(logits_V.shape)}, got {changed_V!r:.80}")
                logits_V = changed_V.to(logits_V)
        return logits_V

    def _acting(self, constraints: Sequence[Kind], step: Choosing) -> list[Kind]:
        """Those that act on a token: `acts_on` may be anybody's code too."""
        acting: list[Kind] = []
        for one in constraints:
            with self._guarded(one, step):
                if one.acts_on(step.index):
                    acting.append(one)
        return acting

    @contextmanager
    def _guarded(self, constraint: LogitConstraint, step: Choosing) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  what it raises would end the scheduler, and everybody's requests
            fault = f"{constraint.name} failed at token {step.index} of the response: {error!r}"
            self.fail(fault, step.index if step.start is None else None)

    def temperature(self, step: Choosing) -> float:
        """What the logits of a token are divided by."""
        product = 1.0
        for one in self._acting(self._temperatures, step):
            with self._guarded(one, step):
                product *= float(one.at(step.index, step.max_new_tokens))
        return product

    def mask(self, step: Choosing, vocab_size: int, device: torch.device) -> torch.Tensor | None:
        """What all masks allow for a token, bool ``[V]``; None for everything."""
        acting = self._acting(self._masks, step)
        if not acting:
            return None
        key = tuple(map(id, acting))
        if key not in self._combined:
            allowed_V = torch.ones(vocab_size, dtype=torch.bool)
            for one in acting:
                with self._guarded(one, step):
                    allowed_V &= one.allowed(vocab_size)
            self._combined[key] = allowed_V.to(device)
        return self._combined[key]

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> FoundLogits:
        """What came of it."""
        return FoundLogits(
            response=_joined(self._rows),
            given=_joined(self._given_rows),
            log_probs_N=torch.cat(self._log_probs) if self._log_probs else None,
            constrained=self._constrained,
            fault=next((fault for at, fault in self._faults if at is None or at < self._constrained), ""),
            refused=self.refused,
        )


def cut(logits_NV: torch.Tensor, spec: LogitsSpec) -> TokenLogits:
    """The columns that are asked for, copied: ``[N, C]`` in the dtype asked for."""
    if spec.top_k is not None:
        values_NC, ids_NC = logits_NV.float().topk(spec.top_k, dim=-1)
        return TokenLogits(values_NC.to(spec.dtype), ids_NC)
    if spec.token_ids is not None:
        return TokenLogits(logits_NV[:, _columns(spec.token_ids, logits_NV.device)].to(spec.dtype), None)
    return TokenLogits(logits_NV.to(spec.dtype, copy=True), None)


def constrain(logits_NV: torch.Tensor, steps: Sequence[Choosing]) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes the logits of N tokens as their requests' constraints say.

    Args:
        logits_NV: not written to.
        steps: one for each row.

    Returns:
        The changed logits, and bool ``[N]``: where something can be chosen. A row where nothing can is as it was: a
        probability of nothing would end the scheduler.
    """
    rows = list(logits_NV)
    own = [step.one.apply_own(row_V, step) for row_V, step in zip(rows, steps, strict=True)]
    changed_NV = torch.stack(own) if any(a is not b for a, b in zip(own, rows, strict=True)) else logits_NV
    temperatures = [step.one.temperature(step) for step in steps]
    if any(temperature != 1 for temperature in temperatures):
        changed_NV = changed_NV / on_device(temperatures, logits_NV.device).to(logits_NV.dtype)[:, None]
    masks = [step.one.mask(step, logits_NV.shape[1], logits_NV.device) for step in steps]
    if any(mask_V is not None for mask_V in masks):
        every_V = torch.ones(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
        allowed_NV = torch.stack([every_V if mask_V is None else mask_V for mask_V in masks])
        changed_NV = changed_NV.masked_fill(~allowed_NV, -math.inf)
    alive_N = changed_NV.amax(-1).isfinite()
    return torch.where(alive_N[:, None], changed_NV, logits_NV), alive_N


def on_device(values: Sequence[int] | Sequence[float], device: torch.device) -> torch.Tensor:
    """A tensor of a few numbers, without waiting for what the device has to do before."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def _columns(token_ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(token_ids, device=device)


def _joined(rows: Sequence[TokenLogits]) -> TokenLogits | None:
    if not rows:
        return None
    ids = [row.token_ids_NC for row in rows if row.token_ids_NC is not None]
    return TokenLogits(torch.cat([row.values_NC for row in rows]), torch.cat(ids) if ids else None)
