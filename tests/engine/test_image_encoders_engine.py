"""Images in what stands on a policy, on real servers: the state encoder, recordings, their command, the vector service.

Their vectors are those of the engine's own answers, each of which is held against Hugging Face first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.image_site import END, START, ImageSite
from helpers.policy_checks import STATE_RTOL, relative_error
from helpers.vlm_models import PIXELS, picture, uri_of
from helpers.word_env import WordEnv
from PIL import Image as PILImage
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import ParallelEnv, TransformedEnv, check_env_specs
from typer.testing import CliRunner

from torchrl_sglang_hidden import (
    HiddenSpec,
    HiddenStateTransform,
    SGLangHiddenWrapper,
    load_recording,
    ragged,
    record_hidden_states,
)
from torchrl_sglang_hidden.cli import app
from torchrl_sglang_hidden.rl import record

LAYERS = (0, -1)
QUESTION = "What is number {observation}?"
# Places whose rows are not those of the first model's images alone: no square, and not one size.
SIZES = ((3, 2), (2, 2), (1, 3))

Truth = Callable[..., torch.Tensor]


@pytest.fixture
def reads(image_site: ImageSite) -> SGLangHiddenWrapper:
    """Return a policy that reads prompts alone."""
    return SGLangHiddenWrapper(
        image_site.server,
        input_mode="text",
        hidden=HiddenSpec(("prompt",), layers=LAYERS),
        generate_kwargs={"max_new_tokens": 0},
    )


@pytest.fixture
def truth(image_site: ImageSite) -> Truth:
    """Return a function that gives what a prompt of these parts pools to, ``[K, D]``."""

    def pooled(*parts: Any) -> torch.Tensor:
        request = image_site.request(
            *parts, sampling={"max_new_tokens": 0}, hidden=HiddenSpec(("prompt",), layers=LAYERS)
        )
        [completion] = image_site.server.generate([request])
        image_site.check([request], [completion])
        return completion.hidden["prompt"].vector

    return pooled


def prompt_of(site: ImageSite, question: str) -> str:
    before, after = site.writer.around
    return START + before + site.writer.token + after + question + END


def assert_vector(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert relative_error(found.flatten(), expected.flatten()) < STATE_RTOL


class Scenes(WordEnv):
    """Shows a picture of each observation at ``pixels``, of three by two rows of a model."""

    def __init__(self, kind: str, lengths: int | list[int], start: int = 0) -> None:
        self.kind = kind
        super().__init__(lengths, start)
        self.observation_spec["pixels"] = Unbounded((*self.batch_size, *self.picture(0).shape), dtype=torch.uint8)

    def picture(self, number: int) -> torch.Tensor:
        return torch.from_numpy(np.array(picture(number, 3 * PIXELS[self.kind], 2 * PIXELS[self.kind])))

    def _seen(self) -> TensorDict:
        td = super()._seen()
        pixels = [self.picture(int(number)) for number in td["observation"].flatten()]
        return td.set("pixels", torch.stack(pixels).reshape(*self.batch_size, *pixels[0].shape))


def test_frames_of_environments(image_site: ImageSite, reads: SGLangHiddenWrapper, truth: Truth) -> None:
    """For each environment, step and reset; a frame that was there before comes from the cache."""
    encode = HiddenStateTransform(
        reads, prompt_of(image_site, QUESTION), in_keys=["observation"], images_in_keys=["pixels"], cache_size=64
    )
    env = TransformedEnv(Scenes(image_site.writer.kind, [2, 100]), encode)
    check_env_specs(env, seed=0)
    out = env.rollout(4, break_when_any_done=False)
    assert out["next", "done"].sum() == 2
    found = torch.cat([out["hidden_state"], out["next", "hidden_state"]])
    numbers = torch.cat([out["observation"], out["next", "observation"]])[..., 0]
    known: dict[int, torch.Tensor] = {}
    for row, number in zip(found.flatten(0, 1), numbers.flatten().tolist(), strict=True):
        if number not in known:
            known[number] = truth(image_site.writer.picture(number, 3, 2), QUESTION.format(observation=number))
        assert_vector(row, known[number])
    before = encode.cache_info
    # The same frame with other pixels is another one.
    last = out["next"][:, -1].select("observation", "pixels")
    changed = last.clone().set("pixels", 255 - last["pixels"])
    vectors = [encode(td.clone())["hidden_state"] for td in (last, changed)]
    after = encode.cache_info
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 2)
    assert torch.equal(vectors[0], out["next", "hidden_state"][:, -1])
    assert not torch.allclose(*vectors, rtol=1e-3)
    inverted = PILImage.fromarray(changed["pixels"][1].numpy())
    number = int(changed["observation"][1])
    assert_vector(vectors[1][1], truth(inverted, QUESTION.format(observation=number)))


def scene_env(made: HiddenStateTransform, kind: str, length: int, start: int) -> TransformedEnv:
    return TransformedEnv(Scenes(kind, length, start), made.clone())


@pytest.mark.parametrize("image_site", ["qwen2_5_vl"], indirect=True)
def test_frames_in_the_workers_of_a_parallel_env(
    image_site: ImageSite, reads: SGLangHiddenWrapper, truth: Truth
) -> None:
    """Each worker encodes its own frames, at resets of one environment alone too."""
    made = HiddenStateTransform(
        reads, prompt_of(image_site, QUESTION), in_keys=["observation"], images_in_keys=["pixels"]
    )
    kind = image_site.writer.kind
    env = ParallelEnv(2, [partial(scene_env, made, kind, 2, 0), partial(scene_env, made, kind, 100, 20)])
    try:
        out = env.rollout(4, break_when_any_done=False)
    finally:
        env.close()
    assert out["next", "done"].sum(1).flatten().tolist() == [2, 0], "one begins anew, and the other goes on"
    for td in (out, out["next"]):
        for row, number in zip(td["hidden_state"].flatten(0, 1), td["observation"].flatten().tolist(), strict=True):
            frame = image_site.writer.picture(number, 3, 2)
            assert_vector(row, truth(frame, QUESTION.format(observation=number)))


def test_a_recording_that_was_stopped(
    image_site: ImageSite, reads: SGLangHiddenWrapper, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of several sizes, as objects and as bytes; what goes on is the same as what was never stopped."""
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)
    pictures = [image_site.writer.picture(20 + number, *SIZES[number % 3]) for number in range(5)]

    def png(picture: PILImage.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    rows = [
        {"observation": number, "view": png(picture) if number % 2 else picture}
        for number, picture in enumerate(pictures)
    ]

    def stops() -> Iterator[dict[str, Any]]:
        yield from rows[:3]
        raise KeyboardInterrupt

    def recorded(data: Any) -> Any:
        prompt = prompt_of(image_site, QUESTION)
        return record_hidden_states(
            reads, data, tmp_path / "r", prompt=prompt, images_keys=["view"], batch_size=2, progress=False
        )

    with pytest.raises(KeyboardInterrupt):
        recorded(stops())
    assert len(load_recording(tmp_path / "r")) == 2
    out = recorded(rows).tensordict
    assert out["observation"].tolist() == [0, 1, 2, 3, 4]
    for number, found in enumerate(out["hidden_states", "prompt"]):
        assert_vector(found, truth(pictures[number], QUESTION.format(observation=number)))


def test_the_command_reads_a_folder(image_site: ImageSite, truth: Truth, tmp_path: Path) -> None:
    pictures = {f"{name}.png": image_site.writer.picture(30 + place) for place, name in enumerate("abc")}
    (tmp_path / "photos").mkdir()
    for name, shown in pictures.items():
        shown.save(tmp_path / "photos" / name)
    prompt = prompt_of(image_site, "A photo.")
    arguments = ["record", str(tmp_path / "photos"), str(tmp_path / "r"), "--url", image_site.server.url]
    result = CliRunner().invoke(app, [*arguments, "--prompt", prompt, "--layers", ",".join(map(str, LAYERS))])
    assert result.exit_code == 0, result.output
    out = load_recording(tmp_path / "r").tensordict
    assert [row["path"] for row in out] == list(pictures)
    for found, shown in zip(out["hidden_states", "prompt"], pictures.values(), strict=True):
        assert_vector(found, truth(shown, "A photo."))


def test_the_vector_service(image_site: ImageSite, truth: Truth) -> None:
    """An image in a message, and beside a text, gives the vector of the client; as numbers and as bytes."""
    picture = image_site.writer.picture(40, 2, 3)
    expected = truth(picture, "What is this?")
    text = prompt_of(image_site, "What is this?")
    body = {"input": text, "images": [uri_of(picture)], "layers": LAYERS, "segments": ["prompt"], "max_new_tokens": 0}
    answer = image_site.http.post("/v1/hidden_states", json=body)
    assert answer.status_code == 200, answer.text
    [row] = answer.json()["data"]
    assert_vector(torch.tensor(row["hidden_states"]["prompt"]), expected)
    raw = image_site.http.post("/v1/hidden_states", json={**body, "encoding_format": "bytes"})
    assert_vector(torch.frombuffer(bytearray(raw.content), dtype=torch.float32).reshape(len(LAYERS), -1), expected)
    content = [
        {"type": "image_url", "image_url": {"url": uri_of(picture)}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {"input": [[{"role": "user", "content": content}]], "layers": LAYERS, "max_new_tokens": 0}
    answer = image_site.http.post("/v1/hidden_states", json={**body, "segments": ["prompt"]})
    assert answer.status_code == 200, answer.text
    found = torch.tensor(answer.json()["data"][0]["hidden_states"]["prompt"])
    history = SGLangHiddenWrapper(
        image_site.server,
        input_mode="history",
        hidden=HiddenSpec(("prompt",), layers=LAYERS),
        generate_kwargs={"max_new_tokens": 0},
    )
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    out = history(ragged(history=[[{"role": "user", "content": parts}]]))
    assert_vector(found, out["hidden_states", "prompt"][0])


def test_images_that_the_vector_service_does_not_take(image_site: ImageSite) -> None:
    """Each is refused by name, and the server lives."""
    uri = uri_of(image_site.writer.picture(41))
    text = prompt_of(image_site, "What?")
    damaged = "data:image/png;base64," + base64.b64encode(base64.b64decode(uri.partition(",")[2])[:60]).decode()
    cases = {
        "place of a picture": {"input": text, "images": []},
        "2 images": {"input": text, "images": [uri, uri]},
        "URL": {"input": text, "images": ["http://127.0.0.1:9/a.png"]},
        "data URI": {"input": text, "images": ["/etc/hostname"]},
        "image": {"input": text, "images": [damaged]},
    }
    for words, body in cases.items():
        answer = image_site.http.post("/v1/hidden_states", json={**body, "max_new_tokens": 0, "segments": ["prompt"]})
        assert answer.status_code == 400, (words, answer.text)
        assert words in answer.text, (words, answer.text)
    assert image_site.http.get("/health").status_code == 200
