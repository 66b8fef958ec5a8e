"""Reading the images of a row of a TensorDict.

Knows nothing of prompts or processors.
"""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDictBase, is_non_tensor, is_tensor_collection
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.errors import InputTypeError
from torchrl_sglang_hidden.images.image_data import ImageData, read_image

__all__ = ["read_images"]


def read_images(name: str, row: TensorDictBase, key: NestedKey | None) -> tuple[ImageData, ...]:
    """Read the images of one row, which are one image or a list of them; nothing where it has none.

    Raises:
        InputTypeError: something else than images.
        ImageError: an image that cannot be read; see `read_image`.
    """
    if key is None:
        return ()
    try:
        value = row.get(key)
    except ValueError as error:  # a tensor where the key's path has a container
        raise InputTypeError(f"{key!r} cannot be read: {error}; images_key reads a list of images there") from error
    if is_non_tensor(value):
        value = value.tolist()
    elif is_tensor_collection(value) and {"bytes", "path"} & set(value.keys()):
        value = value.to_dict()  # one image as Hugging Face's data sets have it: a TensorDict holds no dict
    elif is_tensor_collection(value):
        raise InputTypeError(
            f"{name} {key!r}: a {type(value).__name__}; expected a list of images, one per placeholder"
        )
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        value = value.tolist()  # an array of images, or of paths
    # An empty list becomes an empty tensor in a TensorDict.
    if value is None or (isinstance(value, torch.Tensor) and value.shape == (0,)):
        return ()
    # Pixels of several images, [N, H, W, C], are N images.
    several = isinstance(value, (list, tuple)) or getattr(value, "ndim", 3) == 4
    return tuple(read_image(f"{name} {key!r}, image {i}:", one) for i, one in enumerate(value if several else [value]))
