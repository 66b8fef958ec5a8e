"""Compares the tokens that an engine chose, and the logits that it returned, with Hugging Face on the same weights.

Knows nothing of SGLang. What is done to logits before a token is drawn from them, and in which order, is written down
here a second time, on purpose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from helpers import hf_oracle
from helpers.user_constraints import NoImmediateRepeat, Tell
from torchrl_sglang_hidden import ActionMask, ConstraintStep, DisallowedTokens, LogitConstraint, TemperatureScale
from torchrl_sglang_hidden.engines import Engine
from torchrl_sglang_hidden.records import Completion, Request, TokenLogits
from torchrl_sglang_hidden.spec.constraints import ExponentialSchedule, LinearSchedule
from torchrl_sglang_hidden.spec.logits import LogitsSpec

LOGITS_ATOL = 1e-3
SUM_ATOL = 1e-4
DEFAULT_NEW_TOKENS = 128

# What a grammar allows behind the ids of a response, bool [V].
Grammar = Callable[[Sequence[int]], torch.Tensor]


@functools.lru_cache(maxsize=8)
@torch.inference_mode()
def logits_of(model_dir: str, ids: tuple[int, ...], images: tuple[str, ...] = ()) -> torch.Tensor:
    """Return ``[N, V]``: row n is what the token after the first n+1 is drawn from."""
    model = hf_oracle.load(model_dir)
    return hf_oracle.head(model, hf_oracle.last_states(model, ids, images))


def temperature_at(scale: TemperatureScale, index: int, most: int) -> float:
    schedule = scale.schedule
    if isinstance(schedule, tuple):
        return schedule[index] if index < len(schedule) else schedule[-1]
    if isinstance(schedule, (LinearSchedule, ExponentialSchedule)):
        last = (schedule.steps or most) - 1
        done = min(index, last) / last if last else 0.0
        if isinstance(schedule, LinearSchedule):
            return (1 - done) * schedule.start + done * schedule.end
        return math.exp((1 - done) * math.log(schedule.start) + done * math.log(schedule.end))
    return float(schedule)


def constrained(
    constraints: Sequence[LogitConstraint],
    row_V: torch.Tensor,
    prompt_ids: Sequence[int],
    before: Sequence[int],
    most: int,
) -> torch.Tensor:
    """Return one token's logits after the constraints: users' own first, then temperatures, then masks."""
    row_V, index = row_V.clone(), len(before)
    acting = [
        one
        for one in constraints
        if (index in one.positions if one.positions is not None else index < (one.first_tokens or math.inf))
    ]
    step = ConstraintStep(index, most, list(prompt_ids), torch.tensor(list(before), dtype=torch.int64))
    for one in acting:
        if not isinstance(one, (TemperatureScale, ActionMask, DisallowedTokens)):
            row_V = one.apply(row_V, step)
    for one in acting:
        if isinstance(one, TemperatureScale):
            row_V = row_V / temperature_at(one, index, most)
    for one in acting:
        if isinstance(one, ActionMask):
            only_V = torch.full_like(row_V, -math.inf)
            ids = list(one.valid_token_ids)
            only_V[ids] = row_V[ids]
            row_V = only_V
        elif isinstance(one, DisallowedTokens):
            row_V[list(one.ids)] = -math.inf
    return row_V


def processed(
    request: Request,
    completion: Completion,
    raw_TV: torch.Tensor,
    eos_id: int,
    grammar: Grammar | None = None,
    overlap: bool = True,
) -> torch.Tensor:
    """Return ``[T, V]``: what the tokens of a response were drawn from."""
    sampling, rows = request.sampling, []
    most = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    for index, raw_V in enumerate(raw_TV):
        row_V, before = raw_V.clone(), completion.response_ids[:index]
        # SGLang 0.5.23's own penalties, under overlap scheduling, count the prompt's last token and not the latest one.
        counted = (completion.prompt_ids[-1], *before)[:index] if overlap else before
        counts_V = torch.bincount(torch.tensor(counted, dtype=torch.int64), minlength=len(row_V))
        row_V -= sampling.get("frequency_penalty", 0.0) * counts_V
        row_V -= sampling.get("presence_penalty", 0.0) * (counts_V > 0)
        repetition = sampling.get("repetition_penalty", 1.0)
        row_V = torch.where(counts_V > 0, torch.where(row_V < 0, row_V * repetition, row_V / repetition), row_V)
        if index < sampling.get("min_new_tokens", 0):
            row_V[eos_id] = -math.inf
        if grammar is not None:
            row_V[~grammar(before)] = -math.inf
        for token_id, bias in (sampling.get("logit_bias") or {}).items():
            row_V[int(token_id)] += bias
        row_V = constrained(request.constraints, row_V, completion.prompt_ids, before, most)
        rows.append(row_V / (sampling.get("temperature", 1.0) or 1.0))
    return torch.stack(rows)


def assert_logits(
    found: TokenLogits | None,
    expected_NV: torch.Tensor,
    spec: LogitsSpec,
    name: str,
    *,
    atol: float = LOGITS_ATOL,
    rtol: float = 0.0,
) -> None:
    """Check the requested columns of every row, and that ``-inf`` stands in the same places."""
    assert found is not None, name
    values_NC, ids_NC = found.values_NC, found.token_ids_NC
    assert values_NC.dtype == spec.dtype, name
    if spec.dtype == torch.bfloat16:
        rtol = max(rtol, 2.0**-8)
    if spec.top_k is not None:
        assert ids_NC is not None, name
        assert ids_NC.dtype == torch.int64, name
        assert ids_NC.shape == (len(expected_NV), spec.top_k), f"{name}: {ids_NC.shape}"
        assert all(len(set(row.tolist())) == spec.top_k for row in ids_NC), name
        best_NC = expected_NV.topk(spec.top_k, dim=-1).values
        _assert_close(values_NC, best_NC, atol, rtol, f"{name}: not the largest")
        expected_NC = expected_NV.gather(1, ids_NC)
    else:
        assert ids_NC is None, name
        expected_NC = expected_NV if spec.full else expected_NV[:, list(spec.token_ids or ())]
    _assert_close(values_NC, expected_NC, atol, rtol, name)


def _assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float, name: str) -> None:
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    found = found.float()
    gone = expected == -math.inf
    wrong = (found == -math.inf) != gone
    assert not wrong.any(), f"{name}: -inf in the wrong places, rows {wrong.any(-1).nonzero().flatten().tolist()[:9]}"
    excess = ((found - expected).abs() - atol - rtol * expected.abs()).masked_fill(gone, 0)
    where = (excess > 0).any(-1).nonzero().flatten().tolist()
    assert not where, f"{name}: rows {where[:9]} of {len(found)} are off, by up to {excess.max() + atol:.2e}"


def assert_choices(
    request: Request,
    completion: Completion,
    model_dir: str,
    *,
    grammar: Grammar | None = None,
    overlap: bool = True,
    atol: float = LOGITS_ATOL,
) -> None:
    """Check tokens, log-probs and logits of one completion against Hugging Face's logits and the request.

    Args:
        request: what was asked.
        completion: what came.
        model_dir: its weights.
        grammar: that of the request.
        overlap: whether SGLang schedules with overlap, which its own penalties follow one token late. They can be
            foretold where a request with them is alone in the server.
        atol: of logits and log-probs, at a temperature of 1.
    """
    spec, prompt_ids, response_ids = request.logits, completion.prompt_ids, completion.response_ids
    num_prompt, num_response = len(prompt_ids), len(response_ids)
    name = f"P={num_prompt} T={num_response} {request.sampling} {spec} {str(request.constraints)[:300]}"
    assert prompt_ids == request.prompt_ids, name
    images = () if request.images is None else request.images.data
    all_NV = logits_of(model_dir, (*prompt_ids, *response_ids), images)
    eos_id = hf_oracle.load(model_dir).config.get_text_config().eos_token_id
    sharpest = 1.0
    if num_response:
        raw_TV = all_NV[num_prompt - 1 : -1]
        expected_TV = processed(request, completion, raw_TV, eos_id, grammar, overlap)
        ids_T1 = torch.tensor(response_ids)[:, None]
        most = request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        for scale in (one for one in request.constraints if isinstance(one, TemperatureScale)):
            sharpest *= min(temperature_at(scale, index, most) for index in range(num_response))
        sharpest = min(1.0, sharpest * (request.sampling.get("temperature", 1.0) or 1.0))
        chosen_T = expected_TV.gather(1, ids_T1)[:, 0]
        forbidden = (chosen_T == -math.inf).nonzero().flatten().tolist()
        assert not forbidden, f"{name}: tokens {forbidden} are outside of what was allowed"
        if request.sampling.get("temperature") == 0:
            behind_T = expected_TV.amax(-1) - chosen_T
            assert (behind_T < 2 * atol / sharpest).all(), f"{name}: not the best token, by {behind_T.tolist()}"
        if completion.log_probs_T is not None:
            log_probs_T = expected_TV.log_softmax(-1).gather(1, ids_T1)[:, 0]
            torch.testing.assert_close(completion.log_probs_T, log_probs_T, atol=atol / sharpest, rtol=0, msg=name)
        if spec is not None and spec.of_response:
            expected = raw_TV if spec.stage == "raw" else expected_TV
            assert_logits(completion.logits, expected, spec, f"response {name}", atol=atol / sharpest)
            assert_same_log_probs(spec, completion, expected_TV, name)
    if spec is None or not spec.of_response:
        assert completion.logits is None, name
    scored_NV = _scored(request, all_NV)
    if spec is None or not spec.of_prompt:
        assert completion.prompt_logits is None, name
    else:
        expected_NV = all_NV[: num_prompt - 1] if spec.stage == "raw" else scored_NV
        assert_logits(completion.prompt_logits, expected_NV, spec, f"prompt {name}", atol=atol)
    if request.score_prompt:
        assert_scores(request, completion, scored_NV, name, atol)
    else:
        assert completion.prompt_log_probs_P is None, name


def check_choices(
    engine: Engine, requests: Sequence[Request], model_dir: str, *, overlap: bool = True
) -> list[Completion]:
    """Generate, and check every completion with `assert_choices`."""
    completions = engine.generate(requests)
    pairs = zip(requests, completions, strict=True)
    # Sorted, so that Hugging Face's logits of one sequence are computed once.
    for request, completion in sorted(pairs, key=lambda pair: (pair[1].prompt_ids, pair[1].response_ids)):
        assert_choices(request, completion, model_dir, overlap=overlap)
    return completions


def assert_same_log_probs(spec: LogitsSpec, completion: Completion, expected_TV: torch.Tensor, name: str) -> None:
    """Check that the logits' softmax is the engine's own log-probs, where no allowed token's logit is missing."""
    found, log_probs_T = completion.logits, completion.log_probs_T
    if found is None or log_probs_T is None or spec.stage == "raw" or spec.dtype != torch.float32:
        return
    values_TC = found.values_NC
    if ((expected_TV > -math.inf).sum(-1) > (values_TC > -math.inf).sum(-1)).any():
        return
    ids_TC = found.token_ids_NC
    if ids_TC is None:
        ids_C = torch.arange(values_TC.shape[1]) if spec.full else torch.tensor(spec.token_ids)
        ids_TC = ids_C.expand_as(values_TC)
    own_TC = values_TC.log_softmax(-1)
    for index, token_id in enumerate(completion.response_ids):
        own = own_TC[index][ids_TC[index] == token_id]
        assert own.shape == (1,), name
        assert abs(float(own) - float(log_probs_T[index])) < SUM_ATOL, f"{name}: token {index}"


def _scored(request: Request, all_NV: torch.Tensor) -> torch.Tensor:
    """Return ``[P-1, V]``: what tokens 1 and later of a prompt are scored by."""
    ids = request.prompt_ids
    rows_NV = all_NV[: len(ids) - 1]
    if not (request.score_prompt and request.constraints):
        return rows_NV
    rows_NV = rows_NV.clone()
    for start, stop in request.response_ranges:
        for place in range(start, stop):
            row_V, before = rows_NV[place - 1], ids[start:place]
            changed_V = constrained(request.constraints, row_V, ids[:start], before, request.response_limit)
            rows_NV[place - 1] = changed_V
    return rows_NV


def assert_scores(
    request: Request, completion: Completion, scored_NV: torch.Tensor, name: str, atol: float = LOGITS_ATOL
) -> None:
    ids, found_P = request.prompt_ids, completion.prompt_log_probs_P
    assert found_P is not None, name
    assert found_P.shape == (len(ids) - request.score_from,), name
    scores_N = scored_NV.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    expected_P = torch.cat([torch.tensor([math.nan]), scores_N])
    expected_P[list(request.image_rows)] = math.nan
    expected_P = expected_P[request.score_from :]
    torch.testing.assert_close(found_P, expected_P, atol=4 * atol, rtol=0, equal_nan=True, msg=f"scores of {name}")


def positioned(prompts: Sequence[Sequence[int]], length: int, *, own: bool) -> list[Request]:
    """Return requests whose answers tell, at every token, whether constraints acted on exactly that token.

    Args:
        prompts: taken in turn.
        length: of the responses.
        own: whether the server has the constraints of user_constraints.py.
    """
    few, most = ActionMask(range(500, 520)), DisallowedTokens(range(0, 49000, 3))
    sets: list[tuple[LogitConstraint, ...]] = [
        (),
        (replace(few, first_tokens=1),),
        (replace(few, first_tokens=3), replace(most, positions=(1, 3, 5))),
        (replace(most, positions=(length - 1,)), TemperatureScale([1.0, 2.0, 3.0, 4.0])),
        (TemperatureScale(LinearSchedule(0.5, 4.0)),),
        (TemperatureScale(ExponentialSchedule(4.0, 0.5, steps=5)), replace(few, positions=(0, 2, 4))),
        (TemperatureScale(3.0, positions=(1, 4)), TemperatureScale(LinearSchedule(1.0, 2.0, 3), first_tokens=4)),
    ]
    if own:
        sets += [(Tell(),), (Tell(positions=(1, 2, 5)),), (NoImmediateRepeat(), ActionMask((500, 501)))]
    return [
        Request(
            tuple(prompts[index % len(prompts)]),
            {"max_new_tokens": length, "min_new_tokens": length, "temperature": (1.0, 0.7, 0.0)[index % 3]},
            logits=LogitsSpec(full=True, stage="processed"),
            constraints=constraints,
        )
        for index, constraints in enumerate(sets)
    ]


def with_context(request: Request, completion: Completion) -> Request:
    """Return the request that is equivalent to a session's turn: with the whole context as its prompt."""
    return replace(request, prompt_ids=completion.prompt_ids)
