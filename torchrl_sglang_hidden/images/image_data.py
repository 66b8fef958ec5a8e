"""Reading an image, in any of the forms in which people hold one, into the form in which it travels.

Knows nothing of prompts, processors or TensorDicts.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch

from torchrl_sglang_hidden.errors import ImageError, InputTypeError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_PIXELS", "ImageData", "read_image"]

T = TypeVar("T")

# Of one image, 8192 × 8192. A model's processor makes an image smaller than this; a larger one costs memory, and takes
# longer to send than to compute.
MAX_PIXELS = 2**26
FORMS = "a PIL image, uint8 pixels [H, W, C] or [C, H, W], the bytes or the path of an image file, or a data URI"
CHANNELS = (1, 3, 4)
DATA_URI = "data:image/"
# The files that are read. PIL knows others, and runs a program for one of them: Ghostscript, on what an EPS says.
FILES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What PIL raises of a damaged file, and of the EXIF in one.
DAMAGE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip
# An EXIF tag: how the image is turned. 0 is what some cameras write for 1, upright.
ORIENTATION, UPRIGHT = 0x0112, (0, 1)
# Modes of more than 8 bits a channel, which PIL cuts off when it converts them.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True, slots=True)
class ImageData:
    """An image as it travels: in 8 bits RGB, whatever it was read from.

    Args:
        uri: a data URI, with the bytes of a PNG, or of the file that was given where every reader sees one RGB in it.
        digest: a word that is the same for the same bytes.
        width: pixels.
        height: pixels.
    """

    uri: str = field(repr=False)
    digest: str
    width: int
    height: int

    def open(self) -> Image:
        """Return the image, decoded."""
        return _open_bytes("an image", base64.b64decode(self.uri.partition(",")[2]))


def read_image(name: str, value: Any) -> ImageData:
    """Read an image.

    Args:
        name: says whose image it is, for errors.
        value: a PIL image; uint8 pixels, a tensor or an array ``[H, W, C]``, ``[C, H, W]`` or ``[H, W]``, or floats in
            [0, 1], with 1, 3 or 4 channels, of which a fourth is opaque; the bytes of an image file, or its path; a
            data URI; a mapping with one of these at ``"bytes"`` or ``"path"``, as Hugging Face's data sets have it.

    Raises:
        InputTypeError: something else.
        ImageError: a file that is not there or cannot be decoded, or is none of `FILES`; a URL of the network; pixels
            out of their range, of four channels that are no colours, or more than `MAX_PIXELS`.
    """
    if isinstance(value, ImageData):
        return value
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        inside = value.get("bytes")
        return read_image(name, value.get("path") if inside is None else inside)
    if isinstance(value, str) and value.startswith("data:"):
        return _of_bytes(name, _decoded(name, value))
    if isinstance(value, (str, os.PathLike)):
        return _of_bytes(name, _file(name, value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _of_bytes(name, bytes(value))
    if isinstance(value, torch.Tensor):
        return _of_image(name, _of_pixels(name, _dense(name, value).detach().cpu()))
    if hasattr(value, "__array__") and not hasattr(value, "convert"):
        return _of_image(name, _of_pixels(name, _tensor_of(name, np.asarray(value))))
    if hasattr(value, "convert") and hasattr(value, "load"):
        return _of_image(name, _loaded(name, cast("Image", value)))
    raise InputTypeError(f"{name} a {type(value).__name__}; expected {FORMS}")


def _decoded(name: str, uri: str) -> bytes:
    head, comma, encoded = uri.partition(",")
    if not (uri.startswith(DATA_URI) and comma and head.endswith(";base64")):
        raise ImageError(f"{name} the data URI {uri[:40]!r}…; expected one that begins with 'data:image/png;base64,'")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise ImageError(f"{name} a data URI that is no base64 ({error}); give the file's bytes") from error


def _file(name: str, path: str | os.PathLike[str]) -> bytes:
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise ImageError(
            f"{name} the URL {text[:80]!r}; neither this package nor the server fetches from the network; give the "
            "downloaded bytes or their path"
        )
    try:
        return Path(text.removeprefix("file://")).read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} the path {text[:80]!r}, which cannot be read ({error}); give {FORMS}") from error


def _of_bytes(name: str, data: bytes) -> ImageData:
    image = _open_bytes(name, data)
    if not _is_plain(image):
        return _of_image(name, image)
    return _packed(data, f"image/{str(image.format).lower()}", image)


def _is_plain(image: Image) -> bool:
    """Return whether every reader of a file sees the same RGB in it.

    No JPEG: SGLang 0.5.23 decodes it on a CUDA device with a decoder of its own, whose colours are others than PIL's.
    """
    try:
        is_upright = image.getexif().get(ORIENTATION, 1) in UPRIGHT
        settled = image.format != "JPEG" and getattr(image, "n_frames", 1) == 1
        return image.mode == "RGB" and is_upright and settled
    except DAMAGE:
        return False


def _open_bytes(name: str, data: bytes) -> Image:
    # Here and not above: importing the package is to load no library that a user may not need.
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[kind for kind in FILES if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} {len(data)} bytes that are no image in one of {FILES}; give {FORMS}") from error
    except (Image.DecompressionBombError, *DAMAGE) as error:
        raise ImageError(f"{name} {len(data)} bytes that are no image ({error}); give {FORMS}") from error
    return _loaded(name, image)


def _loaded(name: str, image: Image) -> Image:
    """Decode an image whole, so that a truncated file is found here."""
    _check_size(name, image.width, image.height)
    _decode(name, image.load)
    return image


def _decode(name: str, read: Callable[[], T]) -> T:
    """Return what PIL reads of an image."""
    from PIL.Image import DecompressionBombError

    try:
        return read()
    except (DecompressionBombError, *DAMAGE) as error:
        raise ImageError(f"{name} an image that cannot be decoded ({error}); give the whole file") from error


def _check_size(name: str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(
            f"{name} an image of {width} × {height} pixels; the limit is 1 to {MAX_PIXELS} pixels: give one of another "
            "size"
        )


def _tensor_of(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return an array's pixels, of any strides and byte order, as a tensor of its own memory."""
    if array.dtype.kind not in "buif":
        raise InputTypeError(f"{name} an array of {array.dtype}; expected {FORMS}")
    dtype: Any = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _dense(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.layout != torch.strided or value.is_meta:
        raise InputTypeError(
            f"{name} a tensor of {value.layout} on {value.device}; expected a dense one with its values"
        )
    return value


def _of_pixels(name: str, pixels: torch.Tensor) -> Image:
    from PIL import Image

    if pixels.is_floating_point():
        pixels = pixels.float()
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ImageError(f"{name} float pixels from {low:g} to {high:g}; expected 0 to 1, or uint8 from 0 to 255")
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise InputTypeError(f"{name} pixels of {pixels.dtype}; expected torch.uint8, or floats from 0 to 1")
    shape = tuple(pixels.shape)
    last, first = (pixels.ndim == 3 and shape[axis] in CHANNELS for axis in (-1, 0))
    if last and first and (shape[-1] == 3) is not (shape[0] == 3):  # an image of a few pixels: colours are three
        last, first = shape[-1] == 3, shape[0] == 3
    if pixels.ndim == 2:
        pixels, last = pixels[..., None], True
    elif last is first:
        both = "either axis may be the channels" if last else f"no axis of {CHANNELS} channels"
        raise ImageError(f"{name} pixels of shape {shape}: {both}; give [H, W, C] or [C, H, W], or a PIL image")
    pixels_HWC = pixels if last else pixels.permute(1, 2, 0)
    _check_size(name, pixels_HWC.shape[1], pixels_HWC.shape[0])
    if pixels_HWC.shape[-1] == 4 and bool((pixels_HWC[..., 3] != 255).any()):
        raise ImageError(
            f"{name} pixels of shape {shape}, whose fourth channel is not 255 everywhere: frames of a game are no "
            "colours, and transparent colours have none behind them; give three channels, a list of frames, or a PIL "
            "image"
        )
    if pixels_HWC.shape[-1] == 1:
        pixels_HWC = pixels_HWC.expand(*pixels_HWC.shape[:-1], 3)
    return Image.fromarray(pixels_HWC.contiguous().numpy())


def _of_image(name: str, image: Image) -> ImageData:
    """Write an image as RGB, turned upright."""
    from PIL import ImageOps

    if image.mode.partition(";")[0] in DEEP_MODES:
        raise ImageError(f"{name} an image of mode {image.mode!r}, more than 8 bits a channel; give one in mode 'RGB'")
    with contextlib.suppress(*DAMAGE):  # of its EXIF: it is taken as it is
        image = ImageOps.exif_transpose(image)
    rgb = _decode(name, lambda: image.convert("RGB"))
    buffer = io.BytesIO()
    # Level 1: of frames of a game a third of the time, for a tenth more bytes.
    rgb.save(buffer, "PNG", compress_level=1)
    return _packed(buffer.getvalue(), "image/png", rgb)


def _packed(data: bytes, mime_type: str, image: Image) -> ImageData:
    uri = f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
    return ImageData(uri, hashlib.sha256(data).hexdigest()[:16], image.width, image.height)
