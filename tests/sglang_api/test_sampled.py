"""Sampling masks and routed experts as SGLang writes them, counted against the tokens."""

from __future__ import annotations

import base64
import math
from typing import Any

import pytest
import torch

from torchrl_sglang_hidden.errors import AlignmentError, ProtocolError
from torchrl_sglang_hidden.sglang_api.sampled import read_routed_experts, read_sampling_mask

IDS = (7, 8)
META = {"output_token_sampling_mask": [[7], [9, 8]], "output_token_sampling_logprobs": [[0.0], [-0.5, -1.0]]}
EXPERTS = torch.arange(12, dtype=torch.int32).view(3, 2, 2)


def encoded(experts: torch.Tensor) -> dict[str, str]:
    return {"routed_experts": base64.b64encode(experts.numpy().tobytes()).decode()}


def test_sampling_masks_become_tensors() -> None:
    found = read_sampling_mask("row 0", META, IDS, max_width=2, vocab_size=16)
    assert found.token_ids_TS.tolist() == [[7, -1], [9, 8]]
    assert found.token_log_probs_TS.tolist() == [[0.0, -torch.inf], [-0.5, -1.0]]
    assert found.log_probs_T.tolist() == [0.0, -1.0]
    assert (found.token_ids_TS.dtype, found.log_probs_T.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"output_token_sampling_mask": None}, ProtocolError, "was asked for and is not in the answer"),
        ({"output_token_sampling_logprobs": None}, ProtocolError, "was asked for and is not in the answer"),
        ({"output_token_sampling_mask": [[7]]}, AlignmentError, "1 sampling masks with 2 .*for 2 response tokens"),
        ({"output_token_sampling_mask": [[7], [9]]}, ProtocolError, "cannot be read"),
        ({"output_token_sampling_logprobs": [[0.0], [None, 1.0]]}, ProtocolError, "cannot be read"),
        ({"output_token_sampling_logprobs": [0.0, -0.5]}, ProtocolError, "cannot be read"),
        ({"output_token_sampling_mask": 7}, ProtocolError, "cannot be read"),
        ({"output_token_sampling_mask": [7, 8]}, ProtocolError, "cannot be read"),
        ({"output_token_sampling_mask": [[7], [9, 8.0]]}, ProtocolError, "8.0, expected an integer"),
        ({"output_token_sampling_mask": [[7], [16, 8]]}, ProtocolError, r"16, expected 0\.\.15"),
        ({"output_token_sampling_mask": [[7], [-1, 8]]}, ProtocolError, r"-1, expected 0\.\.15"),
        ({"output_token_sampling_logprobs": [[0.0], [math.nan, -1.0]]}, ProtocolError, "is no number"),
        ({"output_token_sampling_logprobs": [[0.0], [[-0.5, -1.0]] * 2]}, ProtocolError, "cannot be read"),
        # One row of many tokens must not widen all the others.
        ({"output_token_sampling_mask": [[7], [8] * 3]}, AlignmentError, "drawn from 3 tokens, over .* limit of 2"),
        (
            {"output_token_sampling_mask": [[7], [9, 10]]},
            AlignmentError,
            r"response token 1 \(id 8\) is not once among",
        ),
        ({"output_token_sampling_mask": [[7], [8, 8]]}, AlignmentError, r"response token 1 \(id 8\) is not once among"),
    ],
)
def test_sampling_masks_that_do_not_add_up(changes: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"row 4: .*{words}"):
        read_sampling_mask("row 4", {**META, **changes}, IDS, max_width=2, vocab_size=16)


def test_routed_experts_become_a_tensor() -> None:
    assert read_routed_experts("row 0", encoded(EXPERTS), 3, 2).equal(EXPERTS)


@pytest.mark.parametrize(
    ("meta", "error", "words"),
    [
        ({}, ProtocolError, "was asked for and is not in the answer"),
        ({"routed_experts": "%"}, ProtocolError, "cannot be read"),
        ({"routed_experts": 7}, ProtocolError, "cannot be read"),
        ({"routed_experts": base64.b64encode(b"abc").decode()}, ProtocolError, "cannot be read"),
        (encoded(EXPERTS[:0]), ProtocolError, "cannot be read"),
        (encoded(EXPERTS.flatten()[:-2]), AlignmentError, "10 routed experts are not those of 3 positions"),
    ],
)
def test_routed_experts_that_do_not_add_up(meta: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"row 4: .*{words}"):
        read_routed_experts("row 4", meta, 3, 2)
