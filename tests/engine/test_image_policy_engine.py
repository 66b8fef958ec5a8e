"""A policy with images on random Qwen2.5-VL, Qwen3-VL and Pixtral: what it writes is what the engine answers.

The engine's own answers are held against Hugging Face first, so that each comparison with them is one with it. What a
policy adds, the reading of chats, texts and ids and the tensors of a forward pass, is held against Hugging Face's
processor and model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_oracle
from helpers.image_site import GREEDY, ImageSite
from helpers.image_trainer import ImageTrainer
from helpers.policy_batches import flat
from helpers.policy_checks import LOG_PROB_ATOL, STATE_RTOL, relative_error
from helpers.vlm_models import PIXELS
from PIL import Image as PILImage
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory
from torchrl.objectives.llm import GRPOLoss
from transformers import AutoProcessor

from torchrl_sglang_hidden import (
    ActionMask,
    HiddenSpec,
    Image,
    ImageError,
    PromptLengthError,
    Role,
    SGLangHiddenWrapper,
    Turn,
    ragged,
)
from torchrl_sglang_hidden.records import Request

MODES = ("history", "text", "tokens")
SPEC = HiddenSpec(("prompt", "response", "full"), layers=(0, -1))
# The parts of three prompts: without an image, with one, with two of different sizes.
PROMPTS: list[list[Any]] = [["Hello there"], [1, "What is this?"], ["A", 2, "or B", 3, "?"]]


def parts_of(site: ImageSite, prompt: list[Any]) -> list[Any]:
    """Return a prompt's texts, and its images in the place of their seeds."""
    sizes = {3: (2, 2)}
    return [part if isinstance(part, str) else site.writer.picture(part, *sizes.get(part, (3, 2))) for part in prompt]


def chat_of(parts: list[Any]) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def batch(site: ImageSite, mode: str) -> TensorDictBase:
    prompts = [parts_of(site, prompt) for prompt in PROMPTS]
    images = [[part for part in parts if not isinstance(part, str)] for parts in prompts]
    if mode == "history":
        return ragged(history=[chat_of(parts) for parts in prompts])
    texts = [site.text(*parts) for parts in prompts]
    if mode == "text":
        return ragged(text=texts, images=images)
    return ragged(tokens=[site.writer.ids_of(text) for text in texts], images=images)


def requests(site: ImageSite, **fields: Any) -> list[Request]:
    return [site.request(*parts_of(site, prompt), hidden=SPEC, **fields) for prompt in PROMPTS]


@pytest.fixture
def policy(image_site: ImageSite) -> Callable[..., SGLangHiddenWrapper]:
    """Return a function that makes policies with the processor that was read: to read it again takes half a second."""

    def make(mode: str, **options: Any) -> SGLangHiddenWrapper:
        defaults = {"input_mode": mode, "hidden": SPEC, "generate_kwargs": GREEDY, "pixel_values_key": "pixels"}
        defaults["tokenizer"] = image_site.writer.processor
        return SGLangHiddenWrapper(image_site.server, **{**defaults, **options})

    return make


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_what_hugging_face_does(
    image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper], mode: str
) -> None:
    """Ids are the processor's, which the policy reads itself; tokens, log-probs and states are Hugging Face's."""
    asked = requests(image_site)
    expected = image_site.server.generate(asked)
    image_site.check(asked, expected)
    model = ImageTrainer(hf_oracle.load(image_site.model_dir))
    out = policy(mode, tokenizer=None)(batch(image_site, mode))
    for row, request, completion in zip(flat(out), asked, expected, strict=True):
        assert tuple(row["tokens"].prompt.tolist()) == request.prompt_ids
        assert tuple(row["tokens"].response.tolist()) == completion.response_ids
        torch.testing.assert_close(row["log_probs"].response, completion.log_probs_T, atol=LOG_PROB_ATOL, rtol=0)
        for segment, pooled in completion.hidden.items():
            error = relative_error(row["hidden_states", segment].flatten(), pooled.vector.flatten())
            assert error < STATE_RTOL, (segment, error)
            assert int(row["hidden_states", f"{segment}_count"]) == pooled.count
        # A forward pass of the row alone is on-policy.
        with torch.no_grad():
            trained = model.log_probs_N(row)[len(request.prompt_ids) :]
        torch.testing.assert_close(trained, row["log_probs"].response, atol=LOG_PROB_ATOL, rtol=0)


@pytest.mark.parametrize("mode", ["history", "tokens"])
def test_a_rollout_is_scored_as_hugging_face_scores_it(
    image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper], mode: str
) -> None:
    out = policy(mode)(batch(image_site, mode))
    options = {"images_key": "prompt_images"} if mode == "tokens" else {}
    scored = policy(mode, generate=False, inplace=False, **options)(out)
    model = ImageTrainer(hf_oracle.load(image_site.model_dir))
    for row, score in zip(flat(out), flat(scored), strict=True):
        ids, log_probs = score["tokens"].full, score["log_probs"].full
        if mode == "tokens":
            assert torch.equal(ids, row["tokens"].full)
        is_row = ids == image_site.writer.placeholder
        assert torch.equal(log_probs.isnan(), is_row)
        with torch.no_grad():
            expected = model.log_probs_N(score)
        torch.testing.assert_close(log_probs[~is_row], expected[~is_row], atol=LOG_PROB_ATOL, rtol=0)
        assert int(score["hidden_states"].full_count) == len(ids)


def test_spans_of_images_and_words(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper]) -> None:
    """Each against the states of all tokens, in the order of the prompt."""
    spans = {"first": Image(0), "last": Image(-1), "words": Turn(0), "role": Role("user")}
    spec = HiddenSpec(("prompt",), tokens=True, spans=spans)
    out = policy("history", hidden=spec)(ragged(history=[chat_of(parts_of(image_site, PROMPTS[2]))]))
    (row,) = flat(out)
    ids, states_PD = row["tokens"].prompt.tolist(), row["token_hidden_states"].prompt
    first, last = image_site.request(*parts_of(image_site, PROMPTS[2])).images.ranges  # type: ignore[union-attr]
    tokenizer = image_site.writer.processor.tokenizer
    outside = [place for place in range(len(ids)) if not (first[0] <= place < first[1] or last[0] <= place < last[1])]
    words = [place for place in outside if tokenizer.decode([ids[place]]).strip() in ("A", "or", "B", "?")]
    for name, places in {
        "first": list(range(*first)), "last": list(range(*last)), "words": words, "role": words,
    }.items():  # fmt: skip
        assert int(row["hidden_states"].span_counts[name]) == len(places), name
        error = relative_error(row["hidden_states"].spans[name], states_PD[places].mean(0))
        assert error < STATE_RTOL, (name, error)


@pytest.mark.parametrize("chat", ["render", "append"])
def test_two_turns(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper], chat: str) -> None:
    """The second turn brings another image; its log-probs are those of one forward pass over both."""
    make = policy("history", chat=chat)
    (row,) = flat(make(ragged(history=[chat_of(parts_of(image_site, PROMPTS[1]))])))
    more = History.from_chats([chat_of(parts_of(image_site, [4, "And now?"]))])[0]
    row["history"] = ChatHistory(prompt=lazy_stack([*row["history"].full.unbind(0), *more.unbind(0)]), batch_size=())
    first_ids = row["tokens"].full.tolist()
    (second,) = flat(make(lazy_stack([row])))
    assert len(second["prompt_images"]) == 2
    model = ImageTrainer(hf_oracle.load(image_site.model_dir))
    with torch.no_grad():
        expected = model.log_probs_N(second)
    known = ~second["log_probs"].full.isnan()
    assert int(known.sum()) == len(second["tokens"].response) + (len(row["tokens"].response) if chat == "append" else 0)
    torch.testing.assert_close(second["log_probs"].full[known], expected[known], atol=LOG_PROB_ATOL, rtol=0)
    if chat == "append":
        assert second["tokens"].prompt[: len(first_ids)].tolist() == first_ids


def test_candidates_and_samples(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper]) -> None:
    """Candidates behind images are scored as Hugging Face scores them; a group of samples has one prompt."""
    texts = [" yes", " no way"]
    scores = policy("text", hidden=None)
    found = scores.score(batch(image_site, "text"), texts)["logits"]
    out = policy("text")(batch(image_site, "text"))
    model = ImageTrainer(hf_oracle.load(image_site.model_dir))
    for row, scored in zip(flat(out), found, strict=True):
        for text, value in zip(texts, scored, strict=True):
            ids = torch.tensor(image_site.writer.ids_of(text))
            pixels = row["pixels"].copy()
            prompt = row["tokens"].prompt
            if "mm_token_type_ids" in pixels.keys():  # noqa: SIM118
                types = torch.zeros(len(prompt) + len(ids), dtype=torch.int64)
                types[: len(prompt)] = pixels["mm_token_type_ids"][: len(prompt)]
                pixels["mm_token_type_ids"] = types
            whole = TensorDict({"tokens": TensorDict({"full": torch.cat([prompt, ids])}), "pixels": pixels})
            with torch.no_grad():
                expected = _of_ids(model, whole)[len(prompt) :].sum()
            assert abs(float(value - expected)) < LOG_PROB_ATOL * len(ids)
    sampled = policy("text", num_samples=2, generate_kwargs={"max_new_tokens": 3})(batch(image_site, "text"))
    for rows in sampled.unbind(0):
        one, two = rows.unbind(0)
        assert torch.equal(one["tokens"].prompt, two["tokens"].prompt)
        assert relative_error(one["hidden_states"].prompt.flatten(), two["hidden_states"].prompt.flatten()) < STATE_RTOL


def _of_ids(model: ImageTrainer, row: TensorDictBase) -> torch.Tensor:
    extra = dict(row["pixels"].items())
    if "mm_token_type_ids" in extra:
        extra["mm_token_type_ids"] = extra["mm_token_type_ids"][None]
    ids = row["tokens", "full"]
    log_probs = model.model(input_ids=ids[None], **extra).logits[0].log_softmax(-1)
    return torch.cat([log_probs.new_zeros(1), log_probs[:-1].gather(-1, ids[1:, None])[:, 0]])


def test_grpo_is_on_policy(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper]) -> None:
    """TorchRL's loss over a rollout with images: the ratio is 1, and its gradient reaches the vision tower."""
    rollout = policy("history", generate_kwargs={"max_new_tokens": 6, "temperature": 1.0}, num_samples=3)
    rows = [row for row in flat(rollout(batch(image_site, "history"))) if row["prompt_images"]]
    td = lazy_stack(rows)
    advantage = torch.linspace(-1, 1, len(rows))
    td.set("advantage", advantage[:, None, None])
    model = hf_oracle.load(image_site.model_dir)
    trainer = ImageTrainer(model)
    losses = GRPOLoss(trainer, clip_epsilon=0.2)(td)
    assert abs(float(losses.kl_approx)) < 1e-3
    parameters = {name: value for name, value in model.named_parameters() if "visual" in name or "vision" in name}
    model.zero_grad()
    losses.loss_objective.backward()
    norms = [float(value.grad.norm()) for value in parameters.values() if value.grad is not None]
    model.zero_grad()
    assert norms
    assert max(norms) > 0
    with torch.no_grad():
        for row in rows:
            log_probs = trainer.log_probs_N(row)[len(row["tokens"].prompt) :]
            torch.testing.assert_close(log_probs, row["log_probs"].response, atol=1e-3, rtol=0)


def test_images_of_one_colour_are_told_apart_by_their_shape(image_site: ImageSite) -> None:
    """SGLang hashes pixels without their shape: the second of these would be given the first one's states."""
    pixels = PIXELS[image_site.writer.kind]
    for width, height in ((2, 4), (4, 2), (2, 4)):
        plain = PILImage.new("RGB", (width * pixels, height * pixels), (200, 40, 90))
        asked = [image_site.request(plain, "What colour?", hidden=SPEC)]
        image_site.check(asked, image_site.server.generate(asked))


def test_new_weights_of_the_tower_reach_images_seen_before(image_site: ImageSite, tmp_path: Path) -> None:
    """SGLang keeps what the tower made of an image, and an update does not empty that by itself."""
    model = copy.deepcopy(hf_oracle.load(image_site.model_dir))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vis" in name and parameter.ndim > 1:
                parameter.mul_(1.3)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(image_site.model_dir).save_pretrained(tmp_path)
    asked = [image_site.request(image_site.writer.picture(11), "What is this?", hidden=SPEC)]
    (before,) = image_site.server.generate(asked)
    image_site.check(asked, [before])
    try:
        image_site.server.update_weights(model)
        (after,) = image_site.server.generate(asked)
    finally:
        image_site.server.update_weights(hf_oracle.load(image_site.model_dir))
    replace(image_site, model_dir=str(tmp_path)).check(asked, [after])
    assert (
        relative_error(after.hidden["prompt"].vector.flatten(), before.hidden["prompt"].vector.flatten()) > STATE_RTOL
    )
    image_site.check(asked, image_site.server.generate(asked))


@pytest.mark.parametrize("mode", ["history", "tokens"])
def test_a_paused_row_goes_on(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper], mode: str) -> None:
    """Its images go with it again: what comes is what would have come without a pause."""
    # Words that are the ids of their own text, of which Pixtral's prompts are made.
    words = image_site.writer.ids_of(" red green blue old new big small one two three")
    hidden, options = replace(SPEC, tokens=True), {"chat": "append"} if mode == "history" else {}
    make = policy(mode, hidden=hidden, on_error="nan", constraints=ActionMask(words), inplace=False, **options)
    whole = make(batch(image_site, mode), max_new_tokens=6)
    first = [row.copy() for row in flat(make(batch(image_site, mode), max_new_tokens=2))]
    for row in first:
        row["finish_reason"] = "abort"
    out = make.resume(lazy_stack(first), max_new_tokens=6)
    for row, expected in zip(flat(out), flat(whole), strict=True):
        assert (row["finish_reason"], row["error"]) == ("length", "")
        assert row["prompt_images"] == expected["prompt_images"]
        assert row["text"].full == expected["text"].full
        assert set(row.keys(True, True)) == set(expected.keys(True, True))
        for key, value in expected.items(True, True):
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                assert torch.equal(row[key], value), key
            elif isinstance(value, torch.Tensor):
                torch.testing.assert_close(row[key], value, atol=LOG_PROB_ATOL, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("chat", ["append", "render"])
def test_the_third_turn_is_the_chat_anew(
    image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper], chat: str
) -> None:
    """Of answers that are the ids of their own text: what was kept of the turns before, another policy renders."""
    words = image_site.writer.ids_of(" red green blue old new big small one two three")
    make, anew = policy("history", chat=chat, constraints=ActionMask(words)), policy("history", inplace=False)
    (row,) = flat(make(ragged(history=[chat_of(parts_of(image_site, PROMPTS[1]))])))
    for parts in ([4, "And", 3, "?"], ["Bye."]):
        more = History.from_chats([chat_of(parts_of(image_site, parts))])[0]
        row["history"] = ChatHistory(
            prompt=lazy_stack([*row["history"].full.unbind(0), *more.unbind(0)]), batch_size=()
        )
        (row,) = flat(make(lazy_stack([row])))
    only = TensorDict({"history": ChatHistory(prompt=row["history"].prompt, batch_size=())}, batch_size=())
    (expected,) = flat(anew(lazy_stack([only])))
    assert torch.equal(row["tokens"].prompt, expected["tokens"].prompt)
    assert row["prompt_images"] == expected["prompt_images"]
    assert len(row["prompt_images"]) == 3
    error = relative_error(row["hidden_states"].prompt.flatten(), expected["hidden_states"].prompt.flatten())
    assert error < STATE_RTOL


def test_constraints_and_bad_rows(image_site: ImageSite, policy: Callable[..., SGLangHiddenWrapper]) -> None:
    """Under ``on_error="nan"`` a broken image and a prompt that is too long cost their rows alone."""
    allowed = image_site.writer.ids_of(" yes")[:1]
    make = policy("history", on_error="nan", constraints=ActionMask(allowed))
    good = chat_of(parts_of(image_site, PROMPTS[1]))
    # Too long by the rows of its images alone.
    limit, large = image_site.server.info.max_prompt_tokens, [image_site.writer.picture(1, 8, 8)] * 4
    long = chat_of([*large, " one" * (limit - 50)])
    rows = image_site.request(*large, " one" * (limit - 50))
    assert rows.images is not None
    assert len(rows.images.sent_ids) < limit < len(rows.prompt_ids)
    out = flat(make(ragged(history=[good, chat_of([b"no image", "What?"]), long])))
    assert [row["error"].partition(":")[0] for row in out] == ["", "ImageError", "PromptLengthError"]
    assert set(out[0]["tokens"].response.tolist()) == set(allowed)
    raising = policy("history")
    with pytest.raises(ImageError, match=r"row 1.*no image"):
        raising(ragged(history=[good, chat_of([b"no image", "What?"])]))
    with pytest.raises(PromptLengthError, match="row 0"):
        raising(ragged(history=[long]))
