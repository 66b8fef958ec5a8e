"""What the benchmarks share: a served model, prompts that nobody has seen, and a cache that is empty."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from wide_model import save_random_wide

from torchrl_sglang_hidden import SGLangServer, demo_model, launch
from torchrl_sglang_hidden.records import EngineInfo

FLUSH_TIMEOUT_S = 60.0


@contextmanager
def served(
    model: str, *, dtype: str, context_length: int, total_tokens: int, sleep_on_idle: bool = False
) -> Iterator[SGLangServer]:
    """Start a server for one model, and end it afterwards.

    Args:
        model: ``"smollm2"``, the demo model; ``"wide"``, see `wide_model`; or whatever `launch` takes.
        dtype: of weights and states.
        context_length: tokens of the longest prompt and its response.
        total_tokens: of all prompts and responses that are to run at once.
        sleep_on_idle: whether it leaves the cores to others while it has nothing to do.
    """
    with tempfile.TemporaryDirectory() as directory:
        if model == "wide":
            path = str(save_random_wide(Path(directory) / "wide"))
        else:
            path = str(demo_model()) if model == "smollm2" else model
        with launch(
            path,
            dtype=dtype,
            context_length=context_length,
            max_total_tokens=total_tokens,
            # Stock return_hidden_states gives the rows of a prompt's last chunk only. Whole prompts, for all sides.
            chunked_prefill_size=-1,
            max_prefill_tokens=total_tokens,
            sleep_on_idle=sleep_on_idle,
        ) as server:
            yield server


def new_prompts(info: EngineInfo, count: int, length: int, seed: int) -> list[list[int]]:
    """Make prompts of random ids: no two begin alike, so that no prompt hits another's part of the prefix cache."""
    # The first ids of most vocabularies are special tokens.
    ids = torch.randint(16, info.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
    return [list(map(int, row)) for row in ids]


def settle(client: httpx.Client) -> None:
    """Wait until the server rests with an empty prefix cache, so that every side computes its own prompts."""
    # A short request: its answer comes when what the side before left behind, such as lists of numbers, is cleared.
    client.post("/generate", json={"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}).raise_for_status()
    client.post("/flush_cache", params={"timeout": FLUSH_TIMEOUT_S}).raise_for_status()
