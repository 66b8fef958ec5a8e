"""Requests of every kind for one prompt, and the rows that the fake engine answers them with."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from helpers.fake_engine import (
    ALL_SEGMENTS,
    WORDS,
    RecordingEngine,
    logits_V,
    make_info,
    of_layer,
    response_of,
    states_ND,
)
from helpers.reference_pooling import Case, expected_count, token_places
from torchrl_sglang_hidden import HiddenSpec
from torchrl_sglang_hidden.protocol import Options, unpack_options
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses
from torchrl_sglang_hidden.spec.constraints import (
    ActionMask,
    ConstraintStep,
    LogitConstraint,
    TemperatureScale,
)
from torchrl_sglang_hidden.spec.logits import LogitsSpec
from torchrl_sglang_hidden.spec.spans import LastTokens, PromptSpan, TokenMask

PROMPT = (9, 8, 7, 3)
RESPONSE = response_of(PROMPT)
ALL = HiddenSpec(ALL_SEGMENTS)
STOCK = {"pools_in_server": False, "layers": (-1,)}

# What the user wrote, and what it means for PROMPT.
SPANS = {"mask": TokenMask("m"), "tail": LastTokens(2)}
RESOLVED = {"mask": PromptSpan(((0, 1), (2, 3))), "tail": LastTokens(2)}


def request(
    hidden: HiddenSpec | None = ALL,
    prompt_ids: tuple[Any, ...] = PROMPT,
    spans: Any = None,
    lora: str | None = None,
    priority: int | None = None,
    **sampling: Any,
) -> Request:
    return Request(prompt_ids, sampling=sampling, hidden=hidden, spans=spans or {}, lora=lora, priority=priority)


def spanned(segments: Any = ("response",), pooling: Any = "mean", **more: Any) -> Request:
    """Return a request with spans. The other arguments are fields of its `HiddenSpec`."""
    return request(HiddenSpec(segments, pooling, spans=SPANS, **more), spans=RESOLVED)


def rows_for(requests: list[Request], **info: Any) -> list[dict[str, Any]]:
    engine = RecordingEngine(**info)
    return engine.answer(to_payload(requests, engine.info, binary=False))


def read(rows: Any, requests: list[Request] | None = None, **info: Any) -> list[Any]:
    return read_responses(requests or [request()], rows, make_info(**info))


def assert_states(one: Completion, sent: Request, info: Any) -> None:
    """Check that segments, spans and token states are the fake engine's, in plain torch."""
    spec = sent.hidden
    assert spec is not None
    wanted = options_of(to_payload([sent], dataclasses.replace(info, pools_in_server=True), binary=False)).wanted
    hidden_ND = states_ND(one.prompt_ids, one.response_ids or [0])
    hidden_NKD = torch.stack([of_layer(hidden_ND, layer) for layer in wanted.layers], 1)
    case = Case(wanted, len(one.prompt_ids), one.response_ids or (0,), hidden_NKD)
    shaped: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda states: states) if isinstance(spec.layers, tuple) else (lambda states: states.squeeze(-2))
    )
    assert tuple(one.hidden) == (() if spec.pooling is None else spec.segments)
    assert one.spans.keys() == spec.spans.keys()
    for what, pooled in {**one.hidden, **one.spans}.items():
        assert (pooled.count, pooled.vector.dtype) == (expected_count(case, what), torch.float32)
        torch.testing.assert_close(pooled.vector.double(), shaped(case.pooled(what)), rtol=1e-5, atol=1e-6)
    if spec.tokens:
        first, stop = token_places(case)
        assert one.token_rows.first == first
        assert torch.equal(one.token_rows.rows_ND, shaped(hidden_NKD[first:stop].to(wanted.row_dtype)))
    else:
        assert one.token_rows is None


def options_of(payload: dict[str, Any], row: int = 0) -> Options:
    options = unpack_options(json.loads(json.dumps(payload["sampling_params"][row]["custom_params"])))
    assert options is not None
    return options


# What was done to a good answer of one row, and what is said of it.
Spoil = Callable[[dict[str, Any]], Any]


def spoiled(rows: list[dict[str, Any]], spoil: Spoil) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    spoil(rows[0])
    return rows


# --- logits and constraints -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forbid(LogitConstraint, name="wire_forbid"):
    """A user's constraint that forbids the token that the model likes best, or that fails."""

    fails: bool = False

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        if self.fails:
            raise LookupError("no table")
        logits_V[logits_V.argmax()] = -math.inf
        return logits_V


V = len(WORDS)
FULL = LogitsSpec(full=True)
TOP = LogitsSpec(top_k=3)
PROMPTS = LogitsSpec(top_k=3, segments=("prompt",))
EVERY = LogitsSpec(full=True, segments=("full",))
MASKED = (ActionMask((6, 7, 8)), TemperatureScale(2.0))
GIVEN = (9, 8, 7, 6, 8, 7)


def asks(*constraints: LogitConstraint, spec: LogitsSpec | None = None, ids: Any = PROMPT, **fields: Any) -> Request:
    sampling = fields.pop("sampling", {})
    return Request(ids, sampling, logits=spec, constraints=constraints, **fields)


def scores(*constraints: LogitConstraint, first: int = 0, spec: LogitsSpec | None = None, ids: Any = GIVEN) -> Request:
    """Return a request that scores a sequence. A constraint acts on everything after its first two tokens."""
    responses = ((2, len(ids)),) if constraints and len(ids) > 2 else ((1, len(ids)),) if constraints else ()
    return asks(
        *constraints, spec=spec, ids=ids, score_prompt=True, score_from=first, response_ranges=responses,
        sampling={"max_new_tokens": 0}, return_log_probs=False,
    )  # fmt: skip


def model_rows(ids: Any) -> torch.Tensor:
    """Return the fake engine's logits for tokens 1, 2, …"""
    return torch.stack([logits_V(ids[: place + 1]) for place in range(len(ids) - 1)])
