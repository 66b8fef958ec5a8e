"""Says what stands in the prompt of a request with images: which positions hold a token, and which a row of an image.

SGLang keeps a number beyond the vocabulary at each row of an image, made of the image's hash: its prefix cache then
keeps images apart, and so do the running values that are kept here. Nothing else may read those numbers as tokens.
Knows SGLang's requests and configurations by attribute name, and imports nothing of SGLang.
"""

from __future__ import annotations

from typing import Any

__all__ = ["image_token_of", "tokens_of_prompt"]


def image_token_of(config: Any) -> int | None:
    """Return the id that stands for an image in a prompt.

    Args:
        config: SGLang's ``ModelConfig``.

    Returns:
        The id; None for a model that reads no images, or whose configuration does not say.
    """
    if not config.is_image_understandable_model:
        return None
    names = ("image_token_id", "image_token_index")
    found = (getattr(config.hf_config, name, None) for name in names)
    return next((token_id for token_id in found if isinstance(token_id, int)), None)


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
