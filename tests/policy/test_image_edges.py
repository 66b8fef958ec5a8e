"""Images where prompts are read again or in parts: expanded ids, candidates, resumed rows, rows that go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_engine import EOS_ID, RecordingEngine
from helpers.fake_images import IMAGE_ID
from helpers.policy_batches import TOKENIZER, flat
from helpers.word_processor import WordProcessor, picture, rows_of

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, ragged
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

CAT, DOT = picture(1, 3), picture(2, 1)


def make(mode: str, processor: Any = None, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    reads = {"takes_images": True, "image_token_id": IMAGE_ID, "respond": options.pop("respond", None)}
    engine = RecordingEngine(tokenizer=TOKENIZER, **{name: value for name, value in reads.items() if value})
    given = {"tokenizer": processor or WordProcessor(TOKENIZER), "input_mode": mode, "hidden": HiddenSpec(SEGMENTS)}
    return SGLangHiddenWrapper(engine, **{**given, **options}), engine


# --- expanded ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[DOT], [DOT, DOT], [CAT, DOT]])
def test_an_image_of_one_row_and_a_break_is_expanded_once(images: list[Any]) -> None:
    """Its expanded ids have one placeholder, as the short form has."""
    policy, engine = make("tokens", WordProcessor(TOKENIZER, breaks=True))
    short = [9, *[IMAGE_ID] * len(images), 8]
    (out,) = flat(policy(ragged(tokens=[short], images=[images])))
    expanded = out["tokens"].prompt.tolist()
    assert expanded == [9, *(i for one in images for i in rows_of(one.width, breaks=True)), 8]
    (again,) = flat(policy(ragged(tokens=[expanded], images=[images])))
    assert again["tokens"].prompt.tolist() == expanded
    assert [payload["input_ids"] for payload in engine.payloads] == [[short]] * 2
    scorer = policy.get_new_version(generate=False, images_key="prompt_images", inplace=False, pad_output=True)
    assert torch.equal(flat(scorer(out[None]))[0]["tokens"].full, out["tokens"].full)
