"""What the soak sends, what must come back, and what processes hold: requests, comparisons, memory and descriptors.

Every request is greedy, so that the same one asked alone says what must come back. Knows no threads and no calls.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from torchrl_sglang_hidden import ActionMask, DisallowedTokens, HiddenSpec, LogitsSpec, TemperatureScale
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request

STATE_RTOL, LOG_PROB_ATOL, LOGIT_ATOL = 1e-4, 1e-3, 1e-3
FIRST_ID = 16  # those before it are special tokens of most vocabularies
POOLED = 1  # the kind of request that a policy sends, see `make_requests`
NUM_KINDS = 8


def make_requests(info: EngineInfo, count: int, seed: int, *, most_prompt: int, most_new: int) -> list[Request]:
    """Make requests of all kinds, every second one with a beginning that others share.

    Args:
        info: the engine's.
        count: how many.
        seed: of ids and lengths.
        most_prompt: tokens of the longest prompt.
        most_new: tokens of the longest response.
    """
    chance = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(FIRST_ID, info.vocab_size) for _ in range(length))

    shared = [ids(most_prompt // 2) for _ in range(4)]
    actions = ids(12)
    requests = []
    for number in range(count):
        prompt = ids(chance.randint(1, most_prompt // 2))
        if number % 2:
            prompt = (*chance.choice(shared), *prompt)
        sampling = {"max_new_tokens": chance.randint(1, most_new), "temperature": 0.0, "ignore_eos": True}
        requests.append(_of_kind(number % NUM_KINDS, prompt, sampling, actions))
    return requests


def _of_kind(kind: int, prompt: tuple[int, ...], sampling: dict[str, Any], actions: tuple[int, ...]) -> Request:
    both = HiddenSpec(("prompt", "response"))
    match kind:
        case 0:
            return Request(prompt, sampling, return_log_probs=True)
        case 1:  # `POOLED`
            return Request(prompt, sampling, return_log_probs=True, hidden=both)
        case 2:
            return Request(prompt, sampling, hidden=HiddenSpec(("full",), "max", tokens=True))
        case 3:
            return Request(prompt, sampling, return_log_probs=True, logits=LogitsSpec(token_ids=actions), hidden=both)
        case 4:
            return Request(prompt, sampling, return_log_probs=True, constraints=(ActionMask(actions),))
        case 5:
            return Request(prompt, {"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",), "mean", (-1, 0)))
        case 6:
            constraints = (TemperatureScale(2.0), DisallowedTokens(actions))
            return Request(prompt, sampling, constraints=constraints, logits=LogitsSpec(top_k=3, stage="processed"))
        case _:
            return Request(prompt, {"max_new_tokens": 0}, score_prompt=True)


@dataclass
class Score:
    """Counts what came back, over all threads.

    Args:
        right: rows that are what the same request came to alone.
        ties: rows that left it at a token where two were equally likely, as far as floats can tell.
        wrong: what was wrong, row by row.
        worst_state: the largest relative distance of a vector or token state.
        worst_log_prob: the largest distance of a log-prob.
    """

    right: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    worst_state: float = 0.0
    worst_log_prob: float = 0.0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def compare(self, what: str, request: Request, found: Completion, alone: Completion) -> None:
        """Hold one completion against that of the same request alone."""
        states, log_probs, tie, fault = _differences(request, found, alone)
        if states > STATE_RTOL or log_probs > LOG_PROB_ATOL:
            fault = fault or f"states {states:.1e} apart, log-probs {log_probs:.1e}"
        with self._lock:
            if fault:
                self.wrong.append(f"{what}: P={len(request.prompt_ids)} {request.hidden}: {fault}")
                return
            self.ties += tie
            self.right += not tie
            self.worst_state = max(self.worst_state, states)
            self.worst_log_prob = max(self.worst_log_prob, log_probs)

    def fail(self, what: str) -> None:
        """Note what went wrong with a whole call."""
        with self._lock:
            self.wrong.append(what)


def _differences(request: Request, found: Completion, alone: Completion) -> tuple[float, float, bool, str]:
    """Return the distances of states and log-probs, whether the two parted at a tie, and what is wrong beyond those."""
    if found.error is not None:
        return 0.0, 0.0, False, f"{type(found.error).__name__}: {found.error}"
    if found.prompt_ids != alone.prompt_ids:
        return 0.0, 0.0, False, "the answer to another prompt"
    pairs = zip(found.response_ids, alone.response_ids, strict=False)
    parted = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if parted is None and len(found.response_ids) != len(alone.response_ids):
        return 0.0, 0.0, False, f"{len(found.response_ids)} tokens, expected {len(alone.response_ids)}"
    if parted is not None:
        gap = None
        if found.log_probs_T is not None and alone.log_probs_T is not None:
            gap = abs(float(found.log_probs_T[parted] - alone.log_probs_T[parted]))
        if gap is None or gap > LOG_PROB_ATOL:
            return (
                0.0,
                0.0,
                False,
                f"other tokens from {parted} on: {found.response_ids}, not {alone.response_ids}",
            )
        return 0.0, 0.0, True, ""
    log_probs = max(
        _apart(found.log_probs_T, alone.log_probs_T), _apart(found.prompt_log_probs_P, alone.prompt_log_probs_P)
    )
    if (found.logits is None) != (alone.logits is None):
        return 0.0, 0.0, False, "logits are missing"
    if found.logits is not None and alone.logits is not None:
        logits = _apart(found.logits.values_NC, alone.logits.values_NC)
        if logits > LOGIT_ATOL:
            return 0.0, 0.0, False, f"logits {logits:.1e} apart"
    if set(found.hidden) != set(alone.hidden) or (found.token_rows is None) != (alone.token_rows is None):
        return 0.0, 0.0, False, "states are missing"
    if any(found.hidden[name].count != alone.hidden[name].count for name in alone.hidden):
        return 0.0, 0.0, False, "other counts"
    states = [_relative(found.hidden[name].vector, alone.hidden[name].vector) for name in alone.hidden]
    if found.token_rows is not None and alone.token_rows is not None:
        states.append(_relative(found.token_rows.rows_ND, alone.token_rows.rows_ND))
    return max(states, default=0.0), log_probs, False, ""


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    same = (a == b) | a.isnan()
    return float(torch.where(same, 0.0, a - b).abs().max()) if a.numel() else 0.0


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Holding:
    """What one side, a process with its children, holds at a moment: PSS shares out the pages that several map."""

    rss_bytes: int
    pss_bytes: int
    descriptors: int
    threads: int
    processes: int


def holding(pid: int | None, *, with_children: bool) -> Holding:
    """Measure a process; None for this one."""
    process = psutil.Process(pid)
    every = [process, *(process.children(recursive=True) if with_children else [])]
    memory = [one.memory_full_info() for one in every]
    return Holding(
        rss_bytes=sum(one.rss for one in memory),
        pss_bytes=sum(one.pss for one in memory),
        descriptors=sum(one.num_fds() for one in every),
        threads=sum(one.num_threads() for one in every),
        processes=len(every),
    )


def growth(samples: Sequence[Holding], *, most_bytes: int, most_count: int) -> dict[str, dict[str, float]]:
    """Return for each quantity the medians of the first and the last third of samples at rest, and whether it grew.

    Args:
        samples: in order, each taken while nothing was under way; those of the warm-up left out.
        most_bytes: by which memory may differ: allocators keep what is freed.
        most_count: by which descriptors, threads and processes may differ.
    """
    third = max(len(samples) // 3, 1)
    table = {}
    for name in asdict(samples[0]):
        values = [float(getattr(sample, name)) for sample in samples]
        first, last = _median(values[:third]), _median(values[-third:])
        limit = most_bytes if name.endswith("bytes") else most_count
        table[name] = {"first": first, "last": last, "most": max(values), "grew": float(last - first > limit)}
    return table


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
