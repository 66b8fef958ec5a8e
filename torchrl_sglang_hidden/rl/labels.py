"""`Labeller`: rows of a data set to what a policy says of them, in one call, with the reason where a row has no label.

Knows nothing of files. A label is the leaves that are recorded beside a row: pooled states, scores of heads, the text
that was generated and, if they are wanted, the states and ids of every token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from tensordict import TensorDictBase, lazy_stack

from torchrl_sglang_hidden.errors import (
    InputError,
    InputTypeError,
    MissingKeyError,
    RecordingError,
    SGLangHiddenError,
)
from torchrl_sglang_hidden.policy.prompts import InputMode
from torchrl_sglang_hidden.policy.rows import unbind_rows
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.columns import Key, Leaves, leaves_of
from torchrl_sglang_hidden.rl.encoder import (
    LabelledPrompt,
    check_answers_once,
    images_key_of,
    mode_of,
    to_input,
    with_labels,
)
from torchrl_sglang_hidden.rl.prompts import PromptWriter, value_of
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import FLOAT_DTYPES, HiddenSpec

__all__ = ["IndexedRow", "Label", "Labeller", "recorded_spec"]

POOLED, TOKENS, TEXT, SCORES = "hidden_states", "token_hidden_states", "text_generated", "head_scores"


class Label(NamedTuple):
    """What is recorded of a row, and why it has no label: an error's class and text, or None."""

    leaves: Leaves
    failure: str | None


class IndexedRow(NamedTuple):
    """A row of the data set, and its place there."""

    place: int
    row: TensorDictBase


def recorded_spec(policy: SGLangHiddenWrapper, *, tokens: bool, dtype: torch.dtype) -> HiddenSpec:
    """Return the states that are recorded: the policy's, with or without those of every token.

    Args:
        policy: says segments, pooling, layers and spans.
        tokens: whether the states of every token are recorded.
        dtype: of the states of tokens.

    Raises:
        InputTypeError: no policy, or arguments of another type.
        InputError: a policy without states, one that scores, or one with several responses per prompt.
    """
    if not isinstance(policy, SGLangHiddenWrapper):
        raise InputTypeError(f"policy={policy!r:.80} is a {type(policy).__name__}; expected a SGLangHiddenWrapper")
    if dtype not in FLOAT_DTYPES:
        raise InputTypeError(f"dtype={dtype!r:.80}: expected one of {FLOAT_DTYPES}")
    check_answers_once(policy)
    if policy.config.hidden is None:
        raise InputError("a policy with hidden=None returns no states; use policy.get_new_version(hidden=HiddenSpec())")
    return replace(policy.config.hidden, tokens=tokens, dtype=torch.float32)


class Labeller:
    """Asks a policy about rows.

    Args:
        policy: its segments, pooling, layers, heads and generation options are used; its keys are not.
        writer: writes the prompts.
        spec: what `recorded_spec` returned.
        dtype: of the states of tokens.

    Attributes:
        blank: the label of a row that has none: NaN, counts of 0, no tokens, no text.
        ragged: the leaves that have one value for each token, or for each row of a span without a pooling.
    """

    def __init__(
        self, policy: SGLangHiddenWrapper, writer: PromptWriter, spec: HiddenSpec, *, dtype: torch.dtype
    ) -> None:
        self._policy, self._writer, self._spec, self._dtype = policy, writer, spec, dtype
        self._version = policy.model.info.weight_version
        self._generates = policy.config.generate_kwargs.get("max_new_tokens") != 0
        self._askers: dict[InputMode, SGLangHiddenWrapper] = {}
        self.blank = self._make_blank()
        self.ragged = {key for key in self.blank if key[0] in (TOKENS, "prompt_ids", "response_ids")}
        self.ragged |= {(POOLED, part, name) for name in spec.unpooled for part in ("spans", "span_places")}
        # Of a token or a span's row each; a pooled score is one number.
        scores = {key: blank for key, blank in self.blank.items() if key[0] == SCORES}
        self.ragged |= {key for key, blank in scores.items() if isinstance(blank, torch.Tensor) and blank.ndim}

    def _make_blank(self) -> Leaves:
        spec, size = self._spec, self._policy.model.info.hidden_size
        shape = (len(spec.layers), size) if isinstance(spec.layers, tuple) else (size,)
        names: list[tuple[Key, Key]] = [((str(part),), (f"{part}_count",)) for part in spec.segments]
        names += [(("spans", name), ("span_counts", name)) for name in spec.spans if name not in spec.unpooled]
        blank: Leaves = {}
        for name in spec.unpooled:
            blank[POOLED, "spans", name] = torch.empty((0, *shape))
            blank[POOLED, "span_counts", name] = torch.tensor(0)
            blank[POOLED, "span_places", name] = torch.empty(0, dtype=torch.int64)
        if spec.pooling is not None:
            for vector, count in names:
                blank[(POOLED, *vector)] = torch.full(shape, math.nan)
                blank[(POOLED, *count)] = torch.tensor(0)
        if spec.tokens:
            blank |= {(TOKENS, str(part)): torch.empty((0, *shape), dtype=self._dtype) for part in spec.segments}
            blank |= {(name,): torch.empty(0, dtype=torch.int64) for name in ("prompt_ids", "response_ids")}
        if self._policy.config.heads is not None:
            blank |= _blank_scores(self._policy.config.heads)
        if self._generates:
            blank |= {(TEXT,): "", ("finish_reason",): "error"}
        return blank

    def label(self, rows: Sequence[IndexedRow]) -> list[Label]:
        """Return the labels of rows, in their order.

        Raises:
            MissingKeyError: a row lacks a key that the prompt reads.
            InputTypeError: a prompt function that returns no prompt, or prompts of several kinds.
            InputError: what concerns the whole call; or a token's state that the dtype does not hold.
            RecordingError: weights that were updated since the recording began.
            EngineError, AlignmentError: the engine failed.
        """
        failures: dict[int, str] = {}
        asked: list[tuple[IndexedRow, LabelledPrompt, TensorDictBase]] = []
        for one in rows:
            name = f"row {one.place}"
            try:
                prompt = self._writer.write(name, one.row)
                asked.append((one, LabelledPrompt(name, prompt), to_input([prompt], self._policy)[0]))
            except (MissingKeyError, InputTypeError):
                raise  # of the data or the prompt as such, and so of the rows after it
            except InputError as error:
                failures[one.place] = f"{type(error).__name__}: {_renamed(str(error), one.place)}"
        found: dict[int, Label] = {}
        if asked:
            outputs = self._ask([prompt for _, prompt, _ in asked], [sent for _, _, sent in asked])
            for (one, _, _), out in zip(asked, outputs, strict=True):
                found[one.place] = self._read(one.place, out)
        return [found.get(one.place) or Label(self.blank, failures[one.place]) for one in rows]

    def _ask(self, prompts: Sequence[LabelledPrompt], sent: list[TensorDictBase]) -> list[TensorDictBase]:
        asker = self._asker(mode_of(prompts))
        try:
            return list(unbind_rows(asker(lazy_stack(sent))))
        except SGLangHiddenError as error:
            told = with_labels(error, [one.label for one in prompts])
            raise told from error

    def _asker(self, mode: InputMode) -> SGLangHiddenWrapper:
        """Return the policy that reads a kind of prompt, and writes under the keys that `_read` knows."""
        if mode not in self._askers:
            self._askers[mode] = self._policy.get_new_version(
                input_mode=mode,
                input_key=None,
                images_key=images_key_of(self._policy),
                hidden=self._spec,
                logits=None,
                return_log_probs=False,
                pad_output=False,
                inplace=False,
                device=None,  # nothing is moved: TensorDict.to takes a third of the time of a row
                on_error="nan",
                text_key="text",
                tokens_key="tokens",
                hidden_states_key=POOLED,
                token_hidden_states_key=TOKENS,
                head_scores_key=SCORES,
            )
        return self._askers[mode]

    def _read(self, index: int, out: TensorDictBase) -> Label:
        """Return the label of a row from its output."""
        error = value_of(out.get("error"))
        if error:
            return Label(self.blank, _renamed(error, index))
        version = value_of(out.get("weight_version"))
        if version != self._version or bool(out.get("mixed_weights")):
            raise RecordingError(
                f"row {index}: weights of version {version!r}, and the policy connected to {self._version!r}; "
                "connect anew, and record into another directory while no trainer updates the weights"
            )
        leaves = leaves_of(out.select(*(key for key in (POOLED, TOKENS, SCORES) if out.get(key) is not None)))
        for key, value in leaves.items():
            if not isinstance(value, torch.Tensor):
                continue  # the version of a head
            # A span that may be empty is NaN where it is. Of scores the policy looks: they have no counts.
            is_empty = key[0] == SCORES or (
                key[:2] == (POOLED, "spans") and not int(leaves[POOLED, "span_counts", key[2]])
            )
            bad = int((~value.isfinite()).sum()) if value.is_floating_point() and not is_empty else 0
            if bad:
                return Label(
                    self.blank,
                    f"EngineError: row {index}: {bad} of {value.numel()} values of {'/'.join(key)!r} are NaN or "
                    "infinite; look at the server's log",
                )
            if key[0] == TOKENS:
                leaves[key] = _narrowed(index, key, value, self._dtype)
        if self._spec.tokens:
            leaves |= {(f"{part}_ids",): out.get(("tokens", part)) for part in ("prompt", "response")}
        if self._generates:
            leaves[TEXT,] = value_of(out.get(("text", "response")))
            leaves["finish_reason",] = value_of(out.get("finish_reason"))
        return Label({key: leaves[key] for key in self.blank}, None)


def _blank_scores(spec: HeadSpec) -> Leaves:
    """Return the scores of a row that has none."""
    pooled = {str(segment): spec.pooling is not None for segment in spec.segments}
    blank: Leaves = {}
    for head in spec.heads:
        for segment, is_pooled in pooled.items():
            blank[SCORES, segment, head] = torch.tensor(math.nan) if is_pooled else torch.empty(0)
        for span in spec.spans:
            blank[SCORES, "spans", span, head] = torch.empty(0) if span in spec.unpooled else torch.tensor(math.nan)
        blank[SCORES, "versions", head] = ""
    return blank | {(SCORES, "span_places", span): torch.empty(0, dtype=torch.int64) for span in spec.unpooled}


def _renamed(text: str, index: int) -> str:
    """Return an error's text with the row's place in the data set, in place of its place in the call."""
    return re.sub(r"\brow \d+", f"row {index}", text, count=1)


def _narrowed(index: int, key: Key, rows_ND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return states of tokens in the dtype that is recorded."""
    narrowed = rows_ND.to(dtype)
    if bool(narrowed.isinf().any()):
        raise InputError(
            f"row {index}, {'/'.join(key)!r}: a state of {float(rows_ND.abs().max()):.6g} is over "
            f"{torch.finfo(dtype).max:.6g}, the largest {dtype}; use dtype=torch.bfloat16 or torch.float32"
        )
    return narrowed
