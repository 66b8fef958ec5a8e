"""Following what was sampled: the ids of a chat's earlier turns, kept as they are in its next prompt.

A chat template may write an answer otherwise than it was sampled: without its thoughts or blanks, or cut into other
tokens. Knows nothing of engines.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tensordict import TensorDictBase, is_non_tensor
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.images.expansion import RowImages
from torchrl_sglang_hidden.policy.chat_template import Message, goes_on, with_more_text
from torchrl_sglang_hidden.policy.chat_text import Chat, decode_all
from torchrl_sglang_hidden.policy.token_rows import check_ids, strip_pads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_MODES", "DIGEST_KEY", "ChatMode", "SampledTurns", "TurnsPrompt", "digest_with_response"]

ChatMode = Literal["render", "append"]
CHAT_MODES: tuple[ChatMode, ...] = get_args(ChatMode)
# Where a policy says which messages its tokens.full stand for, so that its next call can tell a chat that goes on from
# another one.
DIGEST_KEY = "chat_digest"
WORD_LENGTH = 16
# Begins the word of an answer that the policy sampled.
SAMPLED = "sampled:"
# Begins the last word, that of the ids: other ids may come to stand for the same messages in a row, as scored ones do.
IDS = "ids:"


def digest_with_response(digest: str, messages: Sequence[Message], text: str, ids: Sequence[int]) -> str:
    """Return the digest of a chat and the response to it.

    Args:
        digest: of the chat.
        messages: the chat's; the response goes on from the last one where it `goes_on`.
        text: the response's.
        ids: of the prompt and the response, without pads.
    """
    words, response = digest.split(), {"role": "assistant", "content": text}
    if goes_on(messages):
        words, response = words[:-1], with_more_text(messages[-1], text)
    return " ".join([*words, SAMPLED + _word(response), _word_of_ids(ids)])


def _word(message: Message) -> str:
    """Return a word that is the same for equal messages."""
    said = {name: message[name] for name in message if name != "is_complete"}
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:WORD_LENGTH]


def _word_of_ids(ids: Sequence[int]) -> str:
    """Return a word that is the same for equal ids, and has their number."""
    return f"{IDS}{len(ids)}:{hashlib.sha256(array('q', ids).tobytes()).hexdigest()[:WORD_LENGTH]}"


@dataclass(frozen=True, slots=True)
class TurnsPrompt:
    """The ids of a chat that keeps what was sampled in its earlier turns.

    Args:
        ids: P ids.
        text: what they stand for.
        digest: of the chat's messages, with a mark at those that were sampled.
        sampled: which of the ids were sampled in an earlier turn; None where the chat is rendered anew.
        log_probs_P: float32 ``[P]``, the log-probs that they were sampled with, NaN where none is known; None as above.
        parted: why ids that are at hand are not used; empty where there are none, or they are of another chat.
        outdated: where the template would now write the kept beginning otherwise; empty where it would not.
    """

    ids: tuple[int, ...]
    text: str
    digest: str
    sampled: tuple[bool, ...] | None = None
    log_probs_P: torch.Tensor | None = None
    parted: str = ""
    outdated: str = ""


@dataclass(frozen=True, slots=True)
class _AtHand:
    """What the last turn left in a row, without its pads: N ids, and of each whether, and how, it was sampled."""

    ids: tuple[int, ...]
    sampled: tuple[bool, ...] | None
    log_probs_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SampledTurns:
    """Puts the ids of earlier turns into prompts. Keys are those of the policy's outputs.

    Args:
        tokenizer: the policy's.
        encode: turns a text into ids, without special tokens beside those of the text.
        chat: ``"render"`` keeps ids that stand for the beginning of what the template writes; ``"append"`` keeps them
            whatever it would write, and renders only the messages behind them.
        padding_value: the id that pads, where no mask says what is padding.
    """

    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[str], tuple[int, ...]]
    chat: ChatMode
    tokens_key: NestedKey
    masks_key: NestedKey | None
    log_probs_key: NestedKey | None
    padding_value: int

    def follow(
        self, row: TensorDictBase, chat: Chat, ids: tuple[int, ...], images: RowImages | None = None
    ) -> TurnsPrompt:
        """Return a chat's prompt with the ids of its earlier turns as they were sampled, as far as that can be.

        Args:
            row: what the last turn left is read from it.
            chat: the chat, as the template writes it.
            ids: the ids that the tokenizer makes of that, with one placeholder for each image.
            images: the chat's.

        Raises:
            InputTypeError: something that is no ids in the place of tokens.
            InputError: masks are missing that say what was sampled, or the tokenizer cannot go on behind ids.
            ChatTemplateError: the template does not write the message that the new ones follow.
        """
        digest = row.get(DIGEST_KEY)
        known = str(digest.data if is_non_tensor(digest) else digest or "").split()
        ids_word = known.pop() if known and known[-1].startswith(IDS) else ""
        now = [_word(message) for message in chat.messages]
        same = 0
        while same < min(len(known), len(now)) and known[same].removeprefix(SAMPLED) == now[same]:
            same += 1
        parted = _lost(known, chat.messages, same)
        at_hand = None
        if known and same == len(known):
            at_hand, parted = self._at_hand(row, ids_word, images)
        if at_hand is None:
            if self.chat == "append":
                unknown = torch.full((len(ids),), math.nan)
                return TurnsPrompt(ids, chat.text, " ".join(now), (False,) * len(ids), unknown, parted=parted)
            return self._prefer(
                row, chat, ids, " ".join(now), images=images, at_hand=None, known=bool(known), parted=parted
            )
        digest = " ".join([*known, *now[same:]])
        if self.chat == "append":
            num_asked = next(index for index, word in enumerate(known) if word.startswith(SAMPLED))
            return replace(
                self._append(at_hand, chat, same, digest), outdated=self._outdated(at_hand, chat.before(num_asked))
            )
        return self._prefer(row, chat, ids, digest, images=images, at_hand=at_hand, known=True, parted="")

    def _prefer(
        self,
        row: TensorDictBase,
        chat: Chat,
        ids: tuple[int, ...],
        digest: str,
        *,
        images: RowImages | None,
        at_hand: _AtHand | None,
        known: bool,
        parted: str,
    ) -> TurnsPrompt:
        """Return the first ids at hand that stand for the chat or its beginning, and those of the rest; or ``ids``."""
        text, found = self._decode(ids), self._read(row, "prompt")
        kept = None if images is None or found is None else images.fold(found)
        found = found if kept is None or found is None else tuple(found[i] for i in kept)
        # torchrl's IncrementalTokenizer leaves the turn before at "prompt"; without it, what stands there is older.
        candidates: list[tuple[tuple[int, ...], ...]] = [] if at_hand is None else [(at_hand.ids,)]
        if found is not None:
            candidates.append((found, strip_pads(found, self.padding_value)))
        for forms in candidates:
            for form in forms:
                # The ids of the whole begin with them: nothing is to be written anew.
                if ids[: len(form)] == form:
                    return TurnsPrompt(ids, chat.text, digest, parted=parted)
                begun = self._decode(form)
                whole = self._continued(form, text[len(begun) :]) if begun and text.startswith(begun) else None
                if whole is not None:
                    return TurnsPrompt(whole, chat.text, digest, parted=parted)
            # The ids of an earlier chat stay in a row when another one begins: nothing is lost with them.
            if not parted and (at_hand is not None or (not known and chat.is_answered_in(begun))):
                parted = _parting(begun, text)
        return TurnsPrompt(ids, chat.text, digest, parted=parted)

    def _append(self, at_hand: _AtHand, chat: Chat, num_known: int, digest: str) -> TurnsPrompt:
        """Return the ids at hand, which stand for the first messages, with the ids of the messages behind them."""
        if at_hand.sampled is None:
            raise InputError(
                f"chat='append' reads which tokens were sampled at {self.masks_key!r}, and it is not there beside "
                f"{self.tokens_key!r}; keep the masks in the row, or leave the tokens out too"
            )
        rest = ""
        if num_known < len(chat.messages) or not goes_on(chat.messages):
            rest = self._without_end(at_hand, chat.messages[num_known - 1], chat.text_after(num_known - 1))
        ids = self._continued(at_hand.ids, rest)
        if ids is None:
            raise InputError(f"chat='append': {_written_otherwise(rest)}; use chat='render'")
        more = len(ids) - len(at_hand.ids)
        log_probs_N = at_hand.log_probs_N
        if log_probs_N is None:
            log_probs_N = torch.full((len(at_hand.ids),), math.nan)
        return TurnsPrompt(
            ids,
            decode_all(self.tokenizer, ids),
            digest,
            at_hand.sampled + (False,) * more,
            torch.nn.functional.pad(log_probs_N, (0, more), value=math.nan),
        )

    def _outdated(self, at_hand: _AtHand, beginning: str) -> str:
        """Say where ids at hand and what the template now writes for the chat's beginning part; "" if they do not.

        They do where its variables are others than in the first turn: tools that came later, or a date.
        """
        begun, beginning = self._decode(at_hand.ids), self._decode(self.encode(beginning))
        return "" if begun.startswith(beginning) else _parting(begun, beginning)

    def _without_end(self, at_hand: _AtHand, message: Message, rest: str) -> str:
        """Return the text behind a response without what was sampled of it: the token that ended the response."""
        sampled = list(at_hand.sampled or ())
        start = len(sampled) - next((i for i, was in enumerate(reversed(sampled)) if not was), len(sampled))
        response_ids, content = at_hand.ids[start:], message.get("content")
        said, content = decode_all(self.tokenizer, response_ids), content if isinstance(content, str) else ""
        # A message that was gone on from begins with what was not sampled.
        length = next(n for n in range(min(len(said), len(content)), -1, -1) if content.endswith(said[:n]))
        end = said[length:]
        if content and not length:  # special tokens inside the answer, which its text leaves out
            last = response_ids[-1:]
            end = decode_all(self.tokenizer, last) if set(last) <= set(self.tokenizer.all_special_ids) else ""
        if end and rest.lstrip().startswith(end):
            return rest.lstrip()[len(end) :]
        # A stop string may go on into the next message's header.
        return rest[next(n for n in range(min(len(end), len(rest)), -1, -1) if end.endswith(rest[:n])) :]

    def _continued(self, ids: tuple[int, ...], rest: str) -> tuple[int, ...] | None:
        """Return the ids with those of a text behind them; None if the tokenizer cannot write it behind other text."""
        expected = decode_all(self.tokenizer, ids) + rest
        found = ids + self.encode(rest) if rest else ids
        if decode_all(self.tokenizer, found) == expected:
            return found
        # A tokenizer that writes a blank before every text, as SentencePiece does: not behind another token.
        anchor = self.tokenizer.eos_token or ""
        before, both = self.encode(anchor), self.encode(anchor + rest)
        found = ids + both[len(before) :]
        return found if both[: len(before)] == before and decode_all(self.tokenizer, found) == expected else None

    def _at_hand(self, row: TensorDictBase, ids_word: str, images: RowImages | None) -> tuple[_AtHand | None, str]:
        """Read what the last turn left in a row; None where its tokens are not there, and why they are not."""
        ids = self._read(row, "full")
        if ids is None:
            return None, f"the chat is the same, and the tokens of its turns are not in the row, at {self.tokens_key!r}"
        others = (
            f"the chat is the same, and the ids at {self.tokens_key!r} are not those of its last turn: another policy, "
            "or a call that scores, wrote in the row"
        )
        masks = [self._beside(row, self.masks_key, f"all_{name}_mask", len(ids)) for name in ("attention", "assistant")]
        # Scoring writes no response: its log-probs are not those that the tokens were sampled with.
        scored = self.log_probs_key is None or _get(row, self.log_probs_key, "response", "LogProbs") is None
        log_probs = None if scored else self._beside(row, self.log_probs_key, "full", len(ids))
        if masks[0] is None:
            unpadded = self._unpadded(ids, ids_word)
            return (None, others) if unpadded is None else _short(_AtHand(unpadded, None, None), images)
        real, sampled = masks[0].bool(), masks[1]
        found = _AtHand(
            tuple(torch.tensor(ids)[real].tolist()),
            None if sampled is None else tuple(sampled.bool()[real].tolist()),
            None if log_probs is None else log_probs.float()[real],
        )
        return _short(found, images) if _word_of_ids(found.ids) == ids_word else (None, others)

    def _unpadded(self, ids: tuple[int, ...], ids_word: str) -> tuple[int, ...] | None:
        """Return the ids of a word out of those with pads around them, the last of which may be the response's own."""
        real = [index for index, token_id in enumerate(ids) if token_id != self.padding_value] or [0]
        length = int(ids_word.split(":")[1]) if ids_word else 0
        windows = (ids[at : at + length] for at in range(max(real[-1] + 1 - length, 0), real[0] + 1))
        return next((window for window in windows if _word_of_ids(window) == ids_word), None)

    @staticmethod
    def _beside(row: TensorDictBase, container: NestedKey | None, name: str, length: int) -> torch.Tensor | None:
        """Return what a row says of each of its tokens; None where it says nothing."""
        found = None if container is None else _get(row, container, name, "Masks or a LogProbs")
        return found.detach().cpu() if isinstance(found, torch.Tensor) and found.shape == (length,) else None

    def _read(self, row: TensorDictBase, segment: str) -> tuple[int, ...] | None:
        found = _get(row, self.tokens_key, segment, "Tokens")
        if found is None:
            return None
        check_ids(f"{unravel_key((self.tokens_key, segment))!r}:", found)
        return tuple(found.tolist())

    def _decode(self, ids: tuple[int, ...]) -> str:
        """Return the text of ids; an empty one for unknown ids, which are of another chat."""
        if not ids or min(ids) < 0 or max(ids) >= len(self.tokenizer):
            return ""
        return decode_all(self.tokenizer, ids)


def _short(found: _AtHand, images: RowImages | None) -> tuple[_AtHand | None, str]:
    """Return what is at hand with one placeholder for each image; None where it cannot be, and why."""
    if images is None:
        return found, ""
    kept = images.fold(found.ids)
    if kept is None:
        return None, (
            f"a response has the id {images.placeholder_id}, which stands for an image and was sampled without one; "
            "keep it from being sampled, with constraints=DisallowedTokens(…)"
        )
    return _AtHand(
        tuple(found.ids[i] for i in kept),
        None if found.sampled is None else tuple(found.sampled[i] for i in kept),
        None if found.log_probs_N is None else found.log_probs_N[kept],
    ), ""


def _get(row: TensorDictBase, container: NestedKey, name: str, kind: str) -> Any:
    """Return what one of the last turn's outputs has under a name; None where it is not there."""
    key = unravel_key((container, name))
    try:
        return row.get(key)
    except ValueError as error:  # a tensor where the key's path has a container
        raise InputTypeError(
            f"{key!r} cannot be read: {error}; expected a {kind} there, for prefer_tokens or chat='append'"
        ) from error


def _written_otherwise(rest: str) -> str:
    """Say that a tokenizer cannot go on behind ids."""
    return (
        f"this tokenizer writes {rest[:40]!r} otherwise behind other text, so that it cannot go on behind the ids of "
        "the turns before"
    )


def _parting(begun: str, text: str) -> str:
    """Say where the text of ids and the template's text part, or else that the tokenizer cannot go on behind them."""
    if begun and text.startswith(begun):
        return _written_otherwise(text[len(begun) :])
    same = next((i for i, (a, b) in enumerate(zip(begun, text, strict=False)) if a != b), min(len(begun), len(text)))
    return (
        f"behind {text[max(same - 40, 0) : same]!r} they go on with {begun[same : same + 40]!r}, and the chat template "
        f"with {text[same : same + 40]!r}"
    )


def _lost(known: Sequence[str], messages: Sequence[Message], same: int) -> str:
    """Say which sampled answer a chat no longer has as it was sampled; nothing for a chat that is another one."""
    if same < len(known) and any(word.startswith(SAMPLED) for word in known[:same]):
        return f"the chat goes on otherwise at message {same} than it did"
    changed = same < min(len(known), len(messages)) and known[same].startswith(SAMPLED)
    if changed and messages[same].get("role") == "assistant":
        return f"message {same} is not the answer that was sampled"
    return ""
