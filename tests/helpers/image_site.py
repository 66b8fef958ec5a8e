"""A server of a small random model that reads images: prompts for it, and answers held against Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from helpers import user_constraints
from helpers.completion_checks import assert_completion
from helpers.vlm_models import MORE_SAVERS, NUM_LAYERS, SAVERS, Writer
from torchrl_sglang_hidden import HiddenSpec, launch
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.records import Completion, Request
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

# Chunks of fewer rows than an image has, and a KV cache so small that two dozen requests do not fit.
CHUNK, CACHE_TOKENS, MOST_IMAGES = 32, 1000, 4
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 0, "temperature": 0.0}
EVERYTHING = HiddenSpec(("prompt", "response", "full"), layers=(0, 1, 2, 3, -1), tokens=True)
START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class ImageSite:
    """A server of one model, and what makes prompts for it.

    Its tests share the server and its prefix cache: what needs a cold one begins its prompts with ``first_ids`` that no
    other test has.
    """

    server: LaunchedServer
    model_dir: str
    http: httpx.Client
    first_ids: tuple[int, ...] = ()

    @functools.cached_property
    def writer(self) -> Writer:
        return Writer(self.model_dir)

    def request(self, *parts: Any, **fields: Any) -> Request:
        fields = {"sampling": GREEDY, "hidden": EVERYTHING, **fields}
        return self.writer.request(self.first_ids, START, *parts, END, **fields)

    def text(self, *parts: Any) -> str:
        """Return the text of the same prompt without `first_ids`, with one placeholder for each image."""
        return self.writer.text(START, *parts, END)

    def send(self, requests: Sequence[Request]) -> tuple[list[Completion], list[int]]:
        """Send requests as the client does, check the answers, and tell how many rows came from the prefix cache."""
        self.server._check(requests, self.server.info)
        rows = self.http.post("/generate", json=to_payload(requests, self.server.info, binary=False)).json()
        completions = read_responses(requests, rows, self.server.info)
        self.check(requests, completions)
        return completions, [row["meta_info"]["cached_tokens"] for row in rows]

    def check(self, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
        """Hold states and log-probs against Hugging Face, and greedy tokens too."""
        for request, found in zip(requests, completions, strict=True):
            truth = assert_completion(request, found, self.model_dir, NUM_LAYERS)
            if request.sampling.get("temperature") == 0 and found.response_ids:
                assert list(found.response_ids) == truth.argmax_T


@contextmanager
def serve_images(kind: str, directory: Path, smol_dir: str) -> Iterator[ImageSite]:
    """Make a model of a kind of `SAVERS` or `MORE_SAVERS`, and serve it."""
    model_dir = str({**SAVERS, **MORE_SAVERS}[kind](directory / kind, smol_dir))
    with (
        launch(
            model_dir,
            dtype="float32",
            layers=(0, 1, 2, 3),
            chunked_prefill_size=CHUNK,
            enable_mixed_chunk=True,
            max_total_tokens=CACHE_TOKENS,
            max_running_requests=24,
            schedule_conservativeness=0.01,
            limit_mm_data_per_request={"image": MOST_IMAGES},
            constraint_modules=(user_constraints.__name__,),
            sleep_on_idle=True,
            log_file=directory / "server.log",
        ) as server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http,
    ):
        yield ImageSite(server, model_dir, http)
