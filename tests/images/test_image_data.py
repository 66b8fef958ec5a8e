"""An image in any form becomes the same pixels; what is no image is refused by name."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from torchrl_sglang_hidden import ImageError, InputTypeError
from torchrl_sglang_hidden.images.image_data import MAX_PIXELS, ImageData, read_image

# Not as wide as high, and no channel like another.
PIXELS_HWC = torch.arange(5 * 7 * 3, dtype=torch.int64).reshape(5, 7, 3).mul(37).remainder(256).to(torch.uint8)


def file_bytes(kind: str = "PNG", image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS_HWC.numpy())).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: ImageData) -> torch.Tensor:
    return torch.from_numpy(np.array(data.open()))


def read_only() -> np.ndarray[Any, Any]:
    pixels = PIXELS_HWC.numpy().copy()
    pixels.flags.writeable = False
    return pixels


FORMS: dict[str, Callable[[], Any]] = {
    "PIL": lambda: Image.fromarray(PIXELS_HWC.numpy()),
    "tensor [H, W, C]": lambda: PIXELS_HWC,
    "tensor [C, H, W]": lambda: PIXELS_HWC.permute(2, 0, 1),
    "array": lambda: PIXELS_HWC.numpy(),
    "floats": lambda: PIXELS_HWC.float() / 255,
    "doubles": lambda: PIXELS_HWC.numpy() / 255,
    "mirrored views": lambda: np.ascontiguousarray(PIXELS_HWC.numpy()[::-1, :, ::-1])[::-1, :, ::-1],
    "a read-only array": read_only,
    "columns first in memory": lambda: np.asfortranarray(PIXELS_HWC.numpy()),
    "the other byte order": lambda: (PIXELS_HWC.numpy() / 255).astype(">f4"),
    "long doubles": lambda: PIXELS_HWC.numpy().astype(np.longdouble) / 255,
    "opaque, four channels": lambda: torch.cat([PIXELS_HWC, torch.full((5, 7, 1), 255, dtype=torch.uint8)], -1),
    "bytes": file_bytes,
    "bytearray": lambda: bytearray(file_bytes()),
    "data URI": lambda: "data:image/png;base64," + base64.b64encode(file_bytes()).decode(),
    "mapping": lambda: {"bytes": file_bytes(), "path": "nowhere.png"},
    "with alpha": lambda: Image.fromarray(PIXELS_HWC.numpy()).convert("RGBA"),
    "palette of its own": lambda: file_bytes(image=Image.fromarray(PIXELS_HWC.numpy()).quantize(64)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pixels(form: str) -> None:
    found = read_image("row 0:", FORMS[form]())
    assert (found.width, found.height) == (7, 5)
    assert found.uri.startswith("data:image/png;base64,")
    if form != "palette of its own":
        assert torch.equal(pixels_of(found), PIXELS_HWC)
    assert read_image("again:", found) is found


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(file_bytes())
    for form in (path, str(path), f"file://{path}", {"path": str(path), "bytes": None}):
        assert torch.equal(pixels_of(read_image("row 0:", form)), PIXELS_HWC)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG2000", "AVIF"])
def test_a_file_of_plain_colours_travels_as_it_is(kind: str) -> None:
    data = file_bytes(kind)
    found = read_image("row 0:", data)
    assert found.uri == f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode()


def test_a_jpeg_travels_as_what_it_was_decoded_to() -> None:
    """On a GPU SGLang would decode it by itself, to other colours than those of ``pixel_values``."""
    data = file_bytes("JPEG", quality=50)
    found = read_image("row 0:", data)
    assert found.uri.startswith("data:image/png;base64,")
    assert torch.equal(pixels_of(found), torch.from_numpy(np.array(Image.open(io.BytesIO(data)))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_travels(kind: str) -> None:
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue", "lime")]
    found = read_image("row 0:", file_bytes(kind, frames[0], save_all=True, append_images=frames[1:]))
    assert found.uri.startswith("data:image/png")
    assert (pixels_of(found) - torch.tensor([255, 0, 0], dtype=torch.uint8)).abs().max() <= 1


def test_what_depends_on_the_reader_is_settled_before_it_travels() -> None:
    """A turned photograph and a grey one: two readers that treat them differently would compute different states."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image("row 0:", file_bytes("JPEG", exif=exif))
    assert (turned.width, turned.height) == (5, 7)
    assert turned.uri.startswith("data:image/png")
    grey = read_image("row 0:", torch.arange(12, dtype=torch.uint8).reshape(3, 4))
    assert torch.equal(pixels_of(grey), torch.arange(12, dtype=torch.uint8).reshape(3, 4, 1).expand(3, 4, 3))
    one = read_image("row 0:", torch.arange(15, dtype=torch.uint8).reshape(1, 3, 5))
    assert one.digest == read_image("row 0:", torch.arange(15, dtype=torch.uint8).reshape(3, 5)).digest


EXIF = {
    "no EXIF": b"garbage, garbage",
    "bytes for a number": b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 7, 4, b"abc\0", 0),
    "a text for a number": b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 2, 4, b"6\0\0\0", 0),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("case", EXIF)
def test_damaged_exif_turns_nothing(case: str, kind: str) -> None:
    data = file_bytes(kind, exif=b"Exif\0\0" + EXIF[case])
    found = read_image("row 0:", data)
    assert (found.width, found.height) == (7, 5)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert torch.equal(pixels_of(found), expected)


def test_no_program_is_run_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL opens an EPS by Ghostscript, which runs what the file says."""
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda image: pytest.fail("it was run"))
    eps = file_bytes("EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ImageError, match="no image in one of"):
        read_image("row 0:", eps)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_whatever_is_damaged_is_an_error_of_this_package(kind: str) -> None:
    data, numbers = file_bytes(kind), random.Random(1)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[numbers.randrange(min(len(data), 200))] = numbers.randrange(256)
        with contextlib.suppress(ImageError):
            assert read_image("row 0:", bytes(damaged)).open().mode == "RGB"


def test_the_digest_tells_images_apart() -> None:
    other = PIXELS_HWC.clone()
    other[0, 0, 0] += 1
    first, again, second = (read_image("row 0:", pixels) for pixels in (PIXELS_HWC, PIXELS_HWC.clone(), other))
    assert first == again
    assert first.digest != second.digest


BAD = {
    "a truncated file": (lambda: file_bytes()[:60], "cannot be decoded"),
    "no image": (lambda: b"hello", "5 bytes that are no image"),
    "no bytes": (lambda: b"", "0 bytes that are no image"),
    "a text": (lambda: "a description of a cat", "the path 'a description of a cat', which cannot be read"),
    "a missing file": (lambda: Path("/nowhere/at/all.png"), "which cannot be read"),
    "a URL": (lambda: "https://example.com/cat.png", "fetches from the network"),
    "another URI": (
        lambda: "data:text/plain;base64,aGVsbG8=",
        "expected one that begins with 'data:image/png;base64,'",
    ),
    "no ASCII": (lambda: "data:image/png;base64,é", "a data URI that is no base64"),
    "four frames": (
        lambda: torch.arange(4 * 6 * 5, dtype=torch.uint8).reshape(4, 6, 5),
        "fourth channel is not 255 everywhere",
    ),
    "no base64": (lambda: "data:image/png;base64,!!!", "a data URI that is no base64"),
    "floats over 1": (lambda: torch.full((4, 4, 3), 255.0), r"float pixels from 255 to 255; expected 0 to 1"),
    "floats under 0": (lambda: torch.linspace(-1, 1, 48).reshape(4, 4, 3), "float pixels from -1 to 1"),
    "no numbers": (lambda: torch.full((4, 4, 3), torch.nan), "float pixels from nan to nan"),
    "no channels": (lambda: torch.zeros(5, 6, 7, dtype=torch.uint8), r"pixels of shape \(5, 6, 7\): no axis of"),
    "channels twice": (lambda: torch.zeros(3, 8, 3, dtype=torch.uint8), "either axis may be the channels"),
    "four axes": (lambda: torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"pixels of shape \(2, 8, 8, 3\)"),
    "no pixels": (
        lambda: torch.zeros(0, 8, 3, dtype=torch.uint8),
        "an image of 8 × 0 pixels; .* give one of another size",
    ),
    "16 bits": (lambda: Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "more than 8 bits a channel"),
    "a mode of PIL's own": (lambda: Image.new("La", (4, 4)), "conversion from La"),
    "too large": (lambda: Image.new("L", (10_000, 10_000)), rf"10000 × 10000 pixels; the limit is 1 to {MAX_PIXELS}"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused(case: str) -> None:
    make, match = BAD[case]
    with pytest.raises(ImageError, match=rf"^row 3, image 1: .*{match}"):
        read_image("row 3, image 1:", make())


OTHER_TYPES = [
    None, 3, [PIXELS_HWC], PIXELS_HWC.long(), PIXELS_HWC.to(torch.int32).numpy(), PIXELS_HWC.numpy() > 5,
    np.array(["a.png"]), np.array([None, None]), PIXELS_HWC.numpy().astype(complex), PIXELS_HWC.numpy().astype("u2"),
    torch.rand(3, 5, 7).to_sparse(), torch.empty(3, 5, 7, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("value", OTHER_TYPES)
def test_another_type_is_refused(value: Any) -> None:
    with pytest.raises(InputTypeError, match=r"^row 3: .*; expected"):
        read_image("row 3:", value)
