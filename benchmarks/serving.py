"""What benchmarks with a server share: a served model, prompts that nobody has seen, and a cache that is empty."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from rounds import Call
from wide_model import save_random_wide

from torchrl_sglang_hidden import SGLangServer, demo_model, launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.records import Completion, EngineInfo, Request
from torchrl_sglang_hidden.sglang_api.checks import check_requests
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

FLUSH_TIMEOUT_S = 60.0
TIMEOUT_S = 1800.0


@contextmanager
def served(
    model: str, *, dtype: str, context_length: int, total_tokens: int, sleep_on_idle: bool = False, wide_layers: int = 1
) -> Iterator[LaunchedServer]:
    """Start a server for one model, and end it afterwards.

    Args:
        model: ``"smollm2"``, the demo model; ``"wide"``, see `wide_model`; or whatever `launch` takes.
        dtype: of weights and states.
        context_length: tokens of the longest prompt and its response.
        total_tokens: of all prompts and responses that are to run at once.
        sleep_on_idle: whether it leaves the cores to others while it has nothing to do.
        wide_layers: layers of the wide model, which can all be asked for.
    """
    with tempfile.TemporaryDirectory() as directory:
        if model == "wide":
            path = str(save_random_wide(Path(directory) / "wide", layers=wide_layers))
        else:
            path = str(demo_model()) if model == "smollm2" else model
        with launch(
            path,
            layers=(*range(wide_layers - 1), -1),
            dtype=dtype,
            context_length=context_length,
            max_total_tokens=total_tokens,
            # Stock return_hidden_states gives the rows of a prompt's last chunk only. Whole prompts, for all sides.
            chunked_prefill_size=-1,
            max_prefill_tokens=total_tokens,
            sleep_on_idle=sleep_on_idle,
        ) as server:
            yield server


@contextmanager
def client_of(server: SGLangServer) -> Iterator[httpx.Client]:
    """Open a plain HTTP client, for what goes past this package."""
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as client:
        yield client


def new_prompts(info: EngineInfo, count: int, length: int, seed: int) -> list[list[int]]:
    """Make prompts of random ids: no two begin alike, so that no prompt hits another's part of the prefix cache."""
    # The first ids of most vocabularies are special tokens.
    ids = torch.randint(16, info.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
    return [list(map(int, row)) for row in ids]


def greedy(new_tokens: int) -> dict[str, Any]:
    """Return SGLang's sampling parameters for exactly so many tokens, the likeliest ones."""
    return {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}


def settle(client: httpx.Client) -> None:
    """Wait until the server rests with an empty prefix cache, so that every side computes its own prompts."""
    # A short request: its answer comes when what the side before left behind, such as lists of numbers, is cleared.
    client.post("/generate", json={"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}).raise_for_status()
    client.post("/flush_cache", params={"timeout": FLUSH_TIMEOUT_S}).raise_for_status()


def ask(
    client: httpx.Client,
    make_requests: Callable[[], Sequence[Request]],
    info: EngineInfo,
    *,
    stock: dict[str, Any] | None = None,
    read_stock: Callable[[dict[str, Any]], Any] | None = None,
) -> Call:
    """Send one batch and read its answer, as `SGLangServer.generate` does; writing and reading are part of the time.

    Args:
        client: plain HTTP, which counts the bytes.
        make_requests: makes the batch.
        info: how the answer is to come.
        stock: parameters of SGLang's own, beside those of the requests.
        read_stock: turns what SGLang answers to them into tensors, row by row.

    Returns:
        The call; it found the completions, and in ``stock_rows`` what ``read_stock`` returned.
    """
    settle(client)
    start = time.perf_counter()
    requests = make_requests()
    check_requests(requests, info)
    response = client.post("/generate", json={**to_payload(requests, info, binary=False), **(stock or {})})
    response.raise_for_status()
    answers = response.json()
    completions = read_responses(requests, answers, info)
    stock_rows = [read_stock(answer) for answer in answers] if read_stock else []
    seconds = time.perf_counter() - start
    counts = {
        "http_bytes": response.num_bytes_downloaded,
        "shared_bytes": sum(map(_shared_bytes, answers, completions)),
        "new_tokens": sum(len(completion.response_ids) for completion in completions),
    }
    return Call(seconds, {"completions": completions, "stock_rows": stock_rows}, counts)


def _shared_bytes(answer: dict[str, Any], completion: Completion) -> int:
    """Count the bytes that came through shared memory: HTTP counts only the few that stay in the answer."""
    rows = completion.token_rows
    return rows.rows_ND.nbytes if rows is not None and "shared" in answer["meta_info"][CHANNEL][0]["rows"] else 0


def response_ids(found: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the tokens of each row that `ask` found."""
    return [completion.response_ids for completion in found["completions"]]
