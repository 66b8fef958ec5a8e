"""A small vision-language model with random weights: for images without a GPU and a model hub.

Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sglang_hidden.demo.cache import cached_path, make_once
from torchrl_sglang_hidden.demo.model import demo_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

__all__ = [
    "QWEN_TOKENS",
    "TEXT_SHAPE",
    "TOWER_SHAPE",
    "add_special_tokens",
    "chatml_with_images",
    "demo_vision_model",
    "qwen_image_ids",
    "save_random",
    "save_random_qwen2_5_vl",
    "text_ids",
]

# The last part counts the versions of what is written here: raise it when the recipe changes.
_DIRECTORY = "random-qwen2.5-vl-1"

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEXT_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TOWER_SHAPE: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}

# So wide that the two best tokens lie far apart, and what an image says reaches every later row.
_WEIGHT_SPREAD, _EMBEDDING_SPREAD, _NORM_SPREAD = 0.6, 0.6, 0.1
_PATCH = 14
# A row of the prompt is a square of four patches. An image of more rows than this is made smaller.
_MAX_ROWS = 64


def demo_vision_model(*, progress: bool = True) -> Path:
    """Return the path of a small Qwen2.5-VL with **random weights**; make it if needed.

    The weights were drawn, never trained: another pixel gives other states, and what it says of an image makes no
    sense. It is for trying how images go in and what comes back, without a GPU or a model hub, and for tests; for
    anything else serve a trained vision-language model.

    3 million parameters, 4 layers, hidden size 64, a context of 1024 tokens, ChatML template. The tokenizer is that of
    `demo_model`, which the first call makes too, with the tokens of images added. An image is one row of the prompt for
    each 28 × 28 pixels, and at most 64 rows: a larger one is made smaller.

    Args:
        progress: of `demo_model`, during the first call.

    Returns:
        Directory in the user's cache, or under ``TORCHRL_SGLANG_HIDDEN_CACHE``. A directory that exists is complete.

    Raises:
        DemoModelError: the demo model could not be made, or the cache cannot be written.
    """
    target = cached_path(_DIRECTORY)
    if target.is_dir():
        return target
    tokenizer_dir = str(demo_model(progress=progress))
    return make_once(target, lambda _, checkpoint: save_random_qwen2_5_vl(checkpoint, tokenizer_dir), megabytes=30)


def save_random_qwen2_5_vl(directory: Path, tokenizer_dir: str) -> Path:
    """Save a Qwen2.5-VL of four layers and D=64, whose positions are those of M-RoPE."""
    # Here and not above: transformers takes longer to import than the rest of this package together.
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = add_special_tokens(tokenizer_dir, QWEN_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 1e4, "type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_SHAPE, **text_ids(tokenizer), "rope_parameters": rope},
        vision_config={
            **TOWER_SHAPE,
            "out_hidden_size": TEXT_SHAPE["hidden_size"],
            "patch_size": _PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * _PATCH,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **qwen_image_ids(tokenizer),
    )
    row_pixels = (2 * _PATCH) ** 2
    images = Qwen2VLImageProcessor(min_pixels=row_pixels, max_pixels=_MAX_ROWS * row_pixels)
    template = chatml_with_images("<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    # The constructor draws weights of its own, from the generator that the user's program draws from.
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return save_random(model, processor, directory)


def add_special_tokens(tokenizer_dir: str, names: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with more special tokens."""
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_base import AddedToken

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    return tokenizer


def text_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a model's configuration says of a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen_image_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a Qwen-VL's configuration says of `QWEN_TOKENS`."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def chatml_with_images(image: str) -> str:
    """Return a ChatML template that writes ``image`` for every part of a message that is one."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' or part['type'] == 'image_url' or 'image' in part %}" + image + "{% elif 'text' "
        "in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def save_random(model: PreTrainedModel, processor: ProcessorMixin, directory: Path) -> Path:
    """Draw a model's weights, always the same, and save it in float32 with its processor."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                around = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(around + _NORM_SPREAD * noise)
            else:
                spread = _EMBEDDING_SPREAD if "embed" in name else _WEIGHT_SPREAD / parameter.shape[-1] ** 0.5
                parameter.copy_(spread * noise)
    with _without_bars():
        model.float().save_pretrained(directory)
    processor.save_pretrained(directory)
    # safetensors writes for the owner only, and the cache may be shared.
    (directory / "model.safetensors").chmod(0o644)
    return directory


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for a fifth of a second, which stays on the screen and in notebooks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
