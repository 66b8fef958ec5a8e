"""Data sets for recordings over the fake engine, what must come out of them, and a program that a test can kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_leaf_nontensor, is_non_tensor

from helpers.fake_engine import pooled_D, response_of, states_ND, tiny_tokenizer
from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, connect, record_hidden_states
from torchrl_sglang_hidden.rl import record as record_module

TOKENIZER = tiny_tokenizer()
PROMPT = "w{number} w1 {words}"
SEGMENTS = ("prompt", "response")


def data_rows(count: int, *, episode: int = 0) -> list[dict[str, Any]]:
    """Return rows of a data set: a number, words, a picture, and the end of every ``episode``-th row's episode."""
    return [
        {
            "number": index % 90,
            "words": f"w{index % 7} w{index % 5}",
            "obs": np.full((2, 3), index, dtype=np.float32),
            "done": bool(episode) and index % episode == episode - 1,
        }
        for index in range(count)
    ]


def ids_of(row: dict[str, Any]) -> list[int]:
    """Return the token ids of the prompt of a row."""
    return list(TOKENIZER(PROMPT.format(**row))["input_ids"])


def vector_of(row: dict[str, Any], segment: str, pooling: str = "mean") -> torch.Tensor:
    """Return what a segment of a row is pooled to, ``[D]``, where a response is generated."""
    ids = ids_of(row)
    return pooled_D(states_ND(ids, response_of(ids)), segment, pooling, len(ids)).float()  # type: ignore[arg-type]


def assert_same(found: TensorDictBase, expected: TensorDictBase) -> None:
    """Check that two recordings' rows hold the same bits, under the same keys and in the same order."""
    assert found.batch_size == expected.batch_size
    keys = set(found.keys(True, True, is_leaf=is_leaf_nontensor))
    assert keys == set(expected.keys(True, True, is_leaf=is_leaf_nontensor))
    for key in keys:
        for one, other in itertools.zip_longest(leaf_rows(found, key), leaf_rows(expected, key)):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype, key
                assert one.shape == other.shape, key
                assert bits_of(one) == bits_of(other), key
            else:
                assert one == other, key


def bits_of(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leaf_rows(td: TensorDictBase, key: Any) -> list[Any]:
    """Return the values of a leaf, one for each row."""
    return [value.tolist() if is_non_tensor(value) else value for value in (row.get(key) for row in td.unbind(0))]


def record_slowly(url: str, path: str, count: int, ready: Any) -> None:
    """Record over a server, a shard for each call: the program of a process that is killed meanwhile."""
    torch.set_num_threads(1)
    record_module.SHARD_SECONDS = 0.0
    with connect(url) as engine:
        policy = SGLangHiddenWrapper(
            engine, tokenizer=TOKENIZER, input_mode="text", hidden=HiddenSpec(SEGMENTS), generate_kwargs={}
        )
        ready.set()
        record_hidden_states(
            policy, data_rows(count), Path(path), prompt=PROMPT, batch_size=5, tokens=True, progress=False
        )
