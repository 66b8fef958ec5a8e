"""Reading candidates: strings or ids to the ids that follow a prompt's.

Knows nothing of requests. A string is tokenized together with the end of its prompt, so that its ids are those that the
prompt and the string have as one text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.rows import Row
from torchrl_sglang_hidden.policy.tokenizer import OwnTokenizer
from torchrl_sglang_hidden.sglang_api.prompt_text import check_unicode

__all__ = [
    "Candidate",
    "CandidateIds",
    "Candidates",
    "Ids",
    "is_candidate",
    "read_candidates",
    "warn_of_equal_beginnings",
]

Candidate: TypeAlias = str | Sequence[int] | torch.Tensor
Candidates: TypeAlias = Sequence[Candidate] | Sequence[Sequence[Candidate]]
Ids: TypeAlias = tuple[int, ...]

# How many of a prompt's last tokens a candidate is tokenized with: the most that the tokenizer writes as they are. What
# comes before has no part in how a word is cut. All of a prompt of that length.
WHOLE = 64
ENDS = (32, 16, 8, 4, 3, 2, 1)
# A text behind it has no blank before it, which some tokenizers write before every text.
LINE = "\n"


@dataclass(frozen=True, slots=True)
class CandidateIds:
    """A candidate that was read.

    Args:
        ids: its token ids.
        given: what the user passed, for errors and words.
    """

    ids: Ids
    given: Candidate

    def num_words(self, name: str, own: OwnTokenizer) -> int:
        """Return how many words it has, separated by blanks, without special tokens: the count of TWOSOME.

        Raises:
            InputError: it has none.
        """
        text = self.given if isinstance(self.given, str) else own.decode(self.ids)
        for special in own.plain.all_special_tokens:
            text = text.replace(special, " ")
        num_words = len(text.split())
        if not num_words:
            raise InputError(f"{name}, {self.given!r:.80}: 0 words, by which normalize='word' divides; use 'token'")
        return num_words


def read_candidates(candidates: Any, prompts: Sequence[Row], own: OwnTokenizer) -> list[list[CandidateIds]]:
    """Return every row's candidates.

    Args:
        candidates: A for all rows, or as many lists as rows.
        prompts: the R rows.
        own: the policy's copies of its tokenizer.

    Raises:
        InputTypeError: something that is neither a string nor ids.
        InputError: no candidates, another number of lists than of rows, or a candidate without ids.
    """
    if isinstance(candidates, (str, Mapping)) or not isinstance(candidates, Sequence):
        raise InputTypeError(
            f"candidates: a {type(candidates).__name__}; expected a list of strings or of id lists, for all rows, or "
            "one for each"
        )
    shared = all(is_candidate(candidate) for candidate in candidates)
    if not shared and len(candidates) != len(prompts):
        raise InputError(
            f"{len(candidates)} lists of candidates for a batch of {len(prompts)} rows; give one for each row, or one "
            "list for all"
        )
    apart: list[str] = []
    read = []
    for row, prompt in enumerate(prompts):
        of_row: Any = candidates if shared else candidates[row]
        read.append(_read_row("" if shared else f"row {row}, ", of_row, _After(prompt, row, own, apart)))
    if apart:
        others = f" So are {len(apart) - 1} others." if len(apart) > 1 else ""
        warnings.warn(apart[0] + others, stacklevel=4)
    return read


def is_candidate(value: Any) -> bool:
    """Return whether a value is one candidate, a string or ids, and not the list of those of a row."""
    if isinstance(value, str):
        return True
    if isinstance(value, torch.Tensor):
        return value.ndim == 1
    return isinstance(value, Sequence) and all(isinstance(token_id, int) for token_id in value)


def _read_row(name: str, candidates: Any, after: _After) -> list[CandidateIds]:
    if isinstance(candidates, (str, torch.Tensor)) or not isinstance(candidates, Sequence):
        raise InputTypeError(f"{name}candidates: {candidates!r:.80}; expected a list of strings or of id lists")
    if not candidates:
        raise InputError(f"{name}candidates: an empty list; give at least 1")
    for column, candidate in enumerate(candidates):
        if isinstance(candidate, str):
            check_unicode(f"{name}candidate {column}, {candidate!r:.80},", candidate)
    texts = [candidate for candidate in candidates if isinstance(candidate, str)]
    of_text = dict(zip(texts, after.encode(texts), strict=True))
    return [
        CandidateIds(_check(f"{name}candidate {column}", candidate, of_text), candidate)
        for column, candidate in enumerate(candidates)
    ]


def _check(name: str, candidate: Any, of_text: Mapping[str, Ids]) -> Ids:
    ids: Any
    # Bytes are a sequence of integers too.
    if isinstance(candidate, bytes):
        raise InputTypeError(f"{name}, {candidate!r:.80}: bytes; expected a string: decode them")
    if isinstance(candidate, str):
        ids = of_text[candidate]
    else:
        ids = candidate.tolist() if isinstance(candidate, torch.Tensor) else candidate
    if not isinstance(ids, Sequence) or any(type(token_id) is not int for token_id in ids):
        raise InputTypeError(f"{name}, {candidate!r:.80}: expected a string, or token ids, which are integers")
    if not ids:
        raise InputError(f"{name}, {candidate!r:.80}: 0 tokens, and nothing to score; give at least 1")
    return tuple(ids)


# --- the border between a prompt and a candidate ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _After:
    """Tokenizes what follows a prompt.

    Args:
        prompt: the prompt.
        row: its index, for warnings.
        own: the policy's copies of its tokenizer.
        apart: what is to be said of texts that were tokenized by themselves; appended to.
    """

    prompt: Row
    row: int
    own: OwnTokenizer
    apart: list[str]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text as it stands behind the prompt."""
        if not texts:
            return []
        end, end_text = _end_of(self.prompt, self.own)
        together = _encode(self.own, [end_text + text for text in texts])
        return [
            whole[len(end) :] if end and whole[: len(end)] == end else self._by_itself(text)
            for text, whole in zip(texts, together, strict=True)
        ]

    def _by_itself(self, text: str) -> Ids:
        ids = _by_itself(self.prompt, text, self.own)
        self.apart.append(
            f"row {self.row}, candidate {text!r:.60}: the tokenizer does not write it behind the prompt's own tokens, "
            f"which end in {_decode(self.prompt.sent_ids[-4:], self.own)!r}, so it is scored as the tokens "
            f"{list(ids)!r:.60} that it has by itself; let the prompt end before a blank and begin the candidate with "
            "it, or give ids."
        )
        return ids


def _end_of(prompt: Row, own: OwnTokenizer) -> tuple[Ids, str]:
    """Return a text that ends as a prompt does, and its ids, which end in the prompt's own; empty if there is none.

    In tokens mode, and after a sampled turn, a prompt may have ids that the tokenizer does not give for any text; its
    last few may be such that it does.
    """
    ids, text = prompt.sent_ids, prompt.prompt_text
    if not _known(ids, own):
        return (), ""
    if len(ids) <= WHOLE and text:
        (own_ids,) = _encode(own, [text])
        # A BOS that the tokenizer added is not of the text.
        if own_ids and ids[-len(own_ids) :] == own_ids:
            return own_ids, text
    (line,) = _encode(own, [LINE])
    for length in ENDS:
        end = ids[-length:]
        end_text = own.decode(end)
        alone, after_line = _encode(own, [end_text, LINE + end_text])
        if alone == end:
            return alone, end_text
        if after_line == line + end:
            return after_line, LINE + end_text
    return (), ""


def _by_itself(prompt: Row, text: str, own: OwnTokenizer) -> Ids:
    """Return the ids of a text alone, without the blank that some tokenizers write before every text.

    Of both forms the one is taken that reads as the text does behind the prompt.
    """
    line, alone, after_line = _encode(own, [LINE, text, LINE + text])
    end = prompt.sent_ids[-ENDS[0] :]
    if after_line[: len(line)] == line and _known(end, own):
        expected = own.decode(end) + text
        bare = after_line[len(line) :]
        if own.decode([*end, *alone]) != expected and own.decode([*end, *bare]) == expected:
            return bare
    return alone


def _known(ids: Ids, own: OwnTokenizer) -> bool:
    """Whether the tokenizer has all the ids; the engine's check names one that it has not."""
    return bool(ids) and min(ids) >= 0 and max(ids) < len(own.plain)


def _decode(ids: Ids, own: OwnTokenizer) -> str:
    return own.decode(ids) if _known(ids, own) else ""


def _encode(own: OwnTokenizer, texts: Sequence[str]) -> list[Ids]:
    return [tuple(ids) for ids in own.plain(list(texts), add_special_tokens=False)["input_ids"]]


def warn_of_equal_beginnings(
    rows: Sequence[Sequence[CandidateIds]], wanted: Sequence[tuple[int, int]], own: OwnTokenizer
) -> None:
    """Warn if different candidates of a row begin with the same token, by which alone ``reduction="first"`` judges.

    Args:
        rows: the candidates of every row.
        wanted: row and column of those that are scored.
        own: the policy's copies of its tokenizer.
    """
    first_with: dict[tuple[int, int], int] = {}
    for row, column in wanted:
        ids = rows[row][column].ids
        other = first_with.setdefault((row, ids[0]), column)
        if rows[row][other].ids != ids:
            warnings.warn(
                f"row {row}: the candidates {other} and {column}, {rows[row][other].given!r:.40} and "
                f"{rows[row][column].given!r:.40}, begin with the same token {ids[0]}, so reduction='first' gives both "
                "the same log-prob; use 'sum' or 'mean', or candidates that differ in their first token",
                stacklevel=4,
            )
            return
