"""Says what stands in the prompt of a request with images: which positions hold a token, and which a row of an image.

SGLang keeps a number beyond the vocabulary at each row of an image, made of the image's hash: its prefix cache then
keeps images apart, and so do the running values that are kept here. Nothing else may read those numbers as tokens.
Knows SGLang's requests and configurations by attribute name, and imports nothing of SGLang.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

from torchrl_sglang_hidden.protocol import image_token_in

__all__ = ["AROUND_IMAGES", "forget_embeddings", "image_token_of", "tokens_of_prompt"]

# Where SGLang keeps what its vision tower made of an image; a server of texts need not have loaded it.
EMBEDDINGS_MODULE = "sglang.srt.managers.mm_schedule"

HASH_BYTES = 8  # of the number that SGLang keeps for an image
# Most numbers of a tensor that describes an image, such as its grid of patches; pixels are more.
MAX_SHAPE_NUMBERS = 64


def image_token_of(config: Any) -> int | None:
    """Return the id that stands for an image in a prompt.

    Args:
        config: SGLang's ``ModelConfig``.

    Returns:
        The id; None for a model that reads no images, or whose configuration does not say.
    """
    if not config.is_image_understandable_model:
        return None
    return image_token_in(config.hf_config)


def tokens_of_prompt(req: Any) -> tuple[list[int], frozenset[int]]:
    """Return the prompt as it was written, and the positions where a row of an image stands.

    Args:
        req: SGLang's request.

    Returns:
        The P ids, all of the vocabulary, with the placeholder's at each row of an image; and those positions.
    """
    ids = list(req.origin_input_ids)
    if req.multimodal_inputs is None:
        return ids, frozenset()
    rows = frozenset(position for position, token_id in enumerate(ids) if token_id >= req.vocab_size)
    written = req.origin_input_ids_unpadded
    if len(written) == len(ids):
        return list(written), rows
    # A model whose images SGLang expands by itself, so that no placeholder stands there.
    return [0 if position in rows else token_id for position, token_id in enumerate(ids)], rows


def around_pad_value(original: Callable[[Any], None], item: Any) -> None:
    """Have images of the same bytes and other shapes keep apart in SGLang's prefix cache, and in that of its tower.

    SGLang hashes an image's pixels without their shape: a lying and a standing image of one colour had one hash, and
    the second was given the states of the first.
    """
    is_known = item.pad_value is not None
    original(item)
    if is_known or item.hash is None:
        return
    shapes = [list(getattr(item.feature, "shape", ()))]
    for name, value in sorted(item.model_specific_data.items()):
        if hasattr(value, "tolist") and value.numel() <= MAX_SHAPE_NUMBERS:
            shapes.append([name, value.tolist()])
    digest = hashlib.sha256(f"{item.hash} {shapes}".encode()).digest()
    item.set_hash(int.from_bytes(digest[:HASH_BYTES], "big"))


def around_clear_preprocessed(original: Callable[[Any], None], processor: Any) -> None:
    """Have a processor that stands around another one, as that of Pixtral, empty the other's cache: it has none itself.

    Without this, a weight update or a flush of such a model is carried out, and then answered with an internal error.
    """
    original(_inmost(processor))


def _inmost(image_processor: Any) -> Any:
    return getattr(image_processor, "inner", image_processor)


def around_retracted_positions(original: Callable[..., Any], positions: Any, num_output: int) -> Any:
    """Count the positions of a retracted request's response from the largest of its prompt on.

    SGLang counts from the first axis of the prompt's last row: of a row of an image that is the image's first position,
    and what was sampled behind a prompt that ends with an image would be computed again with others than at first.

    Args:
        original: SGLang's function, which appends.
        positions: M-RoPE's, ``[3, P]``.
        num_output: tokens sampled so far.

    Returns:
        ``[3, P + num_output]``.
    """
    extended = original(positions, num_output)
    if num_output > 0:
        extended[:, positions.shape[1] :] += positions.max() - positions[0, -1]
    return extended


def forget_embeddings() -> None:
    """Empty SGLang's cache of what its vision tower made of each image.

    SGLang keeps it by the image's hash, and neither new weights nor a flush of the prefix cache empties it: an image
    that was seen before would have the old tower's rows in the new language model.
    """
    cache = getattr(sys.modules.get(EMBEDDINGS_MODULE), "embedding_cache", None)
    if cache is not None:
        cache.clear()


_PROCESSOR = "sglang.srt.multimodal.processors.base_processor.BaseMultimodalProcessor"
# Hooks around SGLang's functions, by their names.
AROUND_IMAGES: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value": around_pad_value,
    "sglang.srt.managers.mm_utils.extend_mrope_positions_for_retracted_request": around_retracted_positions,
    f"{_PROCESSOR}.clear_preprocess_cache": around_clear_preprocessed,
}
