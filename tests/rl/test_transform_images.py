"""`HiddenStateTransform` with images: a vector is that of its row's text and pixels, whatever became of other rows."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_engine import HIDDEN_SIZE, RecordingServer
from helpers.picture_env import (
    PLACE,
    PROMPT,
    PictureEnv,
    picture_policy,
    picture_server,
    pixels_of,
    vector_of,
    vectors_of,
    with_pictures,
)
from helpers.policy_batches import make
from helpers.word_env import TOKENIZER
from helpers.word_processor import picture
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.envs import ParallelEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_sglang_hidden import (
    CapabilityError,
    HiddenStateTransform,
    ImageError,
    InputError,
    InputTypeError,
    MissingKeyError,
    connect,
)

BOTH = ["pixels", ("agent", "view")]


def transform(prompt: Any = PROMPT, *, policy: Any = None, **options: Any) -> tuple[HiddenStateTransform, Any]:
    made, engine = picture_policy(**(policy or {}))
    return HiddenStateTransform(
        made, prompt, **{"in_keys": ["observation"], "images_in_keys": ["pixels"], **options}
    ), engine


def data(*numbers: int) -> TensorDictBase:
    found: TensorDictBase = with_pictures(
        TensorDict(observation=torch.tensor(numbers)[:, None], batch_size=len(numbers))
    )
    return found


def rollout(env: TransformedEnv, steps: int) -> TensorDictBase:
    found: TensorDictBase = env.rollout(steps, break_when_any_done=False)
    return found


def test_every_step_has_the_vector_of_its_text_and_pixels() -> None:
    made, engine = transform()
    env = TransformedEnv(PictureEnv([2, 100]), made)
    check_env_specs(env)
    engine.payloads.clear()
    out = rollout(env, 4)
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"]))
    torch.testing.assert_close(out["next", "hidden_state"], vectors_of(out["next", "observation"]))
    # Reset, step, step, the reset of one environment, step, step.
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2, 2, 2, 1, 2, 2]
    assert [list(map(len, payload["image_data"])) for payload in engine.payloads[2:4]] == [[1, 1], [1]]


@pytest.mark.parametrize("late", [False, True])
def test_vectors_are_kept_between_the_steps_that_encode(late: bool) -> None:
    env = TransformedEnv(PictureEnv([2, 7, 100]), transform(every=3, late=late)[0])
    out = rollout(env, 9)
    source = torch.cat([out["observation"] - out["hidden_state_age"]])
    torch.testing.assert_close(out["hidden_state"], vectors_of(source))
    assert out["hidden_state_age"].max() > 1


def test_images_are_in_the_order_of_the_keys() -> None:
    for keys in (BOTH, BOTH[::-1]):
        env = TransformedEnv(PictureEnv(), transform(f"{PLACE} w{{observation}} {PLACE}", images_in_keys=keys)[0])
        td = env.reset()
        expected = vector_of(f"{PLACE} w0 {PLACE}", *(td[key] for key in keys))
        torch.testing.assert_close(td["hidden_state"], expected)
        other = vector_of(f"{PLACE} w0 {PLACE}", *(td[key] for key in keys[::-1]))
        assert not torch.allclose(td["hidden_state"], other)


def test_a_prompt_of_images_alone() -> None:
    env = TransformedEnv(PictureEnv(), transform(f"{PLACE} w4", in_keys=[])[0])
    td = env.reset()
    torch.testing.assert_close(td["hidden_state"], vector_of(f"{PLACE} w4", td["pixels"]))


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


BARE, WORD = {"type": "image"}, {"type": "text", "text": "w1"}
CAT = picture(1)
CHAT = f"<|start|> user {PLACE} w1 <|end|> <|start|> assistant"
PROMPTS: dict[str, tuple[Any, Any]] = {
    "ids": (lambda row: TOKENIZER(f"{PLACE} w1")["input_ids"], lambda row: vector_of(f"{PLACE} w1", row["pixels"])),
    "chat": (lambda row: chat(BARE, WORD), lambda row: vector_of(CHAT, row["pixels"])),
    "history": (
        lambda row: History.from_chats([chat(BARE, WORD)])[0],
        lambda row: vector_of(CHAT, row["pixels"]),
    ),
    "own images": (
        lambda row: chat({"type": "image", "image": CAT}, BARE, WORD),
        lambda row: vector_of(CHAT.replace(PLACE, f"{PLACE} {PLACE}"), CAT, row["pixels"]),
    ),
}


@pytest.mark.parametrize("cache_size", [0, 4])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_every_kind(kind: str, cache_size: int) -> None:
    write, expected = PROMPTS[kind]
    made, engine = transform(write, cache_size=cache_size)
    batch = data(3, 5)
    for _ in range(2):
        made(batch)
    torch.testing.assert_close(batch["hidden_state"], torch.stack([expected(row) for row in batch]))
    assert len(engine.payloads) == (1 if cache_size else 2)


def test_a_chat_of_own_images_needs_no_keys() -> None:
    made, _ = transform(lambda row: chat({"type": "image", "image": CAT}, WORD), images_in_keys=None)
    batch = data(3)
    made(batch)
    torch.testing.assert_close(batch["hidden_state"][0], vector_of(CHAT, CAT))


@pytest.mark.parametrize("images_key", [None, ("deep", "images")])
def test_images_go_where_the_policy_reads_them(images_key: Any) -> None:
    made, _ = transform(policy={"images_key": images_key})
    batch = data(3)
    made(batch)
    torch.testing.assert_close(batch["hidden_state"], vectors_of(batch["observation"]))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_same_picture_is_asked_once_and_another_one_again() -> None:
    made, engine = transform(f"{PLACE} w1", in_keys=[], cache_size=4)
    made(data(1, 1, 2))
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2]
    assert made.cache_info.hits == 1
    batch = data(1, 2, 3)
    made(batch)
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [2, 1]
    expected = [vector_of(f"{PLACE} w1", row["pixels"]) for row in batch]
    torch.testing.assert_close(batch["hidden_state"], torch.stack(expected))


def test_a_file_that_was_written_anew_is_another_picture(tmp_path: Path) -> None:
    path = tmp_path / "frame.png"
    prompt = lambda row: chat({"type": "image", "path": str(path)}, WORD)  # noqa: E731
    made, _ = transform(prompt, images_in_keys=None, cache_size=4)
    for seed in (1, 2):
        picture(seed).save(path)
        batch = data(0)
        made(batch)
        torch.testing.assert_close(batch["hidden_state"][0], vector_of(CHAT, path))


# --- copies and data --------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[RecordingServer]:
    server = picture_server()
    yield server
    server.stop()


def inner_env(made: HiddenStateTransform, length: int, start: int = 0) -> TransformedEnv:
    return TransformedEnv(PictureEnv(length, start), pickle.loads(pickle.dumps(made)))


def test_workers_of_a_parallel_env(served: RecordingServer) -> None:
    with connect(served.url) as engine:
        made, _ = transform(policy={"engine": engine})
        env = ParallelEnv(2, [partial(inner_env, made, 2), partial(inner_env, made, 7, 20)])
        out = env.rollout(5, break_when_any_done=False)
        env.close()
    torch.testing.assert_close(out["hidden_state"], vectors_of(out["observation"]))
    assert {len(payload["input_ids"]) for payload in served.payloads} == {1}


def test_a_buffer_is_labelled() -> None:
    made, _ = transform()
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), batch_size=4, transform=made)
    buffer.extend(data(*range(6)))
    sample = buffer.sample()
    torch.testing.assert_close(sample["hidden_state"], vectors_of(sample["observation"]))


@pytest.mark.parametrize("every", [1, 3])
def test_labels_of_a_rollout_are_what_the_environment_would_have_given(every: int) -> None:
    made, _ = transform(every=every)
    out = rollout(TransformedEnv(PictureEnv([3, 100]), made), 6)
    expected = out["hidden_state"].clone(), out["next", "hidden_state"].clone()
    bare = out.exclude("hidden_state", ("next", "hidden_state"), "hidden_state_age", ("next", "hidden_state_age"))
    labelled = transform(every=every)[0](bare)
    torch.testing.assert_close((labelled["hidden_state"], labelled["next", "hidden_state"]), expected)


def test_specs() -> None:
    made, _ = transform(every=2, late=True)
    env = TransformedEnv(PictureEnv([2, 3]), made)
    check_env_specs(env)
    assert env.observation_spec["hidden_state"].shape == (2, HIDDEN_SIZE)
    assert env.state_spec["pixels"].shape == (2, 1, 3, 3), "what a late vector is of goes from step to step"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_takes_text_alone_is_refused_at_once() -> None:
    policy = make("text", hidden=picture_policy()[0].config.hidden, generate_kwargs={"max_new_tokens": 0})[0]
    with pytest.raises(CapabilityError, match="images at 'pixels', and the model 'recorder' takes text alone; serve"):
        HiddenStateTransform(policy, PROMPT, in_keys=["observation"], images_in_keys=["pixels"])


def without_pixels() -> TensorDictBase:
    return data(1, 2).exclude("pixels")


def of_pixels(pixels: Any) -> TensorDictBase:
    return data(1, 2).set("pixels", pixels)


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no key": (
        PROMPT,
        without_pixels,
        MissingKeyError,
        r"row 0: no 'pixels'; it has .*change the keys of images",
    ),
    "no pixels": (PROMPT, lambda: of_pixels(torch.zeros(2, 4, dtype=torch.uint8)), ImageError, "row 0, 'pixels'"),
    "int32": (PROMPT, lambda: of_pixels(torch.zeros(2, 1, 3, 3).int()), InputTypeError, "row 0, 'pixels', image 0: "),
    "no place": ("w{observation}", lambda: data(1, 2), ImageError, r"0 placeholders.* for 1 images.*row 0 is row 0"),
    "two places": (PLACE + PROMPT, lambda: data(1, 2), ImageError, "for 1 images"),
    "no part": (lambda row: chat(WORD), lambda: data(1), ImageError, "row 0: the chat's 1 images at images_key"),
    "no image": (lambda row: chat(BARE, BARE), lambda: data(1), ImageError, "row 0: the chat's message 0, part 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_sent_is_refused_by_row_and_key(case: str) -> None:
    prompt, make_data, error, words = BAD[case]
    made, engine = transform(prompt)
    batch = make_data()
    with pytest.raises(error, match=words):
        made(batch)
    assert not engine.payloads
    assert "hidden_state" not in batch


def test_keys_that_the_environment_does_not_have() -> None:
    with pytest.raises(MissingKeyError, match=r"in_keys \['frame'\].*change in_keys or images_in_keys"):
        _ = TransformedEnv(PictureEnv(), transform(images_in_keys=["frame"])[0]).observation_spec
    with pytest.raises(InputError, match="a key is there twice"):
        transform(images_in_keys=["pixels", "pixels"])
    assert pixels_of(torch.tensor([[1]])).shape == (1, 1, 3, 3)


def test_frames_of_one_row_are_images_and_no_channels() -> None:
    ask = " ".join([PLACE] * 4)
    made, _ = transform(ask, in_keys=[], images_in_keys=["frames"])
    frames = torch.randint(256, (2, 4, 1, 3, 3), dtype=torch.uint8)
    found = made(TensorDict(frames=frames, batch_size=2))["hidden_state"]
    torch.testing.assert_close(found, torch.stack([vector_of(ask, *row) for row in frames]))
    stacked = TensorDict(frames=torch.randint(256, (2, 4, 5, 6), dtype=torch.uint8), batch_size=2)
    with pytest.raises(ImageError, match=r"row 0, 'frames', image 0: .*fourth channel is not 255 everywhere"):
        transform(PLACE, in_keys=[], images_in_keys=["frames"])[0](stacked)
