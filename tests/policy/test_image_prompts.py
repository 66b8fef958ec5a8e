"""Images in the three input modes, over the fake engine: what is sent, what is counted, and what is written."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers.fake_engine import EOS_ID, WORDS, RecordingEngine
from helpers.fake_images import IMAGE_ID
from helpers.policy_batches import TOKENIZER, flat
from helpers.word_processor import WordProcessor, picture, rows_of
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tokenizers import decoders
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.data.llm.history import ContentBase
from torchrl.modules.llm.policies import ChatHistory

from torchrl_sglang_hidden import (
    At,
    CapabilityError,
    ChatTemplateError,
    Each,
    HiddenSpec,
    Image,
    ImageError,
    InputError,
    InputTypeError,
    LastTokens,
    SGLangHiddenWrapper,
    Turn,
    Window,
    ragged,
)
from torchrl_sglang_hidden.images import expansion
from torchrl_sglang_hidden.images.expansion import KEEPS_IDS
from torchrl_sglang_hidden.images.image_data import read_image
from torchrl_sglang_hidden.spec.hidden import SEGMENTS

PLACE = WORDS[IMAGE_ID]
ALL = HiddenSpec(SEGMENTS, spans={"image": Image(0)})


def make(mode: str, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    engine = options.pop("engine", None) or RecordingEngine(
        tokenizer=TOKENIZER, takes_images=True, image_token_id=IMAGE_ID
    )
    processor = options.pop("processor", None) or WordProcessor(TOKENIZER, breaks=options.pop("breaks", False))
    defaults = {"tokenizer": processor, "input_mode": mode, "hidden": HiddenSpec(SEGMENTS), "generate_kwargs": {}}
    return SGLangHiddenWrapper(engine, **{**defaults, **options}), engine


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def uri(image: Any) -> str:
    return read_image("", image).uri


def question(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in parts]}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": value}


CAT, DOG = picture(1, 3), picture(2, 2, 2)


def batch(mode: str) -> TensorDictBase:
    """Return three rows: with one image, with none, with two."""
    if mode == "history":
        return ragged(
            history=[
                question(image(CAT), "w1 w2"),
                [{"role": "user", "content": "w3"}],
                question("w4", image(CAT), image(DOG)),
            ]
        )
    prompts = [f"{PLACE} w1 w2", "w3", f"w4 {PLACE} {PLACE}"]
    given = {"text": {"text": prompts}, "tokens": {"tokens": [ids_of(prompt) for prompt in prompts]}}[mode]
    return ragged(**given, images=[[CAT], [], [CAT, DOG]])


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_every_mode_sends_placeholders_and_counts_rows(mode: str, breaks: bool) -> None:
    policy, engine = make(mode, breaks=breaks)
    out = flat(policy(batch(mode)))
    cat, dog = rows_of(3, breaks=breaks), rows_of(2, 2, breaks=breaks)
    before, after = ids_of("<|start|> user"), ids_of("<|end|> <|start|> assistant")
    bodies = [
        [*cat, *ids_of("w1 w2")],
        ids_of("w3"),
        [*ids_of("w4"), *cat, *dog],
    ]
    expected = [[*before, *body, *after] if mode == "history" else body for body in bodies]
    assert [row["tokens"].prompt.tolist() for row in out] == expected
    assert [list(request.prompt_ids) for request in engine.requests] == expected
    (payload,) = engine.payloads
    assert payload["image_data"] == [[uri(CAT)], [], [uri(CAT), uri(DOG)]]
    assert [ids.count(IMAGE_ID) for ids in payload["input_ids"]] == [1, 0, 2]
    for row, ids in zip(out, expected, strict=True):
        assert int(row["hidden_states"].prompt_count) == len(ids)
        assert len(row["masks"].all_attention_mask) == len(row["tokens"].full) == len(row["log_probs"].full)
        assert row["text"].prompt.split().count(PLACE) == len(row["prompt_images"])
    assert [row["prompt_images"] for row in out] == [(uri(CAT),), (), (uri(CAT), uri(DOG))]


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_the_states_are_those_of_the_image(mode: str) -> None:
    """Another image with the same words gives other states from the image on."""
    policy, _ = make(mode, hidden=ALL)
    rows = {"history": question(image(CAT), "w1"), "text": f"{PLACE} w1", "tokens": ids_of(f"{PLACE} w1")}[mode]
    other = {**{"history": question(image(picture(9)), "w1")}, "text": rows, "tokens": rows}[mode]
    given = {} if mode == "history" else {"images": [[CAT], [picture(9)]]}
    first, second = flat(policy(ragged(**{mode: [rows, other]}, **given)))
    assert torch.equal(first["tokens"].prompt, second["tokens"].prompt)
    assert not torch.allclose(first["hidden_states"].prompt, second["hidden_states"].prompt)
    assert int(first["hidden_states"].span_counts["image"]) == 3
    assert not torch.allclose(first["hidden_states"].spans["image"], second["hidden_states"].spans["image"])


PARTS = {
    "PIL": image(CAT),
    "url of data": {"type": "image", "url": uri(CAT)},
    "openai": {"type": "image_url", "image_url": {"url": uri(CAT)}},
    "openai, flat": {"type": "image_url", "image_url": uri(CAT)},
    "torchrl": ContentBase(type="image", url=uri(CAT)),
    "torchrl's data": ContentBase(type="image", data=CAT),
}


@pytest.mark.parametrize("form", PARTS)
def test_every_form_of_a_part(form: str) -> None:
    policy, engine = make("history")
    part = PARTS[form]
    words = ContentBase(type="text", text="w1") if isinstance(part, ContentBase) else text("w1")
    policy(ragged(history=[[{"role": "user", "content": [part, words]}]]))
    assert engine.payloads[0]["image_data"] == [[uri(CAT)]]
    assert len(engine.requests[0].prompt_ids) == len(ids_of("<|start|> user w1 <|end|> <|start|> assistant")) + 3


def test_bare_parts_take_the_images_of_the_row() -> None:
    policy, engine = make("history")
    chat = question({"type": "image"}, "w1", image(DOG), {"type": "image"})
    policy(ragged(history=[chat], images=[[CAT, picture(5)]]))
    assert engine.payloads[0]["image_data"] == [[uri(CAT), uri(DOG), uri(picture(5))]]


def test_chats_with_images_can_be_printed() -> None:
    """A `History` that stacks the parts of one message cannot be printed beside a message that is one text."""
    policy, _ = make("history", inplace=False)
    given = ragged(
        history=[question(image(CAT), text("w1")), question(text("w2")), [{"role": "user", "content": "w3"}]]
    )
    out = policy(given)
    for shown in (given, given[0], out, out[0], out["history"].full):
        assert "history" in repr(shown) or "content" in repr(shown)
    assert out["history"].full[0].content[0][1] == text("w1")


def test_pixels_of_an_environment() -> None:
    """A batch of frames, one per row, as environments give them."""
    policy, engine = make("text")
    frames = torch.randint(256, (2, 4, 5, 3), dtype=torch.uint8)
    policy(ragged(text=[f"{PLACE} w1", f"w2 {PLACE}"], images=frames))
    assert engine.payloads[0]["image_data"] == [[uri(frames[0])], [uri(frames[1])]]
    assert [len(request.prompt_ids) for request in engine.requests] == [21, 21]


def test_sizes_are_asked_for_once() -> None:
    processor = WordProcessor(TOKENIZER)
    policy, _ = make("text", processor=processor)
    for seed in range(4):
        policy(ragged(text=[f"{PLACE} w1"] * 3, images=[[picture(seed + 10 * row)] for row in range(3)]))
    assert len(processor.calls) == 1


def test_expanded_ids_are_recognised() -> None:
    """The ids of an output are the next input, with the images beside them."""
    policy, engine = make("tokens", breaks=True)
    first = policy(batch("tokens"))
    prompts = [row["tokens"].prompt for row in flat(first)]
    again = policy(ragged(tokens=prompts, images=[list(row["prompt_images"]) for row in flat(first)]))
    assert engine.payloads[0]["input_ids"] == engine.payloads[1]["input_ids"]
    assert [row["tokens"].prompt.tolist() for row in flat(again)] == [ids.tolist() for ids in prompts]


@pytest.mark.parametrize("pad", [False, True])
def test_a_rollout_is_scored_by_its_own_ids(pad: bool) -> None:
    policy, engine = make("tokens", breaks=True, pad_output=pad, hidden=None)
    out = policy(batch("tokens"))
    rows = flat(out)
    scorer = policy.get_new_version(generate=False, images_key="prompt_images", inplace=False)
    scored = flat(scorer(out))
    for row, score in zip(rows, scored, strict=True):
        assert torch.equal(row["tokens"].full, score["tokens"].full)
        real = score["masks"].all_attention_mask
        log_probs = score["log_probs"].full[real]
        rows_of_images = score["tokens"].full[real] == IMAGE_ID
        assert log_probs[0] == 0
        assert torch.equal(log_probs[1:].isnan(), rows_of_images[1:])
    sent, again = engine.payloads[0]["input_ids"], engine.payloads[1]["input_ids"]
    assert [whole[: len(prompt)] for whole, prompt in zip(again, sent, strict=True)] == sent


def test_log_probs_of_rows_of_images_are_nan() -> None:
    policy, _ = make("history", generate=False, hidden=HiddenSpec(SEGMENTS))
    chat = [*question("w1", image(CAT), "w2"), {"role": "assistant", "content": "w5 w6"}]
    out = policy(ragged(history=[chat], full=True))
    (row,) = flat(out)
    ids, log_probs = row["tokens"].full, row["log_probs"].full
    assert torch.equal(log_probs.isnan(), ids == IMAGE_ID)
    said = row["masks"].all_assistant_mask
    assert ids[said].tolist() == ids_of("w5 w6")
    assert int(row["hidden_states"].full_count) == len(ids)


# --- spans -----------------------------------------------------------------------------------------------------------


def test_spans_move_behind_images() -> None:
    spans = {
        "cat": Image(0),
        "dog": Image(-1),
        "said": Turn(0),
        "last": LastTokens(2, "prompt"),
    }
    policy, engine = make("history", breaks=True, hidden=HiddenSpec(("prompt",), spans=spans))
    out = policy(ragged(history=[question("w1", image(CAT), "w2 w3", image(DOG), "w4")]))
    (row,) = flat(out)
    found = engine.requests[0].spans
    ids = engine.requests[0].prompt_ids
    assert {name: [list(ids[a:b]) for a, b in span.intervals] for name, span in found.items()} == {
        "cat": [rows_of(3, breaks=True)],
        "dog": [rows_of(2, 2, breaks=True)],
        "said": [ids_of("w1"), ids_of("w2 w3"), ids_of("w4")],
        "last": [ids_of("<|start|> assistant")],
    }
    assert int(row["hidden_states"].span_counts["dog"]) == 6


def test_states_at_a_text_stand_behind_images() -> None:
    """A state in front of which an image stands is that of the image's last row."""
    spans = {
        "before": At("w2", "before", "prompt"),
        "words": Each("w", segment="prompt"),
        "images": Each(PLACE, segment="prompt"),
        "window": Window(3, 6, "prompt"),
    }
    policy, engine = make("history", breaks=True, hidden=HiddenSpec(("prompt",), spans=spans))
    (row,) = flat(policy(ragged(history=[question("w1", image(CAT), "w2 w3", image(DOG), "w4")])))
    found, ids = engine.requests[0].spans, list(engine.requests[0].prompt_ids)
    words = [place for place, one in enumerate(ids) if one in ids_of("w1 w2 w3 w4")]
    w1, w2, w3, w4 = words
    assert (w2 - w1 - 1, w4 - w3 - 1) == (len(rows_of(3, breaks=True)), len(rows_of(2, 2, breaks=True)))
    images = [w2 - 1, w4 - 1]  # the placeholder is a word too
    seen = sorted((*words, *images))
    expected = {"before": images[:1], "words": seen, "images": images, "window": [3, 4, 5]}
    assert {name: span.positions for name, span in found.items()} == expected
    assert row["hidden_states"].span_places["words"].tolist() == seen


def test_an_image_that_is_not_there_has_no_span() -> None:
    policy, engine = make("text", hidden=ALL)
    with pytest.raises(ValueError, match=r"row 0, span 'image': Image\(index=0\): the prompt has 0 images"):
        policy(ragged(text=["w1"]))
    assert not engine.payloads


# --- turns -----------------------------------------------------------------------------------------------------------


def next_turn(out: TensorDictBase, *messages: Any) -> TensorDictBase:
    """Return the rows with their chats gone on."""
    rows = []
    for row in flat(out):
        history = lazy_stack([*row["history"].full.unbind(0), *History.from_chats([list(messages)])[0].unbind(0)])
        row = row.copy()
        row["history"] = ChatHistory(prompt=history, batch_size=())
        rows.append(row)
    return lazy_stack(rows)


@pytest.mark.parametrize("chat", ["render", "append"])
def test_the_next_turn_has_the_images_of_all_turns(chat: str) -> None:
    policy, engine = make("history", chat=chat, prefer_tokens=chat == "render")
    out = policy(ragged(history=[question(image(CAT), "w1")]))
    (first,) = engine.requests
    (second,) = flat(policy(next_turn(out, question(image(DOG), "w2")[0])))
    request = engine.requests[1]
    assert engine.payloads[1]["image_data"] == [[uri(CAT), uri(DOG)]]
    response = out[0]["tokens"].response.tolist()
    assert list(request.prompt_ids[: len(first.prompt_ids) + len(response)]) == [*first.prompt_ids, *response]
    if chat == "append":
        sampled = second["masks"].all_assistant_mask
        assert second["tokens"].full[sampled].tolist() == response + second["tokens"].response.tolist()
        known = second["log_probs"].full[: len(request.prompt_ids)]
        assert torch.equal(~known.isnan(), sampled[: len(request.prompt_ids)])


def test_another_image_is_another_chat() -> None:
    """The words are the same: only the image says that the ids of the turn before are not its own."""
    policy, engine = make("history", chat="append")
    out = policy(ragged(history=[question(image(CAT), "w1")]))
    changed = question(image(picture(7)), "w1")
    answer = {"role": "assistant", "content": flat(out)[0]["text"].response}
    row = flat(out)[0].copy()
    row["history"] = ChatHistory(
        prompt=History.from_chats([[*changed, answer, {"role": "user", "content": "w2"}]])[0], batch_size=()
    )
    (second,) = flat(policy(lazy_stack([row])))
    assert engine.payloads[1]["image_data"] == [[uri(picture(7))]]
    assert not second["masks"].all_assistant_mask[: len(engine.requests[1].prompt_ids)].any()


def test_a_sampled_placeholder_is_not_taken_for_an_image() -> None:
    engine = RecordingEngine(
        tokenizer=TOKENIZER,
        takes_images=True,
        image_token_id=IMAGE_ID,
        respond=lambda ids: [9, IMAGE_ID, EOS_ID],
    )
    policy, _ = make("history", engine=engine, chat="append")
    out = policy(ragged(history=[question(image(CAT), "w1")]))
    with (
        pytest.warns(UserWarning, match="a response has the id 95, which stands for an image"),
        pytest.raises(InputError, match="2 placeholders, of id 95, for 1 images"),
    ):
        policy(next_turn(out, {"role": "user", "content": "w2"}))
    assert len(engine.payloads) == 1


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
def test_what_a_forward_pass_reads(pad: bool) -> None:
    policy, _ = make("text", pixel_values_key="pixels", pad_output=pad, breaks=True)
    rows = flat(policy(batch("text")))
    for row, images in zip(rows, ([CAT], [], [CAT, DOG]), strict=True):
        if not images:
            assert list(row["pixels"].keys()) == []
            continue
        assert row["pixels", "image_sizes"].tolist() == [[one.height, one.width] for one in images]
        assert row["pixels", "pixel_values"].shape == (sum(one.width * one.height for one in images), 3)
        types, ids = row["pixels", "mm_token_type_ids"], row["tokens"].full
        assert torch.equal(types.bool(), ids == IMAGE_ID)


def test_outputs_travel(tmp_path: Any) -> None:
    policy, _ = make("history", pixel_values_key="pixels")
    out = policy(batch("history"))
    rows = [flat(out)[0], flat(out)[2]]
    again = pickle.loads(pickle.dumps(lazy_stack(rows)))
    assert [row["prompt_images"] for row in flat(again)] == [row["prompt_images"] for row in rows]
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=2)
    buffer.extend(lazy_stack(rows))
    sample = buffer[:]
    assert [row["prompt_images"] for row in flat(sample)] == [row["prompt_images"] for row in rows]
    kept = rows[0].select("tokens", "prompt_images", "pixels")
    kept.memmap_(tmp_path / "row")
    loaded = TensorDict.load_memmap(tmp_path / "row")
    assert tuple(loaded["prompt_images"]) == rows[0]["prompt_images"]
    assert torch.equal(loaded["pixels", "pixel_values"], rows[0]["pixels", "pixel_values"])


def test_samples_of_one_prompt_have_its_images() -> None:
    policy, engine = make("history", num_samples=2, pixel_values_key="pixels", generate_kwargs={"max_new_tokens": 2})
    out = policy(batch("history"))
    assert out.batch_size == (3, 2)
    for rows, number in zip(out.unbind(0), (1, 0, 2), strict=True):
        assert [len(row["prompt_images"]) for row in rows.unbind(0)] == [number] * 2
    sent = [data for payload in engine.payloads for data in payload.get("image_data", [])]
    assert [uri(CAT), uri(DOG)] in sent


def test_candidates_follow_images() -> None:
    policy, engine = make("history", hidden=None)
    scores = policy.score(batch("history"), [" w5", " w6 w7"])
    assert scores["logits"].isfinite().all()
    last = engine.payloads[-1]
    assert [len(data) for data in last["image_data"]] == [1, 1, 0, 0, 2, 2]
    assert all(
        ids.count(IMAGE_ID) == len(data) for ids, data in zip(last["input_ids"], last["image_data"], strict=True)
    )


def test_a_policy_with_a_processor_copies_and_pickles() -> None:
    policy, _ = make("text", pixel_values_key="pixels")
    for other in (policy.get_new_version(), copy.deepcopy(policy.config), pickle.loads(pickle.dumps(policy.config))):
        config = getattr(other, "config", other)
        assert isinstance(config.tokenizer, WordProcessor)
        assert config.processor.takes_images
        assert config.processor.placeholder_id == IMAGE_ID
    assert policy.tokenizer is policy.config.tokenizer.tokenizer


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_text(words: str, images: Any) -> TensorDictBase:
    return ragged(text=[words], images=[images])


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "no image for a placeholder": ("text", lambda: bad_text(f"{PLACE} w1 {PLACE}", [CAT]), ImageError,
        "2 placeholders, of id 95, for 1 images"),
    "no placeholder for an image": ("text", lambda: bad_text("w1", [CAT]), ImageError, "0 placeholders"),
    "tokens without an image": ("tokens", lambda: ragged(tokens=[[9, IMAGE_ID]], images=[[CAT, DOG]]), ImageError,
        r"1 placeholders, of id 95, for 2 images, and not what these are expanded to: \[3, 4\]"),
    "a part without an image": ("history", lambda: ragged(history=[question({"type": "image"}, "w1")]), ImageError,
        "message 0, part 0: an image's place without an image"),
    "an image without a part": ("history", lambda: ragged(history=[question("w1")], images=[[CAT]]), ImageError,
        "1 images at images_key, and the chat has places for 0"),
    "an image twice": ("history", lambda: ragged(history=[question({**image(CAT), "url": uri(CAT)})]), ImageError,
        r"an image at each of \['image', 'url'\]"),
    "a video": ("history", lambda: ragged(history=[question({"type": "video", "video": "x.mp4"})]), ImageError,
        "of type 'video'; text and images can be sent"),
    "audio": ("history", lambda: ragged(history=[question({"type": "input_audio"})]), ImageError, "'input_audio'"),
    "another part": ("history", lambda: ragged(history=[question({"type": "tool"})]), ImageError, "of type 'tool'"),
    "a broken file": ("text", lambda: bad_text(PLACE, [b"no image"]), ImageError, "row 0, 'images', image 0: 8 bytes"),
    "a URL": ("text", lambda: bad_text(PLACE, ["http://x.y/z.png"]), ImageError, "fetches from the network"),
    "a number": ("text", lambda: bad_text(PLACE, [3]), InputTypeError, "image 0: pixels of torch.int64"),
    "refused by the processor": ("text", lambda: bad_text(PLACE, [picture(1, 9, 9)]), ImageError,
        "image 0: an image of 9 × 9 pixels, which the model's processor refuses: too many pixels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_sent(case: str) -> None:
    mode, make_batch, error, match = BAD[case]
    policy, engine = make(mode)
    given = make_batch()
    with pytest.raises(error, match=match):
        policy(given)
    assert not engine.payloads
    assert "hidden_states" not in given


def test_a_model_of_text_takes_no_image() -> None:
    engine = RecordingEngine(tokenizer=TOKENIZER)
    policy = SGLangHiddenWrapper(engine, tokenizer=TOKENIZER, input_mode="text")
    with pytest.raises(CapabilityError, match="takes text alone"):
        policy(bad_text(f"w1 {PLACE}", [CAT]))
    assert "prompt_images" not in policy.out_keys
    with pytest.raises(InputError, match=r"pixel_values_key='pixels': the model .* takes text alone"):
        policy.get_new_version(pixel_values_key="pixels")


def test_more_images_than_the_engine_takes() -> None:
    engine = RecordingEngine(tokenizer=TOKENIZER, takes_images=True, max_images=1)
    policy, _ = make("text", engine=engine)
    with pytest.raises(ImageError, match="2 images, and the engine takes 1 in one prompt"):
        policy(bad_text(f"{PLACE} {PLACE}", [CAT, DOG]))


def test_a_template_without_places_is_refused() -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    processor = WordProcessor(TOKENIZER, template)
    policy, engine = make("history", processor=processor)
    with pytest.raises((ImageError, ChatTemplateError), match="0 placeholders, of id 95, for 1 images"):
        policy(ragged(history=[question(image(CAT), "w1")]))
    assert not engine.payloads


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_a_bad_image_costs_its_row_alone(mode: str) -> None:
    policy, engine = make(mode, on_error="nan")
    given = batch(mode)
    bad = {
        "history": lambda: ragged(history=[question(image(b"no image"), "w1")]),
        "text": lambda: bad_text(PLACE, [b"no image"]),
        "tokens": lambda: ragged(tokens=[[IMAGE_ID]], images=[[b"no image"]]),
    }[mode]()
    out = flat(policy(lazy_stack([*flat(given), *flat(bad)])))
    assert [bool(row["error"]) for row in out] == [False, False, False, True]
    assert out[3]["error"].startswith("ImageError: row 3")
    assert math.isnan(float(out[3]["hidden_states"].prompt[0]))
    assert out[3]["prompt_images"] == ()
    assert len(engine.requests) == 3


@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_a_place_without_an_image_costs_its_row_alone(mode: str) -> None:
    policy, engine = make(mode, on_error="nan")
    bad = {
        "history": lambda: ragged(history=[question(f"{PLACE} w1")]),
        "text": lambda: ragged(text=[PLACE]),
        "tokens": lambda: ragged(tokens=[[IMAGE_ID]]),
    }[mode]()
    out = flat(policy(lazy_stack([*flat(batch(mode)), *flat(bad)])))
    assert [bool(row["error"]) for row in out] == [False, False, False, True]
    assert out[3]["error"].startswith("ImageError: row 3")
    assert len(engine.requests) == 3


def test_a_paused_row_with_an_image_goes_on() -> None:
    """The prompt is sent again as it was, its images with it."""
    policy, engine = make("history", on_error="nan", generate_kwargs={"max_new_tokens": 4})
    out = policy(batch("history"))
    rows = [row.copy() for row in flat(out)]
    rows[0]["finish_reason"] = "abort"
    policy.resume(lazy_stack(rows))
    assert engine.payloads[-1]["image_data"] == [[uri(CAT)]]
    first, again = engine.requests[0], engine.requests[-1]
    assert again.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids


@pytest.mark.parametrize("kind", KEEPS_IDS)
def test_an_image_without_its_start_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would give the rows of a Qwen's image the positions of text."""
    monkeypatch.setattr(expansion, "START", "w9")
    qwen = type(kind, (WordProcessor,), {})
    for mode in ("text", "tokens"):
        policy, engine = make(mode, processor=qwen(TOKENIZER))

        def ask(text: str, mode: str = mode, policy: SGLangHiddenWrapper = policy) -> None:
            prompt = text if mode == "text" else TOKENIZER(text)["input_ids"]
            policy(ragged(**{mode: [prompt]}, images=[[CAT] * text.count(PLACE)]))

        ask(f"w9 {PLACE} w1 w9 {PLACE}")
        for text, at in ((PLACE, 0), (f"w8 {PLACE}", 1), (f"w9 {PLACE} {PLACE}", 2)):
            with pytest.raises(ImageError, match=rf"row 0, .*the placeholder at token {at} has no 'w9' before it"):
                ask(text)
        assert len(engine.payloads) == 1


def test_ids_that_the_engine_would_change_are_refused() -> None:
    """SGLang encodes the prompts of most models again: these words' ids stay, and one without a word does not."""

    class Unsplit(WordProcessor):
        """Its tokenizer writes no blank between words, as sampled pieces of a word have none."""

    policy, engine = make("tokens", processor=Unsplit(TOKENIZER))
    policy(ragged(tokens=[[9, IMAGE_ID, 8]], images=[[CAT]]))
    # Id 0 is the unknown word, which is no word that the tokenizer would write again: it is several.
    joined = copy.deepcopy(TOKENIZER)
    joined.backend_tokenizer.decoder = decoders.Fuse()
    other, other_engine = make("tokens", processor=Unsplit(joined))
    with pytest.raises(ImageError, match=r"row 0, .*encodes prompts with images of a Unsplit again, and token 0"):
        other(ragged(tokens=[[9, IMAGE_ID, 8]], images=[[CAT]]))
    with pytest.raises(ImageError, match="and token 0, '', would become another"):  # of no word of the tokenizer's
        policy(ragged(tokens=[[len(TOKENIZER), IMAGE_ID]], images=[[CAT]]))
    other(ragged(tokens=[[9, 8]]))
    assert len(engine.payloads) == len(other_engine.payloads) == 1
