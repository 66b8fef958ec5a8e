"""What a row's output has of its images: the images themselves, and what a trainer's forward pass reads of them.

Knows nothing of prompts or engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.utils import NestedKey

from torchrl_sglang_hidden.images.expansion import NO_IMAGES, ImageProcessor
from torchrl_sglang_hidden.policy.rows import Row

__all__ = ["NO_IMAGE_ROWS", "ImageRows"]


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Makes the outputs of the images of a call's rows.

    Args:
        processor: the policy's.
        images_key: where the images go; None leaves them out.
        pixel_values_key: where the processor's tensors go; None leaves them out.
    """

    processor: ImageProcessor
    images_key: NestedKey | None
    pixel_values_key: NestedKey | None
    # Several samples of a prompt have the same images.
    _tensors: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def values(
        self, row: Row, num_response: int, place: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[NestedKey | None, Any]:
        """Return the outputs of one row.

        Args:
            row: the prompt row.
            num_response: tokens that follow its prompt.
            place: pads what has one entry for each token.
        """
        values: dict[NestedKey | None, Any] = {}
        images = () if row.images is None else row.images.images
        if self.images_key is not None:
            values[self.images_key] = NonTensorData(tuple(image.uri for image in images))
        if self.pixel_values_key is not None:
            found = self._read(row)
            if row.placed is not None and self.processor.types_tokens:
                is_row_N = torch.zeros(len(row.prompt_ids) + num_response, dtype=torch.int64)
                for start, stop in row.placed.ranges:
                    is_row_N[start:stop] = (torch.tensor(row.prompt_ids[start:stop]) == row.placed.placeholder).long()
                found = {**found, "mm_token_type_ids": place(is_row_N)}
            values[self.pixel_values_key] = TensorDict(found)
        return values

    def _read(self, row: Row) -> dict[str, torch.Tensor]:
        if row.images is None:
            return {}
        if id(row) not in self._tensors:
            self._tensors[id(row)] = self.processor.tensors(row.images.images)
        return self._tensors[id(row)]


# Of a model that takes text alone.
NO_IMAGE_ROWS = ImageRows(NO_IMAGES, None, None)
