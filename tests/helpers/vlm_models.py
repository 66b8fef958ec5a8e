"""Small random checkpoints that read images, with their processors, and requests with images for them.

The tokenizer is the demo model's with the tokens of images added; the vision towers have two or three layers. Random
weights see as sharply as learned ones: another image gives other states at once.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from torchrl_sglang_hidden.demo.vision_model import (
    QWEN_TOKENS,
    TEXT_SHAPE,
    TOWER_SHAPE,
    add_special_tokens,
    chatml_with_images,
    qwen_image_ids,
    save_random,
    save_random_qwen2_5_vl,
    text_ids,
)
from torchrl_sglang_hidden.records import Images, Request

NUM_LAYERS: int = TEXT_SHAPE["num_hidden_layers"]
PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
# Of each model: how many pixels a row of an image is wide and high.
PIXELS = {"qwen2_5_vl": 28, "qwen3_vl": 32, "pixtral": 16, "qwen2_vl": 28}
# "all" has the tests that run with every model run with those of `MORE_SAVERS` too, which `make test` leaves out.
MODELS_ENV = "TORCHRL_SGLANG_HIDDEN_IMAGE_MODELS"


def save_random_qwen3_vl(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Qwen3-VL of four layers and D=64; its tower adds to what layers 0 and 1 give (DeepStack)."""
    tokenizer = add_special_tokens(tokenizer_dir, QWEN_TOKENS)
    patch = PIXELS["qwen3_vl"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT_SHAPE, **text_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            **TOWER_SHAPE,
            "depth": 3,
            "out_hidden_size": 64,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **qwen_image_ids(tokenizer),
    )
    images = Qwen2VLImageProcessor(
        min_pixels=(2 * patch) ** 2,
        max_pixels=64 * (2 * patch) ** 2,
        patch_size=patch,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = chatml_with_images("<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=patch), chat_template=template)
    return save_random(Qwen3VLForConditionalGeneration(config), processor, directory)


def save_random_pixtral(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Pixtral, in Hugging Face's layout, of four layers and D=64: its images have breaks between lines."""
    tokenizer = add_special_tokens(tokenizer_dir, PIXTRAL_TOKENS)
    patch = PIXELS["pixtral"]
    config = LlavaConfig(
        text_config={**TEXT_SHAPE, **text_ids(tokenizer), "model_type": "mistral", "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 16 * patch,
            "patch_size": patch,
            "hidden_act": "silu",  # what SGLang's tower has, whatever the configuration says
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    images = PixtralImageProcessor(size={"longest_edge": 16 * patch}, patch_size={"height": patch, "width": patch})
    processor = PixtralProcessor(
        images,
        tokenizer,
        patch_size=patch,
        spatial_merge_size=1,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        chat_template=chatml_with_images("[IMG]"),
    )
    return save_random(LlavaForConditionalGeneration(config), processor, directory)


def save_random_qwen2_vl(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Qwen2-VL of four layers and D=64: the elder sister of Qwen2.5-VL, with another tower."""
    tokenizer = add_special_tokens(tokenizer_dir, QWEN_TOKENS)
    patch = PIXELS["qwen2_vl"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config={**TEXT_SHAPE, **text_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=False,
        **qwen_image_ids(tokenizer),
    )
    # SGLang takes these limits for every Qwen2-VL, whatever its processor says.
    images = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=1003520, patch_size=patch)
    template = chatml_with_images("<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    saved = save_random(Qwen2VLForConditionalGeneration(config), processor, directory)
    # SGLang reads the name that transformers wrote before its version 5.
    path = saved / "config.json"
    written = json.loads(path.read_text())
    written["vision_config"]["in_chans"] = 3
    path.write_text(json.dumps(written))
    return saved


SAVERS: dict[str, Callable[[Path, str], Path]] = {
    "qwen2_5_vl": save_random_qwen2_5_vl,
    "qwen3_vl": save_random_qwen3_vl,
    "pixtral": save_random_pixtral,
}
MORE_SAVERS: dict[str, Callable[[Path, str], Path]] = {"qwen2_vl": save_random_qwen2_vl}


def models_to_test() -> list[str]:
    return [*SAVERS, *(MORE_SAVERS if os.environ.get(MODELS_ENV) == "all" else ())]


# --- requests with images ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def processor_of(model_dir: str) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(model_dir)


def picture(seed: int, width: int, height: int) -> PILImage.Image:
    """Return an image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return PILImage.fromarray(pixels.numpy())


def uri_of(image: PILImage.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@functools.lru_cache(maxsize=256)
def image_of(uri: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


class Writer:
    """Writes prompts for one model: texts and images, in any order."""

    def __init__(self, model_dir: str) -> None:
        self.kind = Path(model_dir).name
        self.processor = processor_of(model_dir)
        tokenizer = self.processor.tokenizer
        self.token = "[IMG]" if self.kind == "pixtral" else "<|image_pad|>"
        self.placeholder: int = tokenizer.convert_tokens_to_ids(self.token)
        self.around = ("", "") if self.kind == "pixtral" else ("<|vision_start|>", "<|vision_end|>")

    def picture(self, seed: int, columns: int = 3, lines: int = 2) -> PILImage.Image:
        """Return an image that is ``columns * lines`` rows of the model, breaks apart."""
        return picture(seed, columns * PIXELS[self.kind], lines * PIXELS[self.kind])

    def ids_of(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.lru_cache(maxsize=256)  # noqa: B019  a writer lives as long as its server
    def rows(self, uri: str) -> tuple[int, ...]:
        return tuple(map(int, self.processor(text=[self.token], images=[image_of(uri)])["input_ids"][0]))

    def request(self, *parts: str | PILImage.Image | Sequence[int], **fields: Any) -> Request:
        """Return a request of texts, ids and images, one behind another; ``fields`` are the request's."""
        sent: list[int] = []
        prompt: list[int] = []
        ranges: list[tuple[int, int]] = []
        data: list[str] = []
        for part in parts:
            if not isinstance(part, PILImage.Image):
                ids = self.ids_of(part) if isinstance(part, str) else list(part)
                sent, prompt = sent + ids, prompt + ids
                continue
            data.append(uri_of(part))
            before, after = map(self.ids_of, self.around)
            rows = self.rows(data[-1])
            sent += [*before, self.placeholder, *after]
            ranges.append((len(prompt) + len(before), len(prompt) + len(before) + len(rows)))
            prompt += [*before, *rows, *after]
        images = Images(tuple(sent), tuple(data), tuple(ranges), self.placeholder) if data else None
        return Request(tuple(prompt), images=images, **fields)

    def text(self, *parts: str | PILImage.Image) -> str:
        """Return the same parts as one text, as a processor takes it."""
        before, after = self.around
        return "".join(part if isinstance(part, str) else before + self.token + after for part in parts)
