"""Images in an engine of this process: `sglang.Engine` gives what a server does, which is what Hugging Face does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.completion_checks import assert_completion
from helpers.image_site import END, EVERYTHING, GREEDY, START
from helpers.logits_checks import assert_choices
from helpers.policy_batches import flat
from helpers.vlm_models import NUM_LAYERS, SAVERS, Writer

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


class InProcess:
    """Collected by the process that `in_process_log` starts, and not by name in this one."""

    @pytest.fixture(scope="class")
    def model_dir(self, smol_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(SAVERS["qwen2_5_vl"](tmp_path_factory.mktemp("images") / "qwen2_5_vl", smol_dir))

    @pytest.fixture(scope="class")
    def writer(self, model_dir: str) -> Writer:
        return Writer(model_dir)

    @pytest.fixture(scope="class")
    def engine(self, model_dir: str) -> Iterator[SGLangOffline]:
        with SGLangOffline(model_dir, dtype="float32", max_total_tokens=2000, layers=(0, 1, 2, 3)) as engine:
            yield engine

    def test_states_tokens_and_scores(self, engine: SGLangOffline, writer: Writer, model_dir: str) -> None:
        """Of prompts with 0, 1 and 2 images, cold and cached; a broken image is a named error."""
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
        whole = asked[1].images
        assert whole is not None
        broken = Images(whole.sent_ids, ("data:image/png;base64,AAAA",), whole.ranges, whole.placeholder)
        with pytest.raises(RequestRejectedError, match=r"\w"):
            engine.generate([Request(asked[1].prompt_ids, images=broken)])

    def test_a_policy(self, engine: SGLangOffline, writer: Writer) -> None:
        spec = HiddenSpec(("prompt",), spans={"image": Image(0)}, tokens=True)
        policy = SGLangHiddenWrapper(engine, hidden=spec, generate_kwargs=GREEDY, inplace=False)
        content = [{"type": "image", "image": writer.picture(1)}, {"type": "text", "text": "What?"}]
        (row,) = flat(policy(ragged(history=[[{"role": "user", "content": content}]])))
        request = writer.request(START, writer.picture(1), "What?", END)
        assert tuple(row["tokens"].prompt.tolist()) == request.prompt_ids
        (start, stop), states_PD = request.images.ranges[0], row["token_hidden_states"].prompt  # type: ignore[union-attr]
        torch.testing.assert_close(row["hidden_states"].spans["image"], states_PD[start:stop].mean(0))
        with pytest.raises(ImageError, match="an image's place without an image"):
            policy(ragged(history=[[{"role": "user", "content": [{"type": "image"}]}]]))


def test_in_process(in_process_log: str) -> None:
    for name in ("test_states_tokens_and_scores", "test_a_policy"):
        assert f"test_image_offline_engine.py::InProcess::{name} PASSED" in in_process_log
