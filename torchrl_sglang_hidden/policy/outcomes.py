"""What becomes of rows that go wrong, and of samples that take too long: `OutcomeConfig`.

Knows nothing of rows or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torchrl_sglang_hidden.errors import InputError, InputTypeError

__all__ = ["OnError", "OutcomeConfig"]

OnError: TypeAlias = Literal["raise", "nan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeConfig:
    """What becomes of rows that go wrong, and of samples that take too long.

    Args:
        on_error: what is done about an error of one row: a chat that its template does not write, a prompt that is too
            long, a span that is not there, constraints that leave no token, a response that the engine aborted.
            ``"raise"`` raises it; what came back for all rows is then on the exception, in ``completions``. ``"nan"``
            keeps the other rows: states of that row that are not there are NaN with count 0, as for a row that wants no
            states, ``finish_reason`` says ``"abort"`` or ``"error"`` where there is no whole response, ``"error"`` has
            the error's text, and ``""`` in every other row; ``"weight_versions"`` has the versions of the weights that
            sampled each response, with the number of tokens of each. `SGLangHiddenWrapper.resume` goes on from aborted
            rows. What concerns the whole call is always raised, and so is every error of `SGLangHiddenWrapper.score`. A
            call may say otherwise.
        extra_samples: with ``num_samples=n``, how many responses more are sampled of each prompt: the first n that end
            are returned, in the order in which they were asked for, and the others aborted, so that nobody waits for
            the slowest. Short responses end first, and are then more frequent among those that are returned.

    Raises:
        InputError: an unknown ``on_error``, or negative ``extra_samples``.
        InputTypeError: ``extra_samples`` that are no integer.
    """

    on_error: OnError = "raise"
    extra_samples: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.on_error not in get_args(OnError):
            raise InputError(f"on_error={self.on_error!r}: expected one of {get_args(OnError)}")
        if type(self.extra_samples) is not int:
            raise InputTypeError(f"extra_samples={self.extra_samples!r}: expected an integer of at least 0")
        if self.extra_samples < 0:
            raise InputError(f"extra_samples={self.extra_samples}: expected an integer of at least 0")

    @property
    def keeps_errors(self) -> bool:
        """Whether the errors of single rows are written, and not raised."""
        return self.on_error == "nan"
