"""Images where prompts are read again or in parts: expanded ids, candidates, resumed rows, rows that go wrong."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_engine import WORDS, RecordingEngine
from helpers.fake_images import IMAGE_ID
from helpers.policy_batches import TOKENIZER, flat, tokens_batch
from helpers.word_processor import WordProcessor, picture, rows_of
from tensordict import TensorDictBase, lazy_stack
from tokenizers import decoders

from torchrl_sglang_hidden import (
    CapabilityError,
    HiddenSpec,
    ImageError,
    MissingKeyError,
    SGLangHiddenWrapper,
    TokenIdError,
    TokenMask,
    ragged,
)
from torchrl_sglang_hidden.images.image_data import read_image
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

PLACE = WORDS[IMAGE_ID]

CAT, DOT = picture(1, 3), picture(2, 1)
PIXELS = torch.tensor(np.array(CAT))[None]
OPTIONS: dict[str, Any] = {"on_error": "nan", "generate_kwargs": {"max_new_tokens": 8}}


class Encodes(WordProcessor):
    """A processor of a model whose prompts SGLang encodes again. Its decoded words have no blank between them."""

    def __init__(self) -> None:
        tokenizer = copy.deepcopy(TOKENIZER)
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        super().__init__(tokenizer)


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


@pytest.mark.parametrize("width", [3, 5, 6])
@pytest.mark.parametrize("form", ["short", "expanded"])
def test_a_mask_is_over_the_ids_as_they_are_given(form: str, width: int) -> None:
    """Padded, short ids may be as wide as the expanded ones are long."""
    policy, engine = make("tokens", hidden=HiddenSpec(("prompt",), spans={"mine": TokenMask("mine")}), **OPTIONS)
    ids = [9, *[IMAGE_ID] * (1 if form == "short" else 3), 8]
    pads = max(width - len(ids), 0)
    for token_id, expected in ((9, (0, 1)), (IMAGE_ID, (1, 4)), (8, (4, 5))):
        mask = [False] * pads + [one == token_id for one in ids]
        real = [False] * pads + [True] * len(ids)
        batch = tokens_batch(
            [0] * pads + ids, attention_mask=torch.tensor([real]), mine=torch.tensor([mask]), images=PIXELS
        )
        out = policy(batch)
        assert engine.requests[-1].spans["mine"].intervals == (expected,)
        policy.resume(paused(out, 0))
        assert engine.requests[-1].prompt_ids[:5] == engine.requests[-2].prompt_ids


def test_a_rollouts_text_with_an_image_is_scored_without_a_warning() -> None:
    """Its ids are expanded, and the text has a placeholder: they are the same prompt."""
    policy, _ = make("text", respond=lambda ids: [9, 8])
    out = policy(ragged(text=[f"{PLACE} w1 "], images=[[CAT]]))
    scorer = policy.get_new_version(generate=False, images_key="prompt_images", inplace=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (scored,) = flat(scorer(out))
    assert torch.equal(scored["tokens"].full, flat(out)[0]["tokens"].full)


# --- forms of what stands at images_key ------------------------------------------------------------------------------


def file_bytes(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def array_of(*images: Any) -> np.ndarray[Any, Any]:
    found = np.empty(len(images), dtype=object)
    found[:] = images
    return found


FORMS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [CAT, DOT],
    "a tuple": lambda: (CAT, DOT),
    "an array of images": lambda: array_of(CAT, DOT),
    "a tuple of URIs": lambda: tuple(read_image("", one).uri for one in (CAT, DOT)),
    "an array of URIs": lambda: np.array([read_image("", one).uri for one in (CAT, DOT)]),
    "arrays": lambda: [np.array(CAT), np.array(DOT)],
    "mappings": lambda: [{"bytes": file_bytes(one), "path": None} for one in (CAT, DOT)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_rows_images(form: str) -> None:
    policy, engine = make("text")
    policy(ragged(text=[f"{PLACE} w1 {PLACE}", "w2"], images=[FORMS[form](), None]))
    ((first, second), none) = engine.payloads[0]["image_data"]
    for found, expected in ((first, CAT), (second, DOT)):
        assert np.array_equal(np.array(read_image("", found).open()), np.array(expected))
    assert none == []


def test_a_mapping_is_one_image() -> None:
    """A TensorDict makes one of its own of a dict."""
    policy, engine = make("text")
    policy(ragged(text=[PLACE], images=[{"bytes": file_bytes(CAT), "path": None}]))
    assert [len(data) for data in engine.payloads[0]["image_data"]] == [1]


MORE: dict[str, dict[str, Any]] = {
    "a size": {"type": "image", "image": CAT, "max_pixels": 64},
    "a caption": {"type": "image", "image": CAT, "text": "w2"},
    "a detail": {"type": "image_url", "image_url": {"url": read_image("", CAT).uri, "detail": "low"}},
}


@pytest.mark.parametrize("case", MORE)
def test_what_a_part_says_of_its_image_is_not_ignored(case: str) -> None:
    policy, engine = make("history")
    with pytest.raises(ImageError, match=r"message 0, part 0: (has \['(max_pixels|text)'\]|detail='low')"):
        policy(ragged(history=[[{"role": "user", "content": [MORE[case]]}]]))
    assert not engine.payloads
    open_fields = {"type": "image", "image": CAT, "text": "", "max_pixels": None}
    policy(ragged(history=[[{"role": "user", "content": [open_fields]}]]))
    assert len(engine.payloads) == 1


# --- the processor ---------------------------------------------------------------------------------------------------


def test_what_the_user_sets_later_does_not_reach_the_policys_processor() -> None:
    """The rows of a size are kept, so that all sizes must be those of one processor."""
    processor = WordProcessor(TOKENIZER)
    policy, engine = make("text", processor)
    policy(ragged(text=[PLACE], images=[CAT]))
    processor.image_processor.rows = 2
    policy(ragged(text=[PLACE, PLACE], images=[CAT, DOT]))
    assert [len(request.prompt_ids) for request in engine.requests] == [3, 3, 1]


def test_a_processor_of_a_model_of_text_brings_its_template() -> None:
    """A server may serve the text of a vision-language model alone."""
    engine, processor = RecordingEngine(tokenizer=TOKENIZER), WordProcessor(TOKENIZER)
    policy = SGLangHiddenWrapper(engine, tokenizer=processor, input_mode="history", hidden=None)
    policy(ragged(history=[[{"role": "user", "content": "w1"}]]))
    assert len(engine.requests) == 1


def test_a_processor_without_an_image_token_is_refused() -> None:
    class Other(WordProcessor):
        """As CLIP's, which has no place for an image in a text."""

        image_token_id = property()  # type: ignore[assignment]

    policy, engine = make("text", Other(TOKENIZER))
    with pytest.raises(CapabilityError, match="a Other has no image token"):
        policy(ragged(text=[PLACE], images=[CAT]))
    assert not engine.payloads


# --- ids that the engine would change --------------------------------------------------------------------------------


def test_candidates_that_the_engine_would_change_are_refused() -> None:
    policy, engine = make("tokens", Encodes(), hidden=None)
    rows = ragged(tokens=[[9, 8], [IMAGE_ID]], images=[None, [CAT]])
    with pytest.raises(ImageError, match=r"row 1, candidate 0: SGLang encodes .* token 0, .*; give another candidate"):
        policy.score(rows, [[5], [6, 7]])
    assert not engine.payloads
    policy.score(rows[:1], [[5], [6, 7]])
    assert len(engine.payloads[-1]["input_ids"]) == 2


def test_an_id_that_no_tokenizer_has_is_the_engines_to_name() -> None:
    policy, engine = make("tokens", Encodes())
    with pytest.raises(TokenIdError, match="row 0: token id -1 at position 0"):
        policy(tokens_batch([-1, IMAGE_ID], images=PIXELS))
    assert not engine.payloads


# --- rows that go wrong, and rows that go on -------------------------------------------------------------------------


def test_a_placeholder_without_an_image_costs_its_row_alone() -> None:
    policy, engine = make("tokens", on_error="nan")
    out = flat(policy(ragged(tokens=[[9, IMAGE_ID], [9, IMAGE_ID], [9, 8]], images=[[CAT], None, None])))
    assert [row["error"].split(":")[0] for row in out] == ["", "ImageError", ""]
    assert "row 1: position 1 of the prompt is the placeholder" in out[1]["error"]
    assert len(engine.requests) == 2


def paused(out: TensorDictBase, *rows: int) -> TensorDictBase:
    found = [row.copy() for row in flat(out)]
    for row in rows:
        found[row]["finish_reason"] = "abort"
    return lazy_stack(found)


@pytest.mark.parametrize("rows", [[0, 1], [0]])
def test_a_paused_row_that_the_engine_would_change_ends(rows: list[int]) -> None:
    """What was sampled is not what a tokenizer writes: the row cannot be gone on from, and the others can."""
    policy, engine = make("tokens", Encodes(), respond=lambda ids: [5, 6], **OPTIONS)
    out = policy(ragged(tokens=[[IMAGE_ID], [9]], images=[[CAT], None]))
    (first, second) = flat(policy.resume(paused(out, *rows)))
    assert first["finish_reason"] == "error"
    assert first["error"].startswith("ImageError: row 0")
    assert first["tokens"].response.tolist() == [5, 6]
    assert second["tokens"].response.tolist() == ([5, 6, 5, 6] if 1 in rows else [5, 6])
    assert [payload["input_ids"] for payload in engine.payloads[1:]] == [[[9, 5, 6]]] * (1 in rows)


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_a_paused_row_without_its_images_is_refused(mode: str) -> None:
    policy, engine = make(mode, prompt_images_key=None, **OPTIONS)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]
    prompts = {"history": chat, "text": f"{PLACE} w1", "tokens": [IMAGE_ID, 9]}
    out = policy(ragged(**{mode: [prompts[mode]]}, images=[[CAT]]))
    with pytest.raises(MissingKeyError, match=r"row 0, None: no images, .* with prompt_images_key"):
        policy.resume(paused(out, 0))
    kept, _ = make(mode, **OPTIONS)
    out = kept(ragged(**{mode: [prompts[mode]]}, images=[[CAT]]))
    with pytest.raises(MissingKeyError, match="row 0, 'prompt_images': no images"):
        kept.resume(paused(out, 0).exclude("prompt_images"))
    assert len(engine.payloads) == 1


def test_a_paused_row_that_sampled_a_placeholder_ends() -> None:
    policy, engine = make("tokens", respond=lambda ids: [5, IMAGE_ID], **OPTIONS)
    out = policy(ragged(tokens=[[IMAGE_ID, 9]], images=[[CAT]]))
    (row,) = flat(policy.resume(paused(out, 0)))
    assert row["error"].startswith("ImageError: row 0: 2 placeholders (id 95)")
    assert len(engine.payloads) == 1
