"""Recordings of images over the fake engine: a label is that of its row's text and image, from every kind of data."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.fake_images import IMAGE_ID
from helpers.picture_env import PLACE, PROMPT, READS, picture_policy, pixels_of, vector_of, with_pictures
from helpers.policy_batches import make
from helpers.recordings import assert_same
from helpers.word_env import TOKENIZER
from helpers.word_processor import picture
from PIL import Image
from tensordict import TensorDict, TensorDictBase

from torchrl_sglang_hidden import (
    CapabilityError,
    InputTypeError,
    MissingKeyError,
    Recording,
    RecordingError,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.images.image_data import FILES, read_image
from torchrl_sglang_hidden.rl import data_rows, record

COUNT = 7


def recorded(data: Any, path: Path, *, policy: Any = None, **options: Any) -> Recording:
    options = {"prompt": PROMPT, "progress": False, "images_keys": ["pixels"], "batch_size": 3, **options}
    return record_hidden_states(picture_policy()[0] if policy is None else policy, data, path, **options)


def batch() -> TensorDictBase:
    found: TensorDictBase = with_pictures(TensorDict(observation=torch.arange(COUNT)[:, None], batch_size=COUNT))
    return found


def pil(number: int) -> Image.Image:
    return Image.fromarray(pixels_of(torch.tensor([[number]]))[0].numpy())


def as_npz(path: Path) -> str:
    one = batch()
    np.savez(path / "data.npz", observation=one["observation"].numpy(), pixels=one["pixels"].numpy())
    return str(path / "data.npz")


def as_hugging_face(path: Path) -> Any:
    rows = {"observation": list(range(COUNT)), "pixels": [pil(number) for number in range(COUNT)]}
    features = datasets.Features({"observation": datasets.Value("int64"), "pixels": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def as_generator(path: Path) -> Iterator[Any]:
    for number in range(COUNT):
        yield {"observation": number, "pixels": pil(number)}


DATA: dict[str, Callable[[Path], Any]] = {
    "tensordict": lambda path: batch(),
    "rows": lambda path: [{"observation": row["observation"], "pixels": row["pixels"].numpy()} for row in batch()],
    "npz": as_npz,
    "hugging face": as_hugging_face,
    "generator": as_generator,
    "uris": lambda path: [{"observation": n, "pixels": read_image("", pil(n)).uri} for n in range(COUNT)],
}


@pytest.mark.parametrize("kind", DATA)
def test_every_row_has_the_vector_of_its_text_and_image(kind: str, tmp_path: Path) -> None:
    out = recorded(DATA[kind](tmp_path), tmp_path / "r").tensordict
    assert out.batch_size == (COUNT,)
    for number, row in enumerate(out.unbind(0)):
        expected = vector_of(PROMPT.format(observation=number), pil(number))
        torch.testing.assert_close(row["hidden_states", "prompt"], expected)
        if kind in ("tensordict", "rows", "npz"):
            assert torch.equal(row["pixels"], pixels_of(torch.tensor([[number]]))[0]), "recorded as they are"
        else:
            image = read_image("", pil(number))
            assert row["pixels"] == (image.uri if kind == "uris" else image.digest)


def test_of_an_npz_few_images_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = data_rows._NpzArray.take
    monkeypatch.setattr(data_rows, "NPZ_BYTES", 2 * (8 + 9))
    monkeypatch.setattr(data_rows._NpzArray, "take", lambda self, count: taken.append(count) or take(self, count))
    found = recorded(as_npz(tmp_path), tmp_path / "r")
    assert (max(taken), len(found)) == (2, COUNT)


def test_several_images_of_a_row_and_rows_without_one(tmp_path: Path) -> None:
    rows = [{"ask": f"{PLACE} w1 {PLACE}", "images": [picture(1), picture(2)]}, {"ask": "w2", "images": None}]
    found = recorded(rows, tmp_path / "r", prompt="{ask}", images_keys=["images"]).tensordict
    expected = [vector_of(rows[0]["ask"], picture(1), picture(2)), vector_of("w2")]
    torch.testing.assert_close(found["hidden_states", "prompt"], torch.stack(expected))


def test_every_form_in_a_list_and_alone(tmp_path: Path) -> None:
    data = io.BytesIO()
    picture(1).save(data, "PNG", compress_level=1)  # as images are written to be sent
    (tmp_path / "1.png").write_bytes(data.getvalue())
    pixels = torch.from_numpy(np.array(picture(1)))
    encoded = [{"bytes": data.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    forms = [picture(1), pixels.numpy(), data.getvalue(), tmp_path / "1.png", read_image("", picture(1)).uri, *encoded]
    expected = vector_of(f"{PLACE} w1", picture(1))
    rows = [{"image": form} for form in (*forms[2:], *([form] for form in (*forms, pixels)))]
    found = recorded(rows, tmp_path / "r", prompt=f"{PLACE} w1", images_keys=["image"])
    assert (len(found), found.failures) == (len(rows), ())
    torch.testing.assert_close(found.tensordict["hidden_states", "prompt"], expected.expand(len(rows), -1))


def test_a_hugging_face_data_set_that_does_not_decode(tmp_path: Path) -> None:
    data = as_hugging_face(tmp_path).cast_column("pixels", datasets.Image(decode=False))
    assert data[0]["pixels"].keys() == {"bytes", "path"}
    found = recorded(data, tmp_path / "r").tensordict
    expected = [vector_of(PROMPT.format(observation=row["observation"]), row["pixels"]) for row in data]
    torch.testing.assert_close(found["hidden_states", "prompt"], torch.stack(expected))
    assert len({row["pixels"] for row in found.unbind(0)}) == COUNT, "a digest each"


def test_nested_keys_by_their_names(tmp_path: Path) -> None:
    data = batch()
    found = recorded(data, tmp_path / "r", images_keys=["agent.view"]).tensordict
    expected = [vector_of(PROMPT.format(observation=n), row["agent", "view"]) for n, row in enumerate(data)]
    torch.testing.assert_close(found["hidden_states", "prompt"], torch.stack(expected))


# --- a folder ---------------------------------------------------------------------------------------------------------

NAMES = ["a/2.png", "a/10.PNG", "b.png", "z.webp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    (path / "a").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(number).save(path / name, lossless=True)
    (path / "notes.txt").write_text("no image")
    return path


def test_a_folder_of_images_is_sorted_by_name(folder: Path, tmp_path: Path) -> None:
    found = recorded(folder, tmp_path / "r", prompt=f"{PLACE} w1", images_keys=None).tensordict
    assert [row["path"] for row in found.unbind(0)] == sorted(NAMES)
    for row in found.unbind(0):
        torch.testing.assert_close(row["hidden_states", "prompt"], vector_of(f"{PLACE} w1", folder / row["path"]))
        assert len(row["image"]) == 16, "a digest, and no copy of the file"


@pytest.mark.parametrize("content", ["{}", '{"images": []}', "[1,", "[]"])
@pytest.mark.parametrize("name", ["meta.json", "state.json"])
def test_a_folder_of_images_with_a_file_of_anothers(name: str, content: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_text(content)
    assert len(recorded(folder, tmp_path / "r", prompt=f"{PLACE} w1", images_keys=None)) == len(NAMES)


def test_a_name_is_a_prompts_field_too(folder: Path, tmp_path: Path) -> None:
    say = lambda row: f"{PLACE} w{len(row['path'])}"  # noqa: E731
    found = recorded(str(folder), tmp_path / "r", prompt=say, images_keys=["image"]).tensordict
    for row in found.unbind(0):
        expected = vector_of(f"{PLACE} w{len(row['path'])}", folder / row["path"])
        torch.testing.assert_close(row["hidden_states", "prompt"], expected)


def test_a_folder_has_every_kind_of_image_that_is_read(tmp_path: Path) -> None:
    Image.init()
    kinds = {suffix: Image.EXTENSION[suffix] for suffix in data_rows.IMAGE_SUFFIXES}
    assert set(kinds.values()) == set(FILES)
    (tmp_path / "images").mkdir()
    for suffix, kind in kinds.items():
        picture(1).save(tmp_path / "images" / f"1{suffix.upper()}", kind)
    found = recorded(tmp_path / "images", tmp_path / "r", prompt=f"{PLACE} w1", images_keys=None)
    assert (len(found), found.failures) == (len(kinds), ())


def test_a_bad_file_costs_its_row_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.warns(UserWarning, match="1 of 5 rows"):
        found = recorded(folder, tmp_path / "r", prompt=f"{PLACE} w1", images_keys=None)
    assert [failure.row for failure in found.failures] == [3]
    assert found.failures[0].reason.startswith("ImageError: row 3, 'image', image 0: ")
    assert bool(found.tensordict["hidden_states", "prompt"][3].isnan().all())
    assert not found.tensordict["hidden_states", "prompt"][4].isnan().any()


# --- stopped ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", ["npz", "hugging face"])
def test_it_goes_on_where_it_was_stopped(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)
    data = DATA[kind](tmp_path)
    whole = recorded(data, tmp_path / "whole")
    policy, engine = picture_policy()
    calls = itertools.count()

    def stop(rows: Any) -> None:
        if next(calls) == 1:
            raise Stop

    engine.fault = stop
    with pytest.raises(Stop):
        recorded(data, tmp_path / "r", policy=policy)
    engine.fault = None
    engine.payloads.clear()
    found = recorded(data, tmp_path / "r", policy=policy)
    assert [len(payload["input_ids"]) for payload in engine.payloads] == [3, 1], "the first three were there"
    assert_same(found.tensordict, whole.tensordict)
    assert found.metadata["images"] == ["pixels"]


def test_another_image_is_other_data(folder: Path, tmp_path: Path) -> None:
    ask = f"{PLACE} w1"
    recorded(folder, tmp_path / "r", prompt=ask, images_keys=None)
    picture(8).save(folder / "zz.png")
    assert len(recorded(folder, tmp_path / "r", prompt=ask, images_keys=None)) == 5, "one more is gone on with"
    picture(9).save(folder / "zz.png")
    with pytest.raises(RecordingError, match="row 4 of the data is not the one that was recorded"):
        recorded(folder, tmp_path / "r", prompt=ask, images_keys=None)


def test_other_keys_are_another_recording(tmp_path: Path) -> None:
    recorded(batch(), tmp_path / "r")
    with pytest.raises(RecordingError, match="recorded with another images"):
        recorded(batch(), tmp_path / "r", images_keys=["agent.view"])
    recorded(batch(), tmp_path / "text", prompt="w{observation}", images_keys=[])
    assert "images" not in load_recording(tmp_path / "text").metadata, "as recordings of before images have it"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_takes_text_alone(tmp_path: Path, folder: Path) -> None:
    for data, keys in ((batch(), ["pixels"]), (folder, None)):
        with pytest.raises(CapabilityError, match="takes text alone"):
            recorded(data, tmp_path / "r", policy=make("text", **READS)[0], images_keys=keys)
    assert not (tmp_path / "r").exists()


def test_what_is_no_key_and_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match=r"images_keys='pixels' is a string; .*images_keys=\['pixels'\]"):
        recorded(batch(), tmp_path / "r", images_keys="pixels")
    with pytest.raises(MissingKeyError, match="row 0: no 'frame'"):
        recorded(batch(), tmp_path / "r", images_keys=["frame"])
    with pytest.raises(InputTypeError, match="name it in images_keys if it is an image"):
        recorded([{"a": picture(1)}], tmp_path / "r", prompt="{a}", images_keys=[])
    with pytest.raises(InputTypeError, match="row 0, 'pixels'"):
        recorded([{"observation": 1, "pixels": object()}], tmp_path / "r")


def test_a_row_without_its_image_is_recorded_as_such(tmp_path: Path) -> None:
    rows = [{"image": picture(1)}, {"image": None}, {"image": []}]
    with pytest.warns(UserWarning, match="2 of 3 rows"):
        found = recorded(rows, tmp_path / "r", prompt=f"{PLACE} w1", images_keys=["image"])
    assert [failure.row for failure in found.failures] == [1, 2]
    assert all(failure.reason.startswith(f"ImageError: row {failure.row}: ") for failure in found.failures)
    expected = vector_of(f"{PLACE} w1", picture(1))
    torch.testing.assert_close(found.tensordict["hidden_states", "prompt"][0], expected)


def test_a_part_that_no_tokenizer_reads_costs_its_row(tmp_path: Path) -> None:
    def ask(row: TensorDictBase) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["ask"]}]}]

    rows = [{"ask": "w1", "image": picture(1)}, {"ask": "\ud800", "image": picture(1)}]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        found = recorded(rows, tmp_path / "r", prompt=ask, images_keys=["image"])
    assert found.failures[0].reason.startswith(r"InputError: row 1: '\ud800' has '\ud800' at character 0")


def test_a_placeholder_too_many_costs_its_row(tmp_path: Path) -> None:
    rows = [{"ask": f"{PLACE} w1", "image": picture(1)}, {"ask": f"{PLACE} {PLACE}", "image": picture(2)}]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        found = recorded(rows, tmp_path / "r", prompt="{ask}", images_keys=["image"])
    assert f"2 placeholders, of id {IMAGE_ID}, for 1 images" in found.failures[0].reason
    assert TOKENIZER(PLACE)["input_ids"] == [IMAGE_ID]
