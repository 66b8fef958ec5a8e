"""A processor over the fake engine's words, as Hugging Face's are: an image becomes as many rows as it has pixels."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from helpers.fake_engine import WORDS
from helpers.fake_images import IMAGE_ID

# Without a blank at either end: text and decoded ids are the same.
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else ' ' }}<|start|> {{ message.role }} "
    "{% if message.content is string %}{{ message.content }} {% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + WORDS[IMAGE_ID] + " {% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %} <|start|> assistant{% endif %}"
)
# Stands behind every line of an image, as Pixtral's [IMG_BREAK] does.
BREAK = "w88"
MOST_PIXELS = 64


def picture(seed: int, width: int = 3, height: int = 1) -> Image.Image:
    """Return an image of noise, of one row for each pixel and each line's break."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def rows_of(width: int = 3, height: int = 1, *, breaks: bool = False) -> list[int]:
    """Return the ids that an image of these pixels becomes."""
    line = [IMAGE_ID] * width + ([WORDS.index(BREAK)] if breaks else [])
    return line * height


class WordProcessor:
    """Args: the tokenizer; a chat template that takes parts, or None; whether lines end with a break."""

    image_token, image_token_id = WORDS[IMAGE_ID], IMAGE_ID

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = PARTS_TEMPLATE, *, breaks: bool = False
    ) -> None:
        self.tokenizer, self.chat_template, self.breaks = tokenizer, chat_template, breaks
        # How many rows a pixel is.
        self.image_processor = SimpleNamespace(rows=1)
        # A list, which copies of a processor share.
        self.calls: list[None] = []

    def __call__(self, text: Sequence[str], images: Any, **options: Any) -> dict[str, Any]:
        self.calls.append(None)
        flat = [image for row in images for image in (row if isinstance(row, list) else [row])]
        if any(image.width * image.height > MOST_PIXELS for image in flat):
            raise ValueError("too many pixels for a vision tower of words")
        rest = list(flat)
        ids: list[int] = []
        for token_id in self.tokenizer(text[0], add_special_tokens=False)["input_ids"]:
            if token_id == IMAGE_ID and rest:
                image = rest.pop(0)
                ids += rows_of(image.width * self.image_processor.rows, image.height, breaks=self.breaks)
            else:
                ids.append(token_id)
        out = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "mm_token_type_ids": [[0] * len(ids)]}
        if options.get("return_tensors") == "pt":
            pixels = [torch.from_numpy(np.array(image)).float().reshape(-1, 3) for image in flat]
            sizes = torch.tensor([[image.height, image.width] for image in flat])
            return {**out, "pixel_values": torch.cat(pixels), "image_sizes": sizes}
        return out
