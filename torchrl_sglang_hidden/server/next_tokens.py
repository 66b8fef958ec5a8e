"""Constrains the next tokens of a forward step, and takes the logits that they are drawn from.

Knows SGLang's batches, samplers and auxiliary outputs by their shape only, and imports nothing of SGLang. Runs inside
the scheduler, where an exception ends the server.

One step's way: `Capture.plan_choices` notes, before the forward pass, which token of its response each request chooses;
`StepChoices.take_given` takes rows of the prompt as the head computes them; `take_raw` and `constrain` stand on the two
sides of what SGLang does to the logits before it samples; SGLang copies what was cut to the host with its other
results, and `HostLogits.consume` adds it to its request once the tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchrl_sglang_hidden.records import TokenLogits
from torchrl_sglang_hidden.reduce.token_logits import Choosing, RequestLogits, constrain, cut, on_device
from torchrl_sglang_hidden.spec.logits import LogitsSpec, Stage

__all__ = ["Choice", "DeviceLogits", "Given", "HostLogits", "StepChoices"]

# Rows of a prompt whose logits are there at the same time: over 150 000 tokens, 77 MB in float32.
PIECE = 128


@dataclass(frozen=True, slots=True)
class Choice:
    """A request that chooses a token in this step.

    Args:
        row: its index in the batch, and in the step's logits.
        last: the row of the step's inputs that its token is computed from.
        index: of the token in its response.
        logits: the request's.
        max_new_tokens: most tokens of its response.
        before: those of the ids before it that are on the host; the last may still be on its way.
    """

    row: int
    last: int
    index: int
    logits: RequestLogits
    max_new_tokens: int
    before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """Rows of a prompt that this step computes.

    Args:
        row: the request's index in the batch.
        offset: the row of the step's states that position 0 would have.
        first: the first prompt token whose row it is.
        stop: behind the last.
        logits: the request's.
    """

    row: int
    offset: int
    first: int
    stop: int
    logits: RequestLogits


@dataclass(frozen=True, slots=True)
class Cut:
    """Columns of some requests' logits, one row per request."""

    places: tuple[int, ...]
    rows: TokenLogits


@dataclass(frozen=True, slots=True)
class GivenRows:
    """What a piece of a prompt brought."""

    given: Given
    first: int
    count: int
    rows: TokenLogits | None
    log_probs_N: torch.Tensor | None
    alive_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class HostLogits:
    """One step's logits on the host, SGLang's ``HostAuxiliaryOutput``."""

    step: StepChoices
    cuts: tuple[Cut, ...]
    given: tuple[GivenRows, ...]
    alive: Mapping[int, torch.Tensor]

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Adds the rows to their requests. ``commits[i]`` is None when row i committed no token."""
        for piece in self.given:
            one = piece.given.logits
            if piece.alive_N is not None and not piece.alive_N.all():
                place = piece.first + int((~piece.alive_N).nonzero()[0])
                one.fail(_nothing_left(f"token {place} of the sequence", one), None)
            one.add_given(piece.first, piece.rows, piece.log_probs_N, piece.count)
        rows = {place: cut.rows for cut in self.cuts for place in cut.places}
        places = {place: n for cut in self.cuts for n, place in enumerate(cut.places)}
        for choice in self.step.choices:
            row = choice.row
            if row >= len(batch.reqs) or batch.reqs[row] is not self.step.reqs[row] or commits[row] is None:
                continue
            if row not in self.alive and choice.logits.wanted.constrains:
                continue  # a sampler that none of this went through: the count will tell
            if not self.alive.get(row, True):
                choice.logits.fail(_nothing_left(f"token {choice.index} of the response", choice.logits), choice.index)
            found = rows.get(row)
            if commits[row].output_index == choice.index:
                choice.logits.add(choice.index, None if found is None else _row_of(found, places[row]))


@dataclass(frozen=True, slots=True)
class DeviceLogits:
    """One step's logits on the device, SGLang's ``DeviceAuxiliaryOutput``."""

    step: StepChoices
    cuts: tuple[Cut, ...]
    given: tuple[GivenRows, ...]
    alive_places: tuple[int, ...]
    alive_R: torch.Tensor | None

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> HostLogits:
        """Starts the step's copies."""

        def rows(found: TokenLogits) -> TokenLogits:
            ids = found.token_ids_NC
            return TokenLogits(copy(found.values_NC), None if ids is None else copy(ids))

        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else copy(tensor)

        return HostLogits(
            self.step,
            tuple(Cut(one.places, rows(one.rows)) for one in self.cuts),
            tuple(
                GivenRows(
                    one.given,
                    one.first,
                    one.count,
                    None if one.rows is None else rows(one.rows),
                    maybe(one.log_probs_N),
                    maybe(one.alive_N),
                )
                for one in self.given
            ),
            {} if self.alive_R is None else dict(zip(self.alive_places, copy(self.alive_R), strict=True)),
        )


@dataclass(slots=True)
class StepChoices:
    """What is chosen in one forward step, by the requests that asked something of it.

    Args:
        choices: those that choose a token.
        given: rows of prompts.
        reqs: the batch's requests.
        vocab_size: V; the head may have more columns, as padding.
        num_rows: positions of the step.

    Attributes:
        input_ids: of the step: of a decoding request the id that was chosen before, wherever the host is.
    """

    choices: tuple[Choice, ...]
    given: tuple[Given, ...]
    reqs: tuple[Any, ...]
    vocab_size: int
    num_rows: int
    input_ids: torch.Tensor | None = None
    _cuts: list[Cut] = field(default_factory=list)
    _given_rows: list[GivenRows] = field(default_factory=list)
    _alive_places: tuple[int, ...] = ()
    _alive_R: torch.Tensor | None = None

    def take_raw(self, logits_BV: torch.Tensor) -> None:
        """Cuts what the head gave, before anything is done to it."""
        self._cut(logits_BV, "raw")

    def constrain(self, logits_BV: torch.Tensor, temperatures_B1: torch.Tensor | None) -> None:
        """Applies the constraints, in place, to logits that all of SGLang's own steps but the temperature have passed.

        Rows of requests without constraints are not written to.

        Args:
            logits_BV: of the step.
            temperatures_B1: what SGLang divides them by next, or None.
        """
        acting = [choice for choice in self.choices if choice.logits.wanted.constrains]
        if acting:
            rows_R = on_device([choice.row for choice in acting], logits_BV.device)
            steps = [self._choosing(choice) for choice in acting]
            changed_RV, alive_R = constrain(logits_BV[rows_R, : self.vocab_size], steps)
            logits_BV[rows_R, : self.vocab_size] = changed_RV
            if logits_BV.shape[1] > self.vocab_size:
                logits_BV[rows_R, self.vocab_size :] = float("-inf")
            self._alive_places, self._alive_R = tuple(choice.row for choice in acting), alive_R
        if any(choice.logits.wanted.spec is not None for choice in self.choices):
            self._cut(logits_BV, "processed", temperatures_B1)

    def take_given(self, states_ND: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Takes rows of prompts.

        Args:
            states_ND: what the head reads, one row per position of the step.
            head: gives logits ``[N, ≥V]``.
        """
        if states_ND.dim() != 2 or states_ND.shape[0] < self.num_rows:
            return  # a choice of positions, or a part of them: the count will tell
        for given in self.given:
            for first in range(given.first, given.stop, PIECE):
                stop = min(first + PIECE, given.stop)
                # The row at a token's position is that of the one before it.
                rows = slice(first - 1 + given.offset, stop - 1 + given.offset)
                logits_NV = head(states_ND[rows])[:, : self.vocab_size].float()
                self._given_rows.append(_given_rows(given, first, logits_NV))

    def rows(self) -> DeviceLogits:
        """What was taken, to go with SGLang's other results."""
        return DeviceLogits(self, tuple(self._cuts), tuple(self._given_rows), self._alive_places, self._alive_R)

    def _cut(self, logits_BV: torch.Tensor, stage: Stage, temperatures_B1: torch.Tensor | None = None) -> None:
        # Few kernels however many requests: those that want the same columns are cut together.
        groups: dict[LogitsSpec, list[int]] = {}
        for choice in self.choices:
            spec = choice.logits.wanted.spec
            if spec is not None and spec.of_response and spec.stage == stage:
                groups.setdefault(spec, []).append(choice.row)
        for spec, places in groups.items():
            rows_R = on_device(places, logits_BV.device)
            chosen_RV = logits_BV[rows_R, : self.vocab_size].float()
            if temperatures_B1 is not None:
                chosen_RV = chosen_RV / temperatures_B1[rows_R]
            self._cuts.append(Cut(tuple(places), cut(chosen_RV, spec)))

    def _choosing(self, choice: Choice) -> Choosing:
        def response_ids() -> torch.Tensor:
            device = None if self.input_ids is None else self.input_ids.device
            before = torch.tensor(choice.before[: choice.index], dtype=torch.int64, device=device)
            if self.input_ids is None or len(before) == choice.index:
                return before
            # Under overlap scheduling the host has not seen the last token yet.
            return torch.cat([before, self.input_ids[choice.last : choice.last + 1].long()])

        return Choosing(choice.logits, choice.index, choice.max_new_tokens, response_ids)


def _given_rows(given: Given, first: int, logits_NV: torch.Tensor) -> GivenRows:
    """A piece of a prompt: constrained where it is one of the request's responses, and cut."""
    one, ids = given.logits, given.logits.prompt_ids
    alive_N = None
    spec = one.wanted.spec if one.wanted.spec is not None and one.wanted.spec.of_prompt else None
    raw_NV = logits_NV
    inside = [(n, place) for n in range(len(logits_NV)) if (place := one.place_of(first + n)) is not None]
    if inside and one.wanted.constraints:
        limit = one.wanted.response_limit
        steps = [
            Choosing(one, first + n - start, limit, _ids_between(ids, start, first + n, logits_NV.device), start)
            for n, (start, _) in inside
        ]
        rows_R = on_device([n for n, _ in inside], logits_NV.device)
        changed_RV, alive_N = constrain(logits_NV[rows_R], steps)
        logits_NV = logits_NV.index_copy(0, rows_R, changed_RV)
        whole_N = torch.ones(len(logits_NV), dtype=torch.bool, device=logits_NV.device)
        alive_N = whole_N.index_copy(0, rows_R, alive_N)
    log_probs_N = None
    if one.wanted.scored:
        tokens_N1 = on_device(ids[first : first + len(logits_NV)], logits_NV.device)[:, None]
        log_probs_N = logits_NV.log_softmax(-1).gather(1, tokens_N1)[:, 0]
    rows = None if spec is None else cut(raw_NV if spec.stage == "raw" else logits_NV, spec)
    return GivenRows(given, first, len(logits_NV), rows, log_probs_N, alive_N)


def _ids_between(ids: Sequence[int], start: int, stop: int, device: torch.device) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(ids[start:stop], dtype=torch.int64, device=device)


def _row_of(rows: TokenLogits, place: int) -> TokenLogits:
    """One request's row, as a copy: a view would keep the whole step's buffer alive in it."""
    ids = rows.token_ids_NC
    only = slice(place, place + 1)
    return TokenLogits(rows.values_NC[only].clone(), None if ids is None else ids[only].clone())


def _nothing_left(what: str, one: RequestLogits) -> str:
    names = ", ".join(dict.fromkeys(constraint.name for constraint in one.wanted.constraints))
    return (
        f"{what}: 0 tokens are left to choose from by the constraints ({names}; one that gives NaN or infinity leaves "
        "nothing) together with what SGLang applies before them (a "
        "grammar, min_new_tokens, logit_bias, a processor); loosen one of them"
    )
