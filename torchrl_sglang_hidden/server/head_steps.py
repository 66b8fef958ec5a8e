"""Scores one forward step's rows with the heads that its requests ask for, on the device; the numbers travel.

Planned before the step with its other rows, and taken and handed over with them: see `step_rows`. The heads' scores
are on the host before SGLang looks which responses have ended, so that a rule on a score ends a response as an EOS
does: that token is its last, and what overlap scheduling has computed behind it is dropped with all that belongs to it.

Knows SGLang's batches, requests and auxiliary outputs by attribute name; imports of SGLang are inside functions. Runs
inside the scheduler, where an exception ends the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from torchrl_sglang_hidden.counters import timed
from torchrl_sglang_hidden.protocol.answer import ENDED_BY_HEAD
from torchrl_sglang_hidden.reduce.device import on_device
from torchrl_sglang_hidden.reduce.head_scores import RequestScores
from torchrl_sglang_hidden.server.forward_modes import PREFILL_MODES
from torchrl_sglang_hidden.server.heads import ServedHead
from torchrl_sglang_hidden.server.step_rows import OUT_OF_MEMORY, StepPlan
from torchrl_sglang_hidden.server.tracked_request import TrackedRequest

__all__ = ["AFTER_SCORES", "HostScores", "ScoredPlan", "after_output_starts", "with_scores"]

Copy = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class _Part:
    """The rows of one request that a step scores.

    Args:
        row: the request's index in the batch.
        tracked: the request.
        prompt: the prompt positions, as ``(first, stop)``; None for none.
        produces: whether the step produces a token of it.
        places: for each of its heads, the head's place in the plan, and where its scores begin among those of the head.
        produced: the same for the score of the row that produces a token, which stands behind those of the prompt.
    """

    row: int
    tracked: TrackedRequest
    scores: RequestScores
    prompt: tuple[int, int] | None
    produces: bool
    places: list[tuple[int, int]] = field(default_factory=list)
    produced: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _ScorePlan:
    """What to score in one step.

    Args:
        rows: by head, the rows of the step's states.
        parts: of each request, in the order of the batch.
        ruled: those of them whose response a score may end now.
        sends: whether this rank answers, and so scores.
    """

    rows: dict[ServedHead, list[int]]
    parts: list[_Part]
    ruled: list[_Part]
    sends: bool


def with_scores(plan: StepPlan | None, batch: Any, opened: Mapping[Any, TrackedRequest], *, sends: bool) -> Any:
    """Return the plan of a step with what its heads score; the plan itself where they score nothing.

    Args:
        plan: of the step's other rows.
        batch: SGLang's, with the lengths of this step.
        opened: the requests that ask for scores, by SGLang's own objects.
        sends: whether this rank answers.
    """
    asking = {id(req): tracked for req, tracked in opened.items()}
    rows: dict[ServedHead, list[int]] = {}
    numbers: dict[ServedHead, int] = {}
    parts: list[_Part] = []
    prefills = batch.forward_mode.name in PREFILL_MODES
    start = 0
    for row, req in enumerate(batch.reqs):
        length = batch.extend_lens[row] if prefills else 1
        tracked = asking.get(id(req))
        if tracked is not None and tracked.scores is not None:
            prompt, produces = None, tracked.scores.wanted.reads_response
            if prefills:
                position = batch.prefix_lens[row]
                prompt = tracked.scores.plan_prompt(position, position + length)
                produces = produces and position + length >= tracked.scores.num_prompt
            if prompt is not None or produces:
                part = _Part(row, tracked, tracked.scores, prompt, produces)
                own = [] if prompt is None else list(range(start + prompt[0] - position, start + prompt[1] - position))
                own += [start + length - 1] if produces else []
                for head in tracked.heads:
                    found = rows.setdefault(head, [])
                    place = numbers.setdefault(head, len(numbers))
                    part.places.append((place, len(found)))
                    found += own
                    part.produced.append((place, len(found) - 1))
                parts.append(part)
        start += length
    if not parts:
        return plan
    ruled = [part for part in parts if part.produces and part.scores.wanted.stop is not None]
    return ScoredPlan(plan, _ScorePlan(rows, parts, ruled, sends), start)


@dataclass(frozen=True, slots=True)
class ScoredPlan:
    """A `StepPlan` with what heads score beside it, used in its place.

    Args:
        plan: of the step's other rows; None for none.
        scores: what heads score.
        num_rows: all rows of the step.
    """

    plan: StepPlan | None
    scores: _ScorePlan
    num_rows: int

    @property
    def layers(self) -> set[int]:
        """The layers that anybody wants."""
        own = {head.head.layer for head in self.scores.rows}
        return own if self.plan is None else self.plan.layers | own

    def gather(self, states: Mapping[int, torch.Tensor]) -> _DeviceScores:
        """Take the planned rows of the step's states, and score them; see `StepPlan.gather`."""
        rows = None if self.plan is None else self.plan.gather(states)
        return _DeviceScores(rows, self.scores, self._score(states) if self.scores.sends else {})

    @timed
    def _score(self, states: Mapping[int, torch.Tensor]) -> dict[ServedHead, torch.Tensor]:
        found = {}
        for head, rows in self.scores.rows.items():
            states_ND = states.get(head.head.layer)
            if states_ND is None or states_ND.dim() != 2 or states_ND.shape[0] < self.num_rows:
                continue  # not one row for each position: the client's count finds it
            try:
                if rows == list(range(self.num_rows)):
                    rows_RD = states_ND[: self.num_rows]
                else:
                    rows_RD = states_ND.index_select(0, on_device(rows, states_ND.device, torch.int64))
                found[head] = head.scores(rows_RD)
            except torch.OutOfMemoryError:
                for part in self.scores.parts:
                    if head in part.tracked.heads:
                        part.tracked.refuse(OUT_OF_MEMORY)
        return found


@dataclass(frozen=True, slots=True)
class _DeviceScores:
    """One step's rows and scores on the device, SGLang's ``DeviceAuxiliaryOutput``."""

    rows: Any
    plan: _ScorePlan
    scores: Mapping[ServedHead, torch.Tensor]

    def copy_to_host(self, copy: Copy) -> HostScores:
        """Start the copies to the host."""
        rows = None if self.rows is None else self.rows.copy_to_host(copy)
        return HostScores(rows, self.plan, {head: copy(scores_R) for head, scores_R in self.scores.items()})


@dataclass(slots=True)
class HostScores:
    """One step's rows and scores on the host, SGLang's ``HostAuxiliaryOutput``.

    Args:
        rows: the step's other rows, `HostRows`; None for none.
        plan: what was scored.
        scores: by head, float32 ``[R]``.
    """

    rows: Any
    plan: _ScorePlan
    scores: Mapping[ServedHead, torch.Tensor]
    _values: list[list[float]] | None = None

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Hand rows and scores to their requests. ``commits[i]`` is None when batch row i committed no token."""
        if self.rows is not None:
            self.rows.consume(batch, commits)
        values = self._read()
        for part in self.plan.parts:
            if part.tracked.closed or not _is_there(part, batch):
                continue
            if part.prompt is not None:
                first, stop = part.prompt
                found = [values[head][start : start + stop - first] for head, start in part.places] if values else []
                part.scores.add_prompt(first, stop, found)
            commit = commits[part.row]
            if part.produces and commit is not None:
                produced = [values[head][place] for head, place in part.produced] if values else []
                part.scores.add_produced(commit.output_index, produced)

    def decide(self, batch: Any) -> None:
        """Have the requests end with the token that comes now whose scores fulfil their rule."""
        for part in self.plan.ruled:
            if not _is_there(part, batch):
                continue
            req, values = batch.reqs[part.row], self._read()
            # Whatever an earlier step decided of a token that was not committed.
            vars(req).pop(_CHECK, None)
            if (
                values
                and not req.finished()
                and part.scores.ends([values[head][place] for head, place in part.produced])
            ):
                _end_with_next(req, str(part.scores.wanted.stop))

    def _read(self) -> list[list[float]]:
        """Return the scores by head, in the order of the plan; none where they were not taken, and the client counts.

        Of a head whose scores did not fit into memory they are NaN: its requests are refused.
        """
        if self._values is None:
            rows = self.plan.rows
            self._values = (
                [self.scores[head].tolist() if head in self.scores else [math.nan] * len(rows[head]) for head in rows]
                if self.scores
                else []
            )
        return self._values


def _is_there(part: _Part, batch: Any) -> bool:
    """Return whether the request of a batch row is the one that the step was planned for."""
    return part.row < len(batch.reqs) and part.tracked.req() is batch.reqs[part.row]


# --- the end of a response --------------------------------------------------------------------------------------------

_CHECK = "update_finish_state"


def after_output_starts(starts: Any, cls: type, batch: Any, result: Any) -> None:
    """Decide which responses end with this step's token: SGLang commits it next, and then looks what ends.

    SGLang calls this when a step's results are on the host, before it commits the step's tokens.
    """
    output = result.auxiliary_host_output
    for isolated in getattr(output, "outputs", (output,)):
        scores = getattr(isolated, "output", None)
        if isinstance(scores, HostScores):
            scores.decide(batch)


def _end_with_next(req: Any, rule: str) -> None:
    """Have a request end with the token that is committed next, unless that token ends it by itself, such as an EOS."""
    length = len(req.output_ids) + 1

    def check(*args: Any, **kwargs: Any) -> None:
        del vars(req)[_CHECK]
        req.update_finish_state(*args, **kwargs)
        finish_class, length_class = _finish_classes()
        ends_anyway = req.finished_reason is not None and not isinstance(req.finished_reason, length_class)
        if len(req.output_ids) == length and not ends_anyway:
            req.finished_reason, req.finished_len = finish_class(rule), length

    # Of this request alone: a hook on the method would cost every request of every step.
    setattr(req, _CHECK, check)


@cache
def _finish_classes() -> tuple[type, type]:
    from sglang.srt.managers.schedule_batch import FINISH_LENGTH, BaseFinishReason

    class FinishedByHead(BaseFinishReason):  # type: ignore[misc]
        """A response that a head's score ended."""

        def __init__(self, rule: str) -> None:
            self.rule = rule

        def to_json(self) -> dict[str, Any]:
            # SGLang's OpenAI routes fail at a type that OpenAI has no name for. The rule is not under "matched", which
            # SGLang takes off the text.
            return {"type": "stop", ENDED_BY_HEAD: self.rule}

    return FinishedByHead, FINISH_LENGTH


_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
AFTER_SCORES: dict[str, Callable[..., Any]] = {f"{_PROCESSOR}.snapshot_auxiliary_output_starts": after_output_starts}
