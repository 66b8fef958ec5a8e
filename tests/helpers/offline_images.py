"""Checks of images in an engine of this process: it gives what a server gives, which is what Hugging Face does.

Run by user_engine_program.py, whose process such an engine has to itself; test_offline.py asks for each by name.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers.completion_checks import assert_completion
from helpers.image_site import END, EVERYTHING, GREEDY, START
from helpers.logits_checks import assert_choices
from helpers.policy_batches import flat
from helpers.vlm_models import NUM_LAYERS, Writer
from torchrl_sglang_hidden import (
    HiddenSpec,
    Image,
    ImageError,
    RequestRejectedError,
    SGLangHiddenWrapper,
    SGLangOffline,
    ragged,
)
from torchrl_sglang_hidden.records import Images, Request


def check_completions(engine: SGLangOffline, model_dir: str) -> None:
    """Hold prompts with 0, 1 and 2 images against Hugging Face, cold and cached."""
    writer = Writer(model_dir)
    assert (engine.info.takes_images, engine.info.image_token_id) == (True, writer.placeholder)
    parts = [["Hello"], [writer.picture(1), "What?"], ["A", writer.picture(2), "or", writer.picture(3, 2, 2)]]
    asked = [writer.request(START, *one, END, sampling=GREEDY, hidden=EVERYTHING) for one in parts]
    for _ in range(2):
        for request, found in zip(asked, engine.generate(asked), strict=True):
            truth = assert_completion(request, found, model_dir, NUM_LAYERS)
            assert list(found.response_ids) == truth.argmax_T
    reads = {"score_prompt": True, "sampling": {"max_new_tokens": 0}}
    scored = [Request(request.prompt_ids, images=request.images, **reads) for request in asked]
    for request, found in zip(scored, engine.generate(scored), strict=True):
        assert_choices(request, found, model_dir)


def check_policy(engine: SGLangOffline, model_dir: str) -> None:
    writer = Writer(model_dir)
    spec = HiddenSpec(("prompt",), spans={"image": Image(0)}, tokens=True)
    policy = SGLangHiddenWrapper(engine, hidden=spec, generate_kwargs=GREEDY, inplace=False)
    content = [{"type": "image", "image": writer.picture(1)}, {"type": "text", "text": "What?"}]
    (row,) = flat(policy(ragged(history=[[{"role": "user", "content": content}]])))
    request = writer.request(START, writer.picture(1), "What?", END)
    assert tuple(row["tokens"].prompt.tolist()) == request.prompt_ids
    (start, stop), states_PD = request.images.ranges[0], row["token_hidden_states"].prompt  # type: ignore[union-attr]
    torch.testing.assert_close(row["hidden_states"].spans["image"], states_PD[start:stop].mean(0))


def check_refusals(engine: SGLangOffline, model_dir: str) -> None:
    """What is no image is a named error, whether the client or SGLang finds it, and the engine goes on."""
    writer = Writer(model_dir)
    policy = SGLangHiddenWrapper(engine, hidden=None, generate_kwargs=GREEDY)
    with pytest.raises(ImageError, match="an image's place without an image"):
        policy(ragged(history=[[{"role": "user", "content": [{"type": "image"}]}]]))
    good = writer.request(START, writer.picture(1), "What?", END, sampling=GREEDY, hidden=EVERYTHING)
    whole = good.images
    assert whole is not None
    broken = Images(whole.sent_ids, ("data:image/png;base64,AAAA",), whole.ranges, whole.placeholder)
    with pytest.raises(RequestRejectedError, match=r"\w"):
        engine.generate([Request(good.prompt_ids, images=broken)])
    [found] = engine.generate([good])
    assert_completion(good, found, model_dir, NUM_LAYERS)


CHECKS: dict[str, Callable[[SGLangOffline, str], None]] = {
    "completions": check_completions,
    "policy": check_policy,
    "refusals": check_refusals,
}
