"""What an image is expanded to, by processors as Hugging Face saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.vlm_models import MORE_SAVERS, SAVERS, picture, uri_of
from transformers import AutoProcessor

from torchrl_sglang_hidden.images.expansion import ImageProcessor
from torchrl_sglang_hidden.images.image_data import read_image


@pytest.mark.parametrize(("kind", "num_rows"), [("qwen2_vl", 4), ("qwen2_5_vl", 1)])
def test_a_small_image_is_as_large_as_sglang_makes_it(smol_dir: str, tmp_path: Path, kind: str, num_rows: int) -> None:
    """SGLang has limits of its own for Qwen2-VL, and does not read those of the model's processor."""
    model_dir = str({**SAVERS, **MORE_SAVERS}[kind](tmp_path / kind, smol_dir))
    processor = AutoProcessor.from_pretrained(model_dir, size={"shortest_edge": 28**2, "longest_edge": 64 * 28**2})
    processor.save_pretrained(model_dir)
    assert AutoProcessor.from_pretrained(model_dir).image_processor.size.shortest_edge == 28**2
    image = read_image("", uri_of(picture(1, 28, 28)))
    assert len(ImageProcessor(None, model_dir, takes_images=True).expansion("", image)) == num_rows
    given = ImageProcessor(processor, model_dir, takes_images=True)
    assert len(given.expansion("", image)) == 1, "a processor of the user's stays as it is"
