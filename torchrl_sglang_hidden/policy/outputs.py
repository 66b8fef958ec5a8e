"""What a policy writes and where: this package's TensorClasses, and the keys of all outputs.

A new output needs a key in `KeyConfig`, a place in `OutputKeys`, and its leaves in `list_out_keys`. Knows nothing of
how the outputs are filled, see ``assemble.py``, nor how they are written, see ``writing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# A rollout on disk holds TorchRL's TensorClasses too, and is read once a class of this package was imported.
import torchrl.modules.llm.policies  # noqa: F401
from tensordict import (
    TensorClass,
    TensorDict,
)
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.spec.head_scores import HeadSpec
from torchrl_sglang_hidden.spec.hidden import HiddenSpec, Segment
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = [
    "HeadScores",
    "HiddenStates",
    "KeyConfig",
    "Logits",
    "OutputKeys",
    "RoutedExperts",
    "Sampling",
    "TokenHiddenStates",
    "list_out_keys",
]


class HiddenStates(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """Pooled hidden states, aligned with the tokens of the same row.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``.
        response (torch.Tensor | None): the states that produced the response tokens, positions ``P-1 … P+T-2``.
        full (torch.Tensor | None): every position once: ``0 … P+T-2``; of a scored sequence ``0 … N-1``.
        prompt_count (torch.Tensor | None): rows of the segment, P. Every one was pooled, except that ``"last"`` took
            the last one.
        response_count (torch.Tensor | None): rows of the segment, T.
        full_count (torch.Tensor | None): rows of the segment, P+T-1, or N of a scored sequence.
        spans (TensorDict | None): the spans by their names, read as ``("hidden_states", "spans", name)``.
        span_counts (TensorDict | None): rows of each span, by the same names.
        span_places (TensorDict | None): which rows of the prompt or of the response a span without a pooling has.

    Shapes:
        - prompt, response, full, and each span: ``[*batch, D]``, or ``[*batch, K, D]`` where `HiddenSpec.layers` is a
          tuple; float32 unless `HiddenSpec.dtype` says otherwise. None for a segment that was not asked for.
        - counts: int64 ``[*batch]``.
        - a span without a pooling: ``[*batch, S, D]`` or ``[*batch, S, K, D]``, and its places int64 ``[*batch, S]``,
          ragged: S is its count. Row p of a prompt is position p of its unpadded tokens, and row t of a response that
          which produced response token t. A padded output has them padded on the right, with zeros and places of -1.

    A row that said it wants no states (``"return_hidden_states"``) has NaN, and a count of 0; so has, under
    ``on_error="nan"``, a row whose states or span are not there, and always a span that may be empty and is: `At`,
    `Each` and `Window`. Of a span without a pooling, no rows; padded, NaN where the states are missing.

    The convention of ``response`` is that of Hugging Face ``generate(output_hidden_states=True)``, last position.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None
    prompt_count: torch.Tensor | None = None
    response_count: torch.Tensor | None = None
    full_count: torch.Tensor | None = None
    spans: TensorDict | None = None
    span_counts: TensorDict | None = None
    span_places: TensorDict | None = None


class TokenHiddenStates(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The hidden state of every token of a row, unpooled.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``: one row for each token of ``tokens.prompt``.
        response (torch.Tensor | None): row t produced response token t, positions ``P-1 … P+T-2``: one row for each
            token of ``tokens.response``, and for its log-prob.
        full (torch.Tensor | None): every position once, ``0 … P+T-2``: one row for each token of ``tokens.full`` but
            the last, which was never read; of a scored sequence all N.

    Shapes:
        - ``[*batch, rows, D]``, or ``[*batch, rows, K, D]`` where `HiddenSpec.layers` is a tuple; in
          `HiddenSpec.dtype`. Ragged, unless the output is padded: then the prompt's rows on the left, the response's on
          the right, and the rows of ``full`` as in ``tokens.full``, with zeros beside them. The masks say which rows
          are real; in ``full`` the row of the last token is not. None for a segment that was not asked for.

    A row that said it wants no states (``"return_hidden_states"``), or under ``on_error="nan"`` has none, has no rows;
    padded, it has NaN everywhere.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None


class Logits(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The logits that tokens were drawn from: each row stands at its token, as log-probs do.

    Args:
        prompt (torch.Tensor | None): row p is what the tokens before p say of prompt token p. Nothing is before token
            0: its row is zeros, as TorchRL's own shifted logits are.
        response (torch.Tensor | None): row t is what response token t was drawn from.
        full (torch.Tensor | None): both, one row for each token of ``tokens.full``; of a scored sequence all N.
        token_ids (torch.Tensor | None): with `LogitsSpec.top_k`, the token ids of the response's columns, which differ
            from row to row. None otherwise, where the columns are the ids that were asked for, or all.
        prompt_token_ids (torch.Tensor | None): the same for the prompt's columns; ``0 … k-1`` in the row of token 0.
        full_token_ids (torch.Tensor | None): the same for the columns of ``full``.

    Shapes:
        - prompt, response, full: ``[*batch, rows, C]`` in `LogitsSpec.dtype`; C is V, k, or the number of
          `LogitsSpec.token_ids`. None for a segment that was not asked for.
        - token_ids, prompt_token_ids, full_token_ids: int64 ``[*batch, rows, k]``.

    Ragged, unless the output is padded: then as the tokens are, with zeros, and 0 for ids.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    prompt_token_ids: torch.Tensor | None = None
    full_token_ids: torch.Tensor | None = None


class HeadScores(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The scores that heads gave, by the heads' names: read as ``("head_scores", "response", name)``.

    Args:
        prompt (TensorDict | None): prompt positions ``0 … P-1``: one score for each token of ``tokens.prompt``.
        response (TensorDict | None): score t is of the state that produced response token t: one score for each token
            of ``tokens.response``, and for its log-prob.
        full (TensorDict | None): every position once, ``0 … P+T-2``: one score for each token of ``tokens.full`` but
            the last, which was never read; of a scored sequence all N.
        versions (TensorDict): the version of each head that scored the row, a string; empty where none did.
        spans (TensorDict | None): those of ``HeadSpec(spans=…)``: ``("head_scores", "spans", name_of_span, name)``.
        span_places (TensorDict | None): of the spans without a pooling, by the spans' names, which rows they have: see
            `HiddenStates`.

    Shapes:
        - float32 ``[*batch, rows]``, padded as the tokens are, with NaN. None for a segment that was not asked for.
        - with ``HeadSpec(pooling=…)`` float32 ``[*batch]``, and a span too; ``[*batch, S]`` of a span without a
          pooling, padded on the right with NaN, and its places, int64, with -1.

    A row that under ``on_error="nan"`` has no scores has none; padded or pooled, it has NaN.
    """

    prompt: TensorDict | None = None
    response: TensorDict | None = None
    full: TensorDict | None = None
    versions: TensorDict | None = None
    spans: TensorDict | None = None
    span_places: TensorDict | None = None


class Sampling(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """What is recorded of each sampled token beside its log-prob; None for what was not asked for.

    Args:
        entropy (torch.Tensor | None): with the option ``return_entropy``, the entropy in nats of the distribution whose
            log-prob stands in ``log_probs``: after penalties, grammar, constraints and temperature, before top-k, top-p
            and min-p. At temperature 0 it is of temperature 1, as the log-probs are.
        log_probs (torch.Tensor | None): with the option ``return_sampling_mask``, the log-prob of the token among those
            that top-k, top-p and min-p left: the behaviour policy's.
        token_ids (torch.Tensor | None): these tokens, the best first.
        token_log_probs (torch.Tensor | None): the log-probs of all of them.

    Shapes:
        - entropy, log_probs: float32 ``[*batch, T]``, padded with NaN.
        - token_ids: int64 ``[*batch, T, S]``, padded with -1. S is the most tokens that any token of the call was drawn
          from.
        - token_log_probs: float32 ``[*batch, T, S]``, padded with ``-inf``.
    """

    entropy: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    token_log_probs: torch.Tensor | None = None


class RoutedExperts(TensorClass["nocast"]):  # type: ignore[misc,name-defined]
    """The experts that each position was routed to, with the option ``return_routed_experts``, for a replay.

    Args:
        prompt (torch.Tensor | None): prompt positions ``0 … P-1``.
        response (torch.Tensor | None): row t produced response token t, positions ``P-1 … P+T-2``; None where nothing
            was generated.
        full (torch.Tensor | None): every position once, ``0 … P+T-2``: one row for each token of ``tokens.full`` but
            the last, which was never read.

    Shapes:
        - int32 ``[*batch, rows, L, k]``, k experts in each of L layers, in SGLang's order; 0 in layers without
          experts. Padded as `TokenHiddenStates` is, with -1.
    """

    prompt: torch.Tensor | None = None
    response: torch.Tensor | None = None
    full: torch.Tensor | None = None


# --- the keys --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """Where the outputs are written; None leaves an output out.

    Args:
        history_key: TorchRL's ``ChatHistory``, in history mode.
        text_key: TorchRL's ``Text``.
        tokens_key: TorchRL's ``Tokens``.
        masks_key: TorchRL's ``Masks``. Scoring in tokens mode reads the masks of the sequences here too.
        log_probs_key: TorchRL's ``LogProbs``, unless ``return_log_probs`` is False.
        hidden_states_key: `HiddenStates`, unless ``hidden`` is None or does not pool.
        token_hidden_states_key: `TokenHiddenStates`, with ``HiddenSpec(tokens=True)``.
        logits_key: `Logits`, where ``logits`` is set.
        head_scores_key: `HeadScores`, where ``heads`` is set.
        sampling_key: `Sampling`, with the options ``return_entropy`` and ``return_sampling_mask``.
        routed_experts_key: `RoutedExperts`, with the option ``return_routed_experts``.
        prompt_images_key: of a model that takes images, each row's: a tuple of data URIs, in the order of the prompt,
            which may be the input at ``images_key`` of another call.
        pixel_values_key: a TensorDict of what Hugging Face's model reads beside ``tokens.full``, by its names, such as
            ``pixel_values`` and ``image_grid_thw``; empty for a row without images. The samples of one prompt share the
            memory of what is of its images.
    """

    history_key: NestedKey | None = "history"
    text_key: NestedKey | None = "text"
    tokens_key: NestedKey | None = "tokens"
    masks_key: NestedKey | None = "masks"
    log_probs_key: NestedKey | None = "log_probs"
    hidden_states_key: NestedKey | None = "hidden_states"
    token_hidden_states_key: NestedKey | None = "token_hidden_states"
    logits_key: NestedKey | None = "logits"
    head_scores_key: NestedKey | None = "head_scores"
    sampling_key: NestedKey | None = "sampling"
    routed_experts_key: NestedKey | None = "routed_experts"
    prompt_images_key: NestedKey | None = "prompt_images"
    pixel_values_key: NestedKey | None = None


@dataclass(frozen=True, slots=True)
class OutputKeys:
    """Where one call writes each output; None leaves it out."""

    text: NestedKey | None
    tokens: NestedKey | None
    masks: NestedKey | None
    log_probs: NestedKey | None
    history: NestedKey | None
    hidden_states: NestedKey | None
    token_hidden_states: NestedKey | None
    weight_version: NestedKey | None
    finish_reason: NestedKey | None
    mixed_weights: NestedKey | None
    logits: NestedKey | None = None
    chat_digest: NestedKey | None = None
    sampling: NestedKey | None = None
    routed_experts: NestedKey | None = None
    error: NestedKey | None = None
    weight_versions: NestedKey | None = None
    images: NestedKey | None = None
    pixel_values: NestedKey | None = None
    head_scores: NestedKey | None = None

    def present(self) -> list[NestedKey]:
        """Return the keys that are written."""
        keys = (
            self.text, self.masks, self.tokens, self.log_probs, self.history, self.hidden_states,
            self.token_hidden_states, self.weight_version, self.finish_reason, self.mixed_weights, self.logits,
            self.chat_digest, self.sampling, self.routed_experts, self.error, self.weight_versions, self.images,
            self.pixel_values, self.head_scores,
        )  # fmt: skip
        return [key for key in keys if key is not None]


def list_out_keys(
    keys: OutputKeys,
    hidden: HiddenSpec | None,
    logits: LogitsSpec | None,
    generate: bool,
    heads: HeadSpec | None = None,
) -> list[NestedKey]:
    """Return the keys that a call writes, each once, hidden states and logits by leaf.

    Args:
        keys: where the outputs go.
        hidden: the states that the call returns.
        logits: the logits that the call returns.
        generate: whether it generates, or scores.
        heads: the scores of heads that the call returns.

    Raises:
        InputError: two outputs have one key, or one is inside another; or scoring computes nothing.
    """
    states = (keys.hidden_states, keys.token_hidden_states, keys.head_scores)
    if not generate and (keys.log_probs, *states, keys.logits) == (None,) * 5:
        raise InputError(
            "generate=False with neither log-probs, hidden states, logits nor scores of heads: there is nothing to "
            "compute; return_log_probs must be True, or hidden states, logits or heads be asked for"
        )
    written = keys.present()
    _check_apart(written)
    # A module that reads ("hidden_states", "prompt") is fed by this one only if it says so.
    leaves: dict[NestedKey | None, list[NestedKey]] = {}
    if hidden is not None:
        segments = [str(segment) for segment in hidden.segments] if generate else [str(Segment.FULL)]
        pooled: list[NestedKey] = [f"{segment}{suffix}" for segment in segments for suffix in ("", "_count")]
        pooled += [(suffix, name) for name in hidden.spans for suffix in ("spans", "span_counts")]
        pooled += [("span_places", name) for name in hidden.unpooled]
        leaves |= {keys.hidden_states: pooled, keys.token_hidden_states: [*segments]}
    if logits is not None:
        fields = [str(segment) for segment in logits.segments] if generate else [str(Segment.FULL)]
        ids = {"prompt": "prompt_token_ids", "response": "token_ids", "full": "full_token_ids"}
        leaves[keys.logits] = [*fields, *(ids[name] for name in fields if logits.top_k is not None)]
    if heads is not None:
        parts: list[NestedKey] = [str(one) for one in heads.segments] if generate else [str(Segment.FULL)]
        parts += ["versions", *(("spans", span) for span in heads.spans)]
        leaves[keys.head_scores] = [unravel_key((part, name)) for part in parts for name in heads.heads]
        leaves[keys.head_scores] += [("span_places", span) for span in heads.unpooled]
    return [key for key in written if key not in leaves] + [
        unravel_key((key, leaf)) for key, found in leaves.items() if key is not None for leaf in found
    ]


def _check_apart(keys: Sequence[NestedKey]) -> None:
    """Refuse keys of which two are the same, or one is inside another."""
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(
                f"{key!r} is the key of {keys.count(key)} outputs; give each its own, or None to leave it out"
            )
    paths = [_path(key) for key in keys]
    for path in paths:
        inside = next((other for other in paths if other != path and other[: len(path)] == path), None)
        if inside is not None:
            raise InputError(f"{inside!r} is inside {path!r}, the key of another output; give each a place of its own")


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
