"""Images in prompts: which ids an image becomes, where its rows stand, and what a trainer's forward pass needs of it.

A prompt has two forms. As the engine gets it, and as a chat template and a tokenizer write it, it has one placeholder
for each image: the short form. As the engine and Hugging Face's processor compute it, each placeholder is expanded to
the image's rows: the form of ``tokens.prompt``, of masks, and of every count. Knows nothing of chats or engines.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from torchrl_sglang_hidden.errors import CapabilityError, ImageError
from torchrl_sglang_hidden.images.image_data import ImageData
from torchrl_sglang_hidden.records import Images

__all__ = ["NO_IMAGES", "ImageProcessor", "RowImages", "is_processor", "tokenizer_of"]

T = TypeVar("T")

# The processors of models whose ids SGLang keeps as they are sent (its SGLANG_MM_AVOID_RETOKENIZE).
KEEPS_IDS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
# To how few and how many pixels SGLang brings an image, of a model whose processor it does not ask: by `model_type`.
SIZES = {"qwen2_vl": {"shortest_edge": 3136, "longest_edge": 1003520}}
# What to do about a prompt whose ids would not stay.
GIVE_TEXT = "give the text instead of ids, in history mode with chat='render' and prefer_tokens=False"
# The token that stands before each placeholder of these models. SGLang counts images by it: one without it has the
# positions of text there, and not of lines and columns.
START = "<|vision_start|>"
# What a processor returns of a text.
OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def is_processor(value: Any) -> bool:
    """Return whether something is a Hugging Face processor: a tokenizer and an image processor in one."""
    return hasattr(value, "tokenizer") and hasattr(value, "image_processor")


def tokenizer_of(value: Any) -> Any:
    """Return the tokenizer of a processor; what is no processor is returned as it is."""
    return value.tokenizer if is_processor(value) else value


class ImageProcessor:
    """A model's Hugging Face processor, as far as images need it. It is loaded, or copied, when the first image comes.

    The ids that an image becomes depend on its size alone: those of a size are asked for once. So the processor is a
    copy that nobody else sets, or calls in another thread with truncation, which is state of its tokenizer. Pickled, it
    is the processor that was given, or the path of the engine's.

    Args:
        given: the user's processor, or None.
        path: where the engine read its own.
        takes_images: whether the engine's model does.
        max_images: most images of one prompt that the engine takes; None for any number.
    """

    def __init__(self, given: Any, path: str, *, takes_images: bool, max_images: int | None = None) -> None:
        self.given, self.path, self.takes_images, self.max_images = given, path, takes_images, max_images
        self._loaded: Any = None
        self._lock = threading.Lock()
        self._expansions: dict[tuple[int, int], tuple[int, ...]] = {}
        # Whether the model's forward pass reads of each token whether it is an image's row.
        self.types_tokens = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it is made of: neither the lock nor a processor that was loaded."""
        return _made, (self.given, self.path, self.takes_images, self.max_images)

    @property
    def processor(self) -> Any:
        """The Hugging Face processor.

        Raises:
            CapabilityError: the engine's model takes no images, or no processor can be read.
        """
        if not self.takes_images:
            raise CapabilityError(
                f"an image for the model {self.path!r}, which takes text alone; serve a vision-language model, or "
                "leave the image out"
            )
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.path) if self.given is None else _own_copy(self.given)
        return self._loaded

    @property
    def placeholder(self) -> str:
        """The text that stands for one image in a prompt."""
        return str(self.processor.image_token)

    @property
    def placeholder_id(self) -> int:
        """The id of `placeholder`, and of every row of an image."""
        return int(self.processor.image_token_id)

    def own_template(self, tokenizer: Any) -> str | None:
        """Return the chat template that a processor brings and its tokenizer does not; None where the latter counts.

        Hugging Face's rule: ``apply_chat_template`` of a processor uses the processor's.
        """
        if self.given is None and (not self.takes_images or tokenizer.chat_template):
            return None
        found = (self.processor if self.given is None else self.given).chat_template
        return found if isinstance(found, str) else None

    def expansion(self, name: str, image: ImageData) -> tuple[int, ...]:
        """Return the ids that stand for an image in an expanded prompt, one for each of its rows.

        Raises:
            ImageError: an image that the processor refuses, such as one that is 300 times as wide as high.
        """
        size, processor = (image.width, image.height), self.processor
        if size not in self._expansions:
            try:
                written = processor(text=[self.placeholder], images=[image.open()], add_special_tokens=False)
            except (ValueError, ZeroDivisionError, RuntimeError) as error:
                raise ImageError(
                    f"{name} an image of {image.width} × {image.height} pixels, which the model's processor refuses: "
                    f"{error}; give one of another size or shape"
                ) from error
            (ids,) = written["input_ids"]
            ids = tuple(map(int, ids))
            if not ids or ids[0] != self.placeholder_id:
                raise CapabilityError(
                    f"the processor {type(processor).__name__} writes an image as the ids {ids[:8]}…, which do not "
                    f"begin with its placeholder {self.placeholder_id}; use a model that docs/compatibility.md names "
                    "for images"
                )
            self.types_tokens = "mm_token_type_ids" in written
            self._expansions[size] = ids
        return self._expansions[size]

    def row_images(self, name: str, images: Sequence[ImageData]) -> RowImages | None:
        """Return the images of a prompt with the ids that each becomes; None where there are none.

        Raises:
            ImageError: an image that the processor refuses, or more images than the engine takes.
            CapabilityError: the engine's model takes no images.
        """
        if not images:
            return None
        if self.max_images is not None and len(images) > self.max_images:
            raise ImageError(
                f"{name} {len(images)} images, and the engine takes {self.max_images} in one prompt; start it with a "
                "larger --limit-mm-data-per-request, or give fewer"
            )
        expansions = tuple(self.expansion(f"{name} image {i}:", image) for i, image in enumerate(images))
        return RowImages(tuple(images), expansions, self.placeholder_id)

    def check_sent(self, name: str, ids: Sequence[int], *, remedy: str = GIVE_TEXT) -> None:
        """Refuse a short prompt of which SGLang would compute something else, without a word.

        It keeps the ids of Qwen's models, and gives an image of theirs its positions where `START` stands before it.
        The ids of other models it decodes, and lets the processor encode the text again: ids that were sampled may
        become others then, and states and log-probs would be theirs.

        Args:
            name: says whose ids they are, for errors.
            ids: the short prompt, with what is sent behind it.
            remedy: what to do instead, for errors.

        Raises:
            ImageError: an image without its start, or ids that would not stay.
        """
        processor = self.processor
        if type(processor).__name__ in KEEPS_IDS:
            self._check_starts(name, ids)
        else:
            self._check_kept(name, ids, remedy)

    def _check_starts(self, name: str, ids: Sequence[int]) -> None:
        tokenizer = self.processor.tokenizer
        start = tokenizer.convert_tokens_to_ids(START)
        if start in (None, tokenizer.unk_token_id):
            return  # a vocabulary of somebody's own
        for at, token_id in enumerate(ids):
            if token_id == self.placeholder_id and (at == 0 or ids[at - 1] != start):
                raise ImageError(
                    f"{name} the placeholder at token {at} has no {START!r} before it, without which SGLang gives the "
                    f"image the positions of text; write {START}{self.placeholder}<|vision_end|>, as the chat template "
                    "does"
                )

    def _check_kept(self, name: str, ids: Sequence[int], remedy: str) -> None:
        processor = self.processor
        tokenizer = processor.tokenizer
        if not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids):
            return  # the engine's check says what is wrong with them, and a tokenizer does not take them
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(again) != list(ids):
            pairs = zip(again, ids, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(again), len(ids)))
            raise ImageError(
                f"{name} SGLang encodes prompts with images of a {type(processor).__name__} again, and token {at}, "
                f"{tokenizer.decode(list(ids[at : at + 1]))!r}, would become another; {remedy}"
            )

    def tensors(self, images: Sequence[ImageData]) -> dict[str, torch.Tensor]:
        """Return what the model's forward pass reads of images, by Hugging Face's names, such as ``pixel_values``."""
        if not images:
            return {}
        opened = [image.open() for image in images]
        written = self.processor(text=[self.placeholder * len(opened)], images=[opened], return_tensors="pt")
        return {name: torch.as_tensor(value) for name, value in written.items() if name not in OF_TEXT}


# Of a reader that has no engine: an image is refused.
NO_IMAGES = ImageProcessor(None, "", takes_images=False)


def _made(given: Any, path: str, takes_images: bool, max_images: int | None) -> ImageProcessor:
    return ImageProcessor(given, path, takes_images=takes_images, max_images=max_images)


def _load(path: str) -> Any:
    # Here and not above: transformers takes longer to import than the rest of this package together.
    from transformers import AutoConfig, AutoProcessor

    try:
        size = SIZES.get(AutoConfig.from_pretrained(path).model_type)
        found = AutoProcessor.from_pretrained(path, **({} if size is None else {"size": size}))
    except (OSError, ValueError, ImportError) as error:
        raise CapabilityError(
            f"no processor can be read at {path!r} ({error}); pass tokenizer=, the model's Hugging Face processor"
        ) from error
    if not is_processor(found) or not hasattr(found, "image_token_id"):
        raise CapabilityError(
            f"{path!r} has a {type(found).__name__}, and no processor with an image token; pass tokenizer=, the "
            "model's Hugging Face processor"
        )
    return found


def _own_copy(processor: Any) -> Any:
    if not hasattr(processor, "image_token_id"):
        raise CapabilityError(
            f"a {type(processor).__name__} has no image token, which stands for an image in a prompt; use a model that "
            "docs/compatibility.md names for images"
        )
    own = copy.copy(processor)
    own.tokenizer, own.image_processor = copy.deepcopy((processor.tokenizer, processor.image_processor))
    return own


@dataclass(frozen=True, slots=True)
class RowImages:
    """The images of one prompt, and the ids that each is expanded to.

    Args:
        images: in the order of their placeholders.
        expansions: the ids of each image's rows.
        placeholder_id: stands for an image in a short prompt, and is the id of its rows.
    """

    images: tuple[ImageData, ...]
    expansions: tuple[tuple[int, ...], ...]
    placeholder_id: int

    def expand(self, ids: Sequence[int]) -> tuple[tuple[int, ...], Images]:
        """Return the expanded form of a short prompt, and where its images stand.

        Raises:
            ImageError: another number of placeholders than of images.
        """
        found = sum(token_id == self.placeholder_id for token_id in ids)
        if found != len(self.images):
            raise ImageError(
                f"{found} placeholders, of id {self.placeholder_id}, for {len(self.images)} images; give one image for "
                "each placeholder"
            )
        expanded: list[int] = []
        ranges: list[tuple[int, int]] = []
        for token_id in ids:
            if token_id != self.placeholder_id:
                expanded.append(token_id)
                continue
            rows = self.expansions[len(ranges)]
            ranges.append((len(expanded), len(expanded) + len(rows)))
            expanded += rows
        data = tuple(image.uri for image in self.images)
        placed = Images(sent_ids=tuple(ids), data=data, ranges=tuple(ranges), placeholder=self.placeholder_id)
        return tuple(expanded), placed

    def fold(self, ids: Sequence[int]) -> list[int] | None:
        """Return which ids of an expanded prompt are left in its short form; None where it is none of these images.

        The first images may be there alone: a chat's last turn had fewer of them.
        """
        kept, image, at = [], 0, 0
        while at < len(ids):
            kept.append(at)
            if ids[at] != self.placeholder_id:
                at += 1
                continue
            if image == len(self.images):
                return None
            rows = self.expansions[image]
            if tuple(ids[at : at + len(rows)]) != rows:
                return None
            at, image = at + len(rows), image + 1
        return kept

    def kept_in_short(self, name: str, ids: Sequence[int]) -> list[int]:
        """Return which ids of a prompt in either form are left in its short form.

        An image may be one placeholder and a break behind it. Ids that have the break are expanded already, although
        they have one placeholder for each image.

        Raises:
            ImageError: the ids have something else in the place of these images; ``name`` says whose they are.
        """
        kept = self.fold(ids)
        if kept is not None and sum(ids[i] == self.placeholder_id for i in kept) == len(self.images):
            return kept
        num_found = list(ids).count(self.placeholder_id)
        if num_found == len(self.images):
            return list(range(len(ids)))
        raise ImageError(
            f"{name} {num_found} placeholders, of id {self.placeholder_id}, for {len(self.images)} images, and not "
            f"what these are expanded to: {list(map(len, self.expansions))} rows; give one placeholder for each image, "
            "or the ids of an output with its images"
        )

    def short_of(self, name: str, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the short form of a prompt in either form; raises as `kept_in_short` does."""
        return tuple(ids[i] for i in self.kept_in_short(name, ids))

    def spread(self, values: Sequence[T], ids: Sequence[int], fill: T) -> list[T]:
        """Return values of the ids of a short prompt as values of the expanded one; ``fill`` stands at images' rows."""
        spread: list[T] = []
        image = 0
        for value, token_id in zip(values, ids, strict=True):
            if token_id == self.placeholder_id:
                spread += [fill] * len(self.expansions[image])
                image += 1
            else:
                spread.append(value)
        return spread
