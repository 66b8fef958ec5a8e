"""An environment whose observations are pictures beside numbers of words, and the vectors of prompts with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Unbounded

from helpers.fake_engine import WORDS, RecordingEngine, RecordingServer, model_page, server_page, state_D
from helpers.fake_images import IMAGE_ID, seen_ids
from helpers.word_env import TOKENIZER, WordEnv
from helpers.word_processor import WordProcessor, rows_of
from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper
from torchrl_sglang_hidden.images.image_data import read_image
from torchrl_sglang_hidden.records import Images

PLACE = WORDS[IMAGE_ID]
PROMPT = PLACE + " You see w{observation}"
READS: dict[str, Any] = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def picture_policy(engine: Any = None, **options: Any) -> tuple[SGLangHiddenWrapper, Any]:
    """Return a policy over an engine that takes images, which reads prompts, and the engine."""
    if engine is None:
        engine = RecordingEngine(tokenizer=TOKENIZER, takes_images=True, image_token_id=IMAGE_ID)
    arguments = {"tokenizer": WordProcessor(TOKENIZER), "input_mode": "text", **READS, **options}
    return SGLangHiddenWrapper(engine, **arguments), engine


def picture_server(model_path: str = "m") -> RecordingServer:
    """Return a server of the fake engine whose model takes images."""
    server = RecordingServer()
    server.pages["/model_info"] = (200, {**model_page(model_path), "has_image_understanding": True})
    server.pages["/server_info"] = (200, server_page(image_token_id=IMAGE_ID))
    return server


def pixels_of(numbers: torch.Tensor, *, channels_first: bool = False, seed: int = 0) -> torch.Tensor:
    """Return for numbers ``[*batch, 1]`` pictures of three pixels, uint8 ``[*batch, 1, 3, 3]``, or ``[*, 3, 3, 1]``."""
    shape = (3, 3, 1) if channels_first else (1, 3, 3)
    flat = [
        torch.randint(256, shape, generator=torch.Generator().manual_seed(1000 * seed + int(number)))
        for number in numbers.flatten()
    ]
    return torch.stack(flat).to(torch.uint8).reshape(*numbers.shape[:-1], *shape)


class PictureEnv(WordEnv):
    """Shows at ``pixels`` a picture of each observation, and at ``("agent", "view")`` another one, channels first."""

    def __init__(self, lengths: int | Sequence[int] = 100, start: int = 0) -> None:
        super().__init__(lengths, start)
        batch = self.batch_size
        self.observation_spec["pixels"] = Unbounded((*batch, 1, 3, 3), dtype=torch.uint8)
        self.observation_spec["agent", "view"] = Unbounded((*batch, 3, 3, 1), dtype=torch.uint8)

    def _seen(self) -> TensorDict:
        return with_pictures(super()._seen())


def with_pictures(td: TensorDictBase) -> Any:
    """Write the pictures of the observations of a TensorDict into it."""
    td["pixels"] = pixels_of(td["observation"])
    td["agent", "view"] = pixels_of(td["observation"], channels_first=True, seed=1)
    return td


def vector_of(text: str, *images: Any) -> torch.Tensor:
    """Return what a text with placeholders of images of three pixels is pooled to, ``[D]``."""
    short = TOKENIZER(text)["input_ids"]
    ids: list[int] = []
    ranges = []
    for token_id in short:
        if token_id == IMAGE_ID:
            ranges.append((len(ids), len(ids) + 3))
        ids += rows_of(3) if token_id == IMAGE_ID else [token_id]
    uris = tuple(read_image("", image).uri for image in images)
    assert len(ranges) == len(uris)
    seen = seen_ids(ids, Images(tuple(short), uris, tuple(ranges), IMAGE_ID))
    return torch.stack([state_D(seen, place) for place in range(len(seen))]).mean(0)


def vectors_of(numbers: torch.Tensor) -> torch.Tensor:
    """Return the vectors of observations ``[*, 1]`` and their pictures at ``pixels``, as ``[*, D]``."""
    found = [vector_of(PROMPT.format(observation=int(n)), pixels_of(n[None])) for n in numbers.flatten()]
    return torch.stack(found).reshape(*numbers.shape[:-1], -1)
