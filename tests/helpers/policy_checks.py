"""What the engine tests share: prompts, inputs, and the check of every row of an output against Hugging Face.

The tolerances are those that issue 2 promises: log-probs to 1e-3, pooled vectors to 1e-4 relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens
from transformers import PreTrainedTokenizerBase

from helpers import hf_oracle
from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper

LOG_PROB_ATOL = 1e-3
STATE_RTOL = 1e-4

# Small, so that prompts over the chunk size, where the engine computes states in pieces, cost little.
CHUNKED_PREFILL_SIZE = 64

SEGMENTS = ("prompt", "response", "full")
POOLINGS = ("mean", "last", "max", "sum")
QUESTIONS = [
    "What is the capital of France?",
    "Hi",
    "2+2=",
    "Name three colours of the rainbow, please.",
    "Is the earth flat?",
    "Write one line about the sea.",
    "What comes after Monday?",
    "Translate 'dog' to French.",
    "Who wrote Hamlet?",
    "Count to five.",
    "Give me a rhyme for 'cat'.",
    "What is water made of, and why is that so interesting to chemists all over the world?",
    "Say hello.",
    "7*6?",
    "Name a planet.",
    "What is a prime number?",
    "Why?",
]


def make_policy(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    mode: str = "tokens",
    segments: Sequence[str] = SEGMENTS,
    pooling: str = "mean",
    pad_output: bool = False,
    **generate: Any,
) -> SGLangHiddenWrapper:
    """Return a greedy policy that returns all segments and eight tokens, unless told otherwise."""
    return SGLangHiddenWrapper(
        engine,
        tokenizer=tokenizer,
        input_mode=mode,
        hidden=HiddenSpec(segments=tuple(segments), pooling=pooling),
        pad_output=pad_output,
        generate_kwargs={"max_new_tokens": 8, "temperature": 0, **generate},
    )


@dataclass(frozen=True)
class Row:
    """One row of an unpadded output. Whether its lengths agree has not been checked yet."""

    prompt_ids: list[int]
    response_ids: list[int]
    full_ids: list[int]
    text: str
    log_probs_T: torch.Tensor
    finish_reason: str
    weight_version: str
    vectors: dict[str, torch.Tensor]
    counts: dict[str, int]


def rows_of(out: TensorDict, segments: Sequence[str]) -> list[Row]:
    ids = {name: out.get(("tokens", name), as_list=True) for name in ("prompt", "response", "full")}
    log_probs = out.get(("log_probs", "response"), as_list=True)
    hidden = out["hidden_states"]
    return [
        Row(
            prompt_ids=ids["prompt"][row].tolist(),
            response_ids=ids["response"][row].tolist(),
            full_ids=ids["full"][row].tolist(),
            text=out["text"].response[row],
            log_probs_T=log_probs[row],
            finish_reason=out["finish_reason"][row],
            weight_version=out["weight_version"][row],
            vectors={segment: getattr(hidden, segment)[row] for segment in segments},
            counts={segment: int(getattr(hidden, f"{segment}_count")[row]) for segment in segments},
        )
        for row in range(len(out))
    ]


def assert_row(row: Row, model_dir: str, pooling: str = "mean", temperature: float = 1.0) -> hf_oracle.Truth:
    """Check that tokens, log-probs, counts and vectors of one row belong together and equal Hugging Face's."""
    num_prompt, num_response = len(row.prompt_ids), len(row.response_ids)
    expected_counts = {"prompt": num_prompt, "response": num_response, "full": num_prompt + num_response - 1}
    assert row.full_ids == row.prompt_ids + row.response_ids
    assert row.counts == {segment: expected_counts[segment] for segment in row.counts}
    truth = hf_oracle.teacher_force(model_dir, row.prompt_ids, row.response_ids, temperature)
    assert row.log_probs_T.dtype == torch.float32
    torch.testing.assert_close(row.log_probs_T, truth.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
    for segment, vector in row.vectors.items():
        assert vector.dtype == torch.float32
        error = relative_error(vector, truth.pooled(segment, pooling))
        assert error < STATE_RTOL, f"{segment} {pooling}, P={num_prompt}, T={num_response}: relative error {error:.2e}"
    return truth


def assert_rows(
    out: TensorDict, model_dir: str, segments: Sequence[str], pooling: str = "mean", temperature: float = 1.0
) -> list[Row]:
    rows = rows_of(out, segments)
    for row in rows:
        assert_row(row, model_dir, pooling, temperature)
    return rows


def assert_greedy(row: Row, model_dir: str, max_new_tokens: int, eos_id: int | None = None) -> None:
    """Check that each token is the best one after the tokens before it, and that the response ends where it should."""
    assert row.response_ids == hf_oracle.teacher_force(model_dir, row.prompt_ids, row.response_ids).argmax_T
    assert eos_id not in row.response_ids[:-1]
    assert row.response_ids[-1] == eos_id or len(row.response_ids) == max_new_tokens


def relative_error(found_D: torch.Tensor, expected_D: torch.Tensor) -> float:
    return float((found_D - expected_D).norm() / expected_D.norm())


def text_input(prompts: Sequence[str]) -> TensorDict:
    return TensorDict(text=Text(prompt=list(prompts), batch_size=len(prompts)), batch_size=len(prompts))


def tokens_input(prompts: Sequence[Sequence[int]]) -> TensorDict:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids)), batch_size=()) for ids in prompts])


def history_input(prompts: Sequence[str]) -> TensorDict:
    chats = History.from_chats([[{"role": "user", "content": prompt}] for prompt in prompts])
    return TensorDict(history=ChatHistory(prompt=chats, batch_size=len(prompts)), batch_size=len(prompts))


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Return ordinary ids, no special ones, that share no prefix with the ids of another seed."""
    return torch.randint(100, 40000, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
