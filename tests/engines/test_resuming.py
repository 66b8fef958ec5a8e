"""`join_completions`: what the joined completion says of its weights and of its end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from torchrl_sglang_hidden.engines import join_completions
from torchrl_sglang_hidden.errors import PromptLengthError, RequestAbortedError, SGLangHiddenError
from torchrl_sglang_hidden.records import Completion, Request, failed_completion

REQUEST = Request((1, 2), sampling={"max_new_tokens": 9})
FIRST = Completion(
    (1, 2), (3, 4), "x", torch.zeros(2), {}, "abort", "v1", versions=(("v1", 2),), error=RequestAbortedError("first")
)
REST = Completion((1, 2, 3, 4), (5,), "y", torch.zeros(1), {}, "stop", "v1", versions=(("v1", 1),))


@pytest.mark.parametrize(
    ("finish_reason", "error"), [("abort", RequestAbortedError("second")), ("error", PromptLengthError("second"))]
)
def test_a_second_part_without_tokens_changes_no_weights(finish_reason: str, error: SGLangHiddenError) -> None:
    rest = failed_completion(REQUEST, error, "v2", finish_reason=finish_reason)
    joined = join_completions(REQUEST, FIRST, rest)
    assert (joined.weight_version, joined.versions, joined.mixed_weights) == ("v1", (("v1", 2),), False)
    assert (joined.response_ids, joined.finish_reason, joined.error) == ((3, 4), finish_reason, error)


def test_weights_that_were_mixed_stay_mixed() -> None:
    for first, rest in ((True, False), (False, True), (False, False)):
        parts = [dataclasses.replace(part, mixed_weights=mixed) for part, mixed in ((FIRST, first), (REST, rest))]
        assert join_completions(REQUEST, *parts).mixed_weights is (first or rest)
    newer = dataclasses.replace(REST, weight_version="v2", versions=(("v2", 1),))
    joined = join_completions(REQUEST, FIRST, newer)
    assert (joined.weight_version, joined.mixed_weights) == ("v2", True)
