"""`RetrieveTeacherStates`: the states and log-probs that a teacher has at a student's tokens, from its SGLang server.

Knows nothing of losses: `VocabularyDistillationLoss` reads what is written here.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key

from torchrl_sglang_hidden.errors import InputError, InputTypeError, MissingKeyError
from torchrl_sglang_hidden.policy.ragged import ragged
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.spec.hidden import HiddenSpec

__all__ = ["RetrieveTeacherStates", "flat_rows", "teacher_keys"]


def teacher_keys(name: str | None) -> tuple[NestedKey, NestedKey]:
    """Return where the states and the log-probs of a teacher stand."""
    middle = () if name is None else (name,)
    return ("teacher_states", *middle, "full"), ("teacher_log_probs", *middle, "full")


class RetrieveTeacherStates(TensorDictModuleBase):  # type: ignore[misc]
    """Scores a student's tokens by a teacher in an SGLang server, and writes the teacher's states at them.

    One prefill per row, no token is generated, and a state of 2 · D bytes travels per token where the logits of a whole
    vocabulary would be 4 · V. The ids are sent as they are: no text is written and read again. The log-probs come with
    them, where TorchRL's ``RetrieveLogProb`` writes those of a reference model, so that TorchRL's
    ``DistillationLoss`` reads them too.

    It is for batches that were collected: call it on one, or give it to a collector as ``postproc``.

    Args:
        teacher: a policy over the teacher's engine, which is asked in tokens mode whatever its own is.
        name: of the teacher where there are several: it is a part of the keys.
        tokenizer: the student's. If given, the teacher's policy must have one too, and both must have the same tokens
            under the same ids.
        tokens_key: the student's tokens, int64 ``[N]`` per row, prompt and response.
        mask_key: bool, or 0 and 1, ``[N]`` per row, False at padding, which is not sent. Optional in the batch.
        dtype: of the states that travel.

    Writes at ``"next"`` where the batch has one, and beside the tokens otherwise:

    - ``("teacher_states", "full")``: ``[N, D]`` per row in ``dtype``, ragged or padded as the tokens are. Row n is the
      state from which the teacher predicts token n + 1; at padding stand zeros;
    - ``("teacher_log_probs", "full")``: float32 ``[N]`` per row; 0 at the first token, TorchRL's convention.

    With ``name="math"`` the keys are ``("teacher_states", "math", "full")`` and so on.

    Raises:
        InputError: tokenizers that differ, or tokens that the teacher's model does not have room for.
        InputTypeError: a teacher that is no `SGLangHiddenWrapper`, or another dtype.
        MissingKeyError: when called, a batch without tokens.

    Example:
        >>> retrieve = RetrieveTeacherStates(SGLangHiddenWrapper(teacher_engine, input_mode="tokens"))
        >>> loss = VocabularyDistillationLoss(student, teacher_model)(retrieve(batch))
    """

    def __init__(
        self,
        teacher: SGLangHiddenWrapper,
        *,
        name: str | None = None,
        tokenizer: Any = None,
        tokens_key: NestedKey = ("tokens", "full"),
        mask_key: NestedKey = ("masks", "all_attention_mask"),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if not isinstance(teacher, SGLangHiddenWrapper):
            raise InputTypeError(f"teacher: a {type(teacher).__name__}; expected an SGLangHiddenWrapper")
        if name is not None and (not isinstance(name, str) or not name):
            raise InputTypeError(f"name={name!r:.80}: expected a word, or None for a single teacher")
        super().__init__()
        if tokenizer is not None:
            _check_tokenizers(tokenizer, teacher.tokenizer)
        self._tokens_key, self._mask_key = unravel_key(tokens_key), unravel_key(mask_key)
        self.in_keys = [self._tokens_key, self._mask_key]
        self.out_keys = list(teacher_keys(name))
        self._scorer = teacher.get_new_version(
            input_mode="tokens",
            input_key=None,
            generate=False,
            generate_kwargs={},
            hidden=HiddenSpec(segments=("full",), pooling=None, tokens=True, dtype=dtype),
            logits=None,
            heads=None,
            constraints=(),
            action_mask_key=None,
            action_token_ids=None,
            pad_output=False,
            return_log_probs=True,
            inplace=False,
            # NaN in the place of a row's states would be the student's loss.
            on_error="raise",
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the teacher's states and log-probs into a batch, and return it."""
        rows = flat_rows(tensordict)
        tokens = [row.get(self._tokens_key, None) for row in rows]
        if not rows or any(ids is None for ids in tokens):
            raise MissingKeyError(
                f"no {self._tokens_key!r} in a batch of size {tuple(tensordict.batch_size)}: name the student's tokens "
                "with tokens_key"
            )
        real = [
            _mask(index, row, self._mask_key, ids) for index, (row, ids) in enumerate(zip(rows, tokens, strict=True))
        ]
        sequences = [ids[mask] for ids, mask in zip(tokens, real, strict=True)]
        scored = self._scorer(ragged(tokens=sequences, full=True))
        config = self._scorer.config.keys
        for source, key in zip((config.token_hidden_states_key, config.log_probs_key), self.out_keys, strict=True):
            found = scored.get((source, "full"), as_list=True)
            _write(tensordict, key, [_spread(values, mask) for values, mask in zip(found, real, strict=True)])
        return tensordict


def _check_tokenizers(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose ids name other tokens."""
    if teacher is None:
        raise InputError("tokenizer=…, and the teacher's policy has none to compare it with: give it its own")
    own, other = student.get_vocab(), teacher.get_vocab()
    for token, index in own.items():
        if other.get(token) != index:
            raise InputError(
                f"tokenizer: token {token!r:.80} has id {index}, and {other.get(token)} in the teacher's tokenizer; "
                "expected the student's vocabulary: give another teacher"
            )


def _mask(index: int, row: TensorDictBase, key: NestedKey, ids: torch.Tensor) -> torch.Tensor:
    """Return which tokens of a row are no padding, bool ``[N]``."""
    mask: torch.Tensor | None = row.get(key, None)
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise InputError(
            f"row {index}: {key!r} has shape {tuple(mask.shape)} for tokens of shape {tuple(ids.shape)}; expected a "
            "value for each: name the mask of these tokens with mask_key"
        )
    # Of integers, as Hugging Face writes masks, it would be a list of places.
    return mask.bool()


def flat_rows(tensordict: TensorDictBase) -> list[TensorDictBase]:
    """Return the rows of a batch of any shape, in row-major order."""
    return [row for part in tensordict.unbind(0) for row in flat_rows(part)] if tensordict.ndim else [tensordict]


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the values of the real tokens at their places among the padding."""
    spread = values.new_zeros(len(mask), *values.shape[1:])
    spread[mask.to(values.device)] = values
    return spread


def _write(tensordict: TensorDictBase, key: NestedKey, rows: list[torch.Tensor]) -> None:
    """Write one tensor per row at ``"next"`` or beside the tokens; ragged where the batch is a lazy stack."""
    target = tensordict.get("next", None)
    target = tensordict if target is None else target
    if isinstance(target, LazyStackedTensorDict):
        for row, values in zip(flat_rows(target), rows, strict=True):
            row.set(key, values)
        return
    target.set(key, torch.stack(rows).reshape(*target.batch_size, *rows[0].shape))
