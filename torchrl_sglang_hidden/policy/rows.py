"""`Row`, one prompt row as token ids: what reading a TensorDict comes to, and what requests are made of.

Knows nothing of how a row is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torchrl.data.llm import History

from torchrl_sglang_hidden.errors import ImageError, SGLangHiddenError
from torchrl_sglang_hidden.images.expansion import RowImages
from torchrl_sglang_hidden.policy.chat_text import Chat
from torchrl_sglang_hidden.policy.sampled_turns import TurnsPrompt
from torchrl_sglang_hidden.records import Images
from torchrl_sglang_hidden.spec.constraints import ActionMask
from torchrl_sglang_hidden.spec.spans import ResolvedSpan

__all__ = ["Row", "expand_row", "unbind_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt row: a prompt, or with ``generate=False`` a sequence to score, as token ids.

    Args:
        prompt_ids: P ids, an image's rows among them.
        prompt_text: the text that the ids stand for, with one placeholder for each image.
        history: the chat that was rendered to the text, ``[turns]``, in history mode.
        chat: its messages, and the template that rendered them.
        turns: what is known of the chat's earlier turns, where the policy follows them.
        assistant_mask: for scoring, which of the ids the assistant wrote; None where nothing says so.
        placement: in tokens mode, the places of the ids tensor: True at an id, False at a pad; None where nothing says
            so, in another mode, or of ids with one placeholder for each image, which have other places once expanded.
        short_placement: the same of such ids alone: what a mask of the row's is over.
        wants_states: what the row says at ``"return_hidden_states"``; None where it says nothing.
        spans: the spans by name, spans of the prompt as positions; empty where the row wants no states.
        head_spans: the same of scores.
        action_mask: the tokens that the row allows, or None.
        images: its images, or None.
        placed: where they stand in ``prompt_ids``, and what the engine gets; None as above.
        error: what is wrong with this row alone, so that it is not sent; None of every other row.
    """

    prompt_ids: tuple[int, ...]
    prompt_text: str
    history: History | None = None
    chat: Chat | None = None
    turns: TurnsPrompt | None = None
    assistant_mask: tuple[bool, ...] | None = None
    placement: tuple[bool, ...] | None = None
    short_placement: tuple[bool, ...] | None = None
    wants_states: bool | None = None
    spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)
    head_spans: Mapping[str, ResolvedSpan] = field(default_factory=dict)
    action_mask: ActionMask | None = None
    images: RowImages | None = None
    placed: Images | None = None
    error: SGLangHiddenError | None = None

    @property
    def sent_ids(self) -> tuple[int, ...]:
        """The ids that the text is cut into, with one placeholder for each image."""
        return self.prompt_ids if self.placed is None else self.placed.sent_ids


def expand_row(name: str, row: Row) -> Row:
    """Return a row whose placeholders, one for each image, are expanded to the rows of its images.

    Raises:
        ImageError: another number of placeholders than of images; ``name`` says whose.
    """
    if row.images is None:
        return row
    short, turns, mask = row.prompt_ids, row.turns, row.assistant_mask
    try:
        ids, placed = row.images.expand(short)
    except ImageError as error:
        raise type(error)(f"{name} {error}") from error
    if turns is not None and turns.sampled is not None and turns.log_probs_P is not None:
        log_probs = row.images.spread(turns.log_probs_P.tolist(), short, math.nan)
        sampled = tuple(row.images.spread(turns.sampled, short, False))
        turns = replace(turns, ids=ids, sampled=sampled, log_probs_P=torch.tensor(log_probs))
    mask = None if mask is None else tuple(row.images.spread(mask, short, False))
    return replace(row, prompt_ids=ids, turns=turns, assistant_mask=mask, placed=placed)


def unbind_rows(tensordict: TensorDictBase) -> Iterator[TensorDictBase]:
    """Yield the rows in row-major order, without a reshape, which ragged and lazy leaves do not have."""
    if tensordict.ndim == 0:
        yield tensordict
    elif isinstance(tensordict, LazyStackedTensorDict) and not tensordict.tensordicts:
        return
    else:
        for part in tensordict.unbind(0):
            yield from unbind_rows(part)
