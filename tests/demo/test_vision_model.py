"""The demo model that reads images: what is written, once, and what it leaves of the program that asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.vlm_models import picture
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from torchrl_sglang_hidden.demo import cache, vision_model
from torchrl_sglang_hidden.errors import DemoModelError


@pytest.fixture
def empty_cache(tmp_path: Path, smol_dir: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache beside the demo model, whose tokenizer is read."""
    monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(vision_model, "demo_model", lambda **options: Path(smol_dir))
    return tmp_path / "cache"


def found(directory: Path) -> list[str]:
    # filelock keeps its lock file on some systems and removes it on others.
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def test_a_made_model_is_whole_and_is_made_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vision_model.demo_vision_model()
    assert capsys.readouterr() == ("", ""), "a notebook shows it for ever"
    assert found(empty_cache) == [path.name]
    assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(vision_model, "save_random_qwen2_5_vl", lambda *given: pytest.fail("made again"))
    monkeypatch.setattr(vision_model, "demo_model", lambda **options: pytest.fail("asked for its tokenizer again"))
    assert vision_model.demo_vision_model() == path

    config, processor = AutoConfig.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.vocab_size == len(processor.tokenizer)
    sizes = {(28, 28): 1, (84, 56): 6, (224, 224): 64, (2000, 1000): 55}
    for (width, height), rows in sizes.items():
        ids = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (width, height))])["input_ids"][0]
        assert (len(ids), set(ids)) == (rows, {config.image_token_id})


def test_it_sees_every_image_differently_and_is_always_the_same_model(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    path = vision_model.demo_vision_model()
    # A program that seeded its generator draws what it would have drawn.
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / "other"))
    weights = (path / "model.safetensors").read_bytes()
    assert (vision_model.demo_vision_model() / "model.safetensors").read_bytes() == weights

    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    logits = []
    for seed in (1, 2, 1):
        inputs = processor(text=[text], images=[picture(seed, 84, 56)], return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1], atol=0.01)


def test_what_another_process_made_while_this_one_waited_is_kept(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(lock: Path) -> nullcontext[None]:
        lock.with_suffix("").mkdir()
        return nullcontext()

    monkeypatch.setattr(cache, "FileLock", wait)
    monkeypatch.setattr(vision_model, "save_random_qwen2_5_vl", lambda *given: pytest.fail("made again"))
    assert vision_model.demo_vision_model().is_dir()


def test_an_interrupted_write_leaves_no_half_model(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path, tokenizer_dir: str) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(vision_model, "save_random_qwen2_5_vl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vision_model.demo_vision_model()
    assert found(empty_cache) == []


def test_a_cache_that_cannot_be_written_says_how_to_move_it(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.CACHE_ENV, str(tmp_path / "file" / "cache"))
    with pytest.raises(DemoModelError, match=f"free 30 MB there, or set {cache.CACHE_ENV}"):
        vision_model.demo_vision_model()


def test_a_model_in_the_cache_is_returned_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / vision_model._DIRECTORY).mkdir()
    code = (
        "import json, sys\n"
        "from torchrl_sglang_hidden import demo_vision_model\n"
        "path = demo_vision_model()\n"
        "print(json.dumps([str(path), sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, cache.CACHE_ENV: str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(result.stdout) == [str(tmp_path / vision_model._DIRECTORY), []]
