"""Several samples of one prompt, for one prefill of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.specs import Completion, HiddenSpec, Pooled, Request, Segment, rows_expected
from torchrl_sglang_hidden.wire import check_requests

__all__ = ["generate_samples"]


def generate_samples(
    engine: Engine, requests: Sequence[Request], num_samples: int, *, ahead: Engine | None = None
) -> list[Completion]:
    """Samples every request ``num_samples`` times.

    SGLang computes a prompt again for each of several equal requests that arrive together, and a request that pools its
    whole prompt does so even when the prompt is cached. So each prompt goes ahead once, for a single token: that fills
    the prefix cache and brings the prompt's states home, and the samples then need the states of their responses only.

    Args:
        engine: samples.
        requests: one per prompt.
        num_samples: samples per prompt.
        ahead: computes the prompts, by default ``engine``.

    Returns:
        ``len(requests) * num_samples`` completions, those of one request together.

    Raises:
        InputError: a request that must not be sent; nothing was.
        EngineError: see `Engine.generate`.
    """
    check_requests(requests, engine.info)
    firsts = (ahead or engine).generate([_ahead(request) for request in requests])
    samples = engine.generate([_sample(request, index) for request in requests for index in range(num_samples)])
    return [
        _with_prompt(requests[index // num_samples], sample, firsts[index // num_samples])
        for index, sample in enumerate(samples)
    ]


def _ahead(request: Request) -> Request:
    hidden = request.hidden
    if hidden is not None:
        # Of one token the response's only row is the prompt's last, which `full` must not count twice.
        hidden = replace(hidden, segments=("prompt", "response")) if hidden.reads_whole_prompt else None
    return replace(request, sampling={"max_new_tokens": 1, "temperature": 0.0}, return_log_probs=False, hidden=hidden)


def _sample(request: Request, index: int) -> Request:
    if "sampling_seed" in request.sampling:
        # One seed for all would give the same response again and again.
        seed = (request.sampling["sampling_seed"] + index + 2**63) % 2**64 - 2**63
        request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
    spec = request.hidden
    if spec is None or not spec.reads_whole_prompt:
        return request
    of_response = spec.segments != ("prompt",)
    return replace(request, hidden=replace(spec, segments=("response",)) if of_response else None)


def _with_prompt(request: Request, sample: Completion, first: Completion) -> Completion:
    spec = request.hidden
    if spec is None or not spec.reads_whole_prompt:
        return sample
    # The prompt's states and the response's are of two requests, and an update may have come between them.
    mixed = sample.mixed_weights or sample.weight_version != first.weight_version
    return replace(sample, hidden=_segments(spec, sample, first.hidden), mixed_weights=mixed)


def _segments(spec: HiddenSpec, sample: Completion, first: Mapping[Segment, Pooled]) -> dict[Segment, Pooled]:
    pools = {"prompt": first["prompt"], **sample.hidden}
    if "full" in spec.segments:
        prompt, response, boundary = pools["prompt"], pools["response"], first["response"]
        count = rows_expected("full", len(sample.prompt_ids), len(sample.response_ids))
        total_D = prompt.vector_D * prompt.count + response.vector_D * response.count - boundary.vector_D
        pools["full"] = Pooled(total_D / count, count)
    return {segment: pools[segment] for segment in spec.segments}
