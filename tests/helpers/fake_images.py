"""Images of the fake engine: how prompts with them are expanded, and what its model sees of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from torchrl_sglang_hidden.records import Images, Request

VOCAB_SIZE = 96
# What stands for an image, and how many rows an image is for a server that answers by payloads alone.
IMAGE_ID, IMAGE_ROWS = VOCAB_SIZE - 1, 3


# From here on stand the numbers of images' rows, as in SGLang far beyond every vocabulary: tests bring their own.
FIRST_IMAGE_ROW = 10**6


def seen_ids(prompt_ids: Sequence[int], images: Images | None) -> list[int]:
    """Return what the model sees: at each row of an image a number made of the image, beyond the vocabulary."""
    seen = list(prompt_ids)
    for uri, (start, stop) in zip(images.data, images.ranges, strict=True) if images is not None else ():
        for position in range(start, stop):
            if seen[position] == images.placeholder:
                seen[position] = FIRST_IMAGE_ROW + zlib.crc32(uri.encode()) % 1000
    return seen


def images_in(sent_ids: Sequence[int], data: Sequence[str], rows: int = IMAGE_ROWS) -> Request:
    """Return a request of ids that have one `IMAGE_ID` for each image, expanded to this many rows each.

    Without images nothing is expanded, as by SGLang.
    """
    prompt_ids: list[int] = []
    ranges = []
    for token_id in sent_ids:
        if token_id == IMAGE_ID and data:
            ranges.append((len(prompt_ids), len(prompt_ids) + rows))
        prompt_ids += [token_id] * (rows if token_id == IMAGE_ID and data else 1)
    images = Images(tuple(sent_ids), tuple(data), tuple(ranges), IMAGE_ID)
    return Request(tuple(prompt_ids), images=images if data else None)


def joined(before: Request, new: Request) -> Request:
    """Return the request of two prompts, one behind the other, with the images of both."""
    parts = [one.images or Images(one.prompt_ids, (), (), IMAGE_ID) for one in (before, new)]
    shift = len(before.prompt_ids)
    ranges = (*parts[0].ranges, *((start + shift, stop + shift) for start, stop in parts[1].ranges))
    sent_ids, data = parts[0].sent_ids + parts[1].sent_ids, parts[0].data + parts[1].data
    images = Images(sent_ids, data, ranges, IMAGE_ID) if data else None
    return Request(before.prompt_ids + new.prompt_ids, images=images)
