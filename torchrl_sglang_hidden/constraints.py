"""Constraints on the next token: what the user writes, how it travels, and what it does to logits.

Knows nothing of SGLang, wires or TensorDicts. The same code checks constraints before they are sent, and applies them
inside the server. A constraint travels as ``name:{json}``, names and numbers; the server half has the code.

The order in which logits are changed: SGLang's penalties, grammar, logit bias and its own processors; then, of these,
users' own in the order they are given, temperatures, and masks last, so that nothing gives back what a mask took. Then
SGLang's temperature, and top-k, top-p and min-p. Several masks leave what all of them allow and none of them denies.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, Self, TypeAlias

import torch

from torchrl_sglang_hidden.errors import (
    ConstraintError,
    InputError,
    InputTypeError,
    TokenIdError,
    UnknownOptionError,
)

__all__ = [
    "ActionMask",
    "ConstraintStep",
    "DisallowedTokens",
    "ExponentialSchedule",
    "LinearSchedule",
    "LogitConstraint",
    "TemperatureScale",
    "TokenConstraint",
    "check_constraints",
    "constraints_of",
    "known_constraints",
]

# Far enough for any schedule, and near enough that float32 logits stay finite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2
MAX_IDS = 2**22  # more than any vocabulary


@dataclass(frozen=True, slots=True)
class ConstraintStep:
    """Where a request is when its next token is chosen.

    Args:
        index: of the token to choose, from 0; exactly this one, under overlap scheduling too.
        max_new_tokens: most tokens of the response.
        prompt_ids: the P ids of the prompt.
        response_ids: int64 ``[index]``, the ids before it, on the logits' device. Copying them from there waits for the
            accelerator.
    """

    index: int
    max_new_tokens: int
    prompt_ids: Sequence[int]
    response_ids: torch.Tensor


_KINDS: dict[str, type[LogitConstraint]] = {}


@dataclass(frozen=True, kw_only=True)
class LogitConstraint(ABC):
    """Base of every constraint, and of your own.

    A constraint of your own is a frozen dataclass with a name, whose fields JSON can carry, in a module that the
    server's machine can import too. Start the server with that module: ``launch(constraint_modules=("my.module",))``.

    Args:
        first_tokens: act on the first so many tokens of the response only; None for all.
        positions: act on these tokens of the response only, counted from 0; None for all.

    Raises:
        InputError: a limit below 1, a negative position, or both limits at once.
        InputTypeError: limits that are no integers.

    Example:
        >>> @dataclass(frozen=True)
        ... class NoRepeat(LogitConstraint, name="no_repeat"):
        ...     penalty: float
        ...
        ...     def apply(self, logits_V, step):
        ...         logits_V[step.response_ids] -= self.penalty
        ...         return logits_V
    """

    name: ClassVar[str]

    first_tokens: int | None = None
    positions: tuple[int, ...] | None = None

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        if not name.isidentifier():
            raise InputError(f"{cls.__name__}: name={name!r} is no identifier; give letters, digits and underscores")
        known = _KINDS.get(name)
        # A notebook's cell that runs again defines its class again.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"{cls.__name__}: name={name!r} is that of {known.__module__}.{known.__qualname__}")
        cls.name = name
        _KINDS[name] = cls

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not hasattr(self, "name"):
            raise InputTypeError(f"{kind} has no name; define it as class {kind}(LogitConstraint, name='…')")
        if self.first_tokens is not None:
            if type(self.first_tokens) is not int:
                raise InputTypeError(f"{kind}(first_tokens={self.first_tokens!r}): expected an integer, or None")
            if self.first_tokens < 1:
                raise InputError(f"{kind}(first_tokens={self.first_tokens}): expected at least 1, or None for all")
        if self.positions is not None:
            object.__setattr__(self, "positions", _read_positions(kind, self.positions))
            if self.first_tokens is not None:
                raise InputError(f"{kind}: first_tokens and positions are both given; keep one")

    def acts_on(self, index: int) -> bool:
        """Whether it acts on the response's token ``index``."""
        if self.positions is not None:
            return index in self.positions
        return self.first_tokens is None or index < self.first_tokens

    @abstractmethod
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """Changes the logits of one request's next token. Runs inside the server, at every token: keep it short.

        Args:
            logits_V: ``[V]``, as the steps before left them; may be written to.
            step: where the request is.

        Returns:
            Logits of the same shape. ``-inf`` takes a token away.
        """

    def check(self, vocab_size: int) -> None:  # noqa: B027  most have nothing to check
        """Holds it against a model before it is sent.

        Raises:
            TokenIdError: an id that the model does not have.
            ConstraintError: it leaves nothing to choose.
        """

    # --- as text -----------------------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        """Its fields as JSON carries them, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Reads what `fields` wrote."""
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        return cls(**values)

    def to_str(self) -> str:
        """As text: ``name:{json}``, for logs, configurations and the way to the server."""
        try:
            return f"{self.name}:{json.dumps(self.fields(), separators=(',', ':'), allow_nan=False)}"
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"{self!r:.200} cannot travel as JSON ({error}); use numbers, strings and lists"
            ) from error

    @staticmethod
    def from_str(text: str) -> LogitConstraint:
        """Reads what `to_str` wrote.

        Raises:
            UnknownOptionError: a name that nobody defined here.
            InputError: text of another form, or fields that the constraint refuses.
        """
        name, colon, rest = text.partition(":")
        if not colon:
            raise InputError(f"{text!r:.80} is no constraint; expected 'name:{{json}}', such as to_str() writes")
        kind = _KINDS.get(name)
        if kind is None:
            raise UnknownOptionError(
                f"{text!r:.80}: no constraint has the name {name!r}; known: {', '.join(known_constraints())}. Import "
                "the module that defines it"
            )
        try:
            fields = json.loads(rest)
            if not isinstance(fields, dict):
                raise InputTypeError(f"{text!r:.80}: expected a JSON object behind the colon")
            return kind.from_fields(fields)
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
            raise InputError(f"{text!r:.80} cannot be read as a {kind.__name__}: {error}") from error


def constraints_of(module: str) -> tuple[str, ...]:
    """The names of the constraints that a module defines, or a module inside it."""
    return tuple(sorted(n for n, kind in _KINDS.items() if f"{kind.__module__}.".startswith(f"{module}.")))


def known_constraints() -> tuple[str, ...]:
    """The names of all constraints defined in this process."""
    return tuple(sorted(_KINDS))


# --- masks -----------------------------------------------------------------------------------------------------------


class TokenConstraint(LogitConstraint):
    """A constraint that only takes tokens away: `ActionMask`, `DisallowedTokens`."""

    @abstractmethod
    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Bool ``[V]``, True where a token may be chosen."""

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """See `LogitConstraint.apply`."""
        return logits_V.masked_fill(~self.allowed(len(logits_V)).to(logits_V.device), -math.inf)


@dataclass(frozen=True)
class ActionMask(TokenConstraint, name="action_mask"):
    """Only these tokens may be chosen.

    Where the model's end-of-sequence token is not among them, a response ends at ``max_new_tokens`` or a stop string.

    Args:
        valid_token_ids: their ids, in any order; a list, a set, a range, an integer tensor.

    Raises:
        ConstraintError: no ids at all.
        TokenIdError: a negative id.
        InputTypeError: something that is no integer.
    """

    valid_token_ids: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = _read_ids("ActionMask(valid_token_ids=…)", self.valid_token_ids)
        if not ids:
            raise ConstraintError("ActionMask(valid_token_ids=()): 0 tokens are allowed; give at least 1")
        object.__setattr__(self, "valid_token_ids", ids)

    @classmethod
    def from_mask(
        cls, mask_V: torch.Tensor, *, first_tokens: int | None = None, positions: tuple[int, ...] | None = None
    ) -> Self:
        """From a bool tensor ``[V]``, True where a token may be chosen."""
        return cls(_where(mask_V), first_tokens=first_tokens, positions=positions)

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """See `TokenConstraint.allowed`."""
        return _marked(self.valid_token_ids, vocab_size)

    def check(self, vocab_size: int) -> None:
        """See `LogitConstraint.check`."""
        _check_ids("ActionMask", self.valid_token_ids, vocab_size)

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`; ids as runs, such as ``"3-7,9"``."""
        return {**super().fields(), "valid_token_ids": _to_runs(self.valid_token_ids)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        return super().from_fields({**fields, "valid_token_ids": _from_runs(fields["valid_token_ids"])})


@dataclass(frozen=True)
class DisallowedTokens(TokenConstraint, name="disallowed_tokens"):
    """These tokens are never chosen.

    Args:
        ids: their ids, in any order; a list, a set, a range, an integer tensor. None at all denies nothing.

    Raises:
        TokenIdError: a negative id.
        InputTypeError: something that is no integer.
    """

    ids: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ids", _read_ids("DisallowedTokens(ids=…)", self.ids))

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """See `TokenConstraint.allowed`."""
        return ~_marked(self.ids, vocab_size)

    def check(self, vocab_size: int) -> None:
        """See `LogitConstraint.check`."""
        _check_ids("DisallowedTokens", self.ids, vocab_size)
        if len(self.ids) == vocab_size:
            raise ConstraintError(f"DisallowedTokens: all {vocab_size} tokens of the vocabulary are denied; leave some")

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`; ids as runs, such as ``"3-7,9"``."""
        return {**super().fields(), "ids": _to_runs(self.ids)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        return super().from_fields({**fields, "ids": _from_runs(fields["ids"])})


# --- temperature -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """From ``start`` at the first token to ``end`` at token ``steps``, in equal differences; then ``end``.

    Args:
        start: temperature of token 0.
        end: temperature of token ``steps - 1`` and of those behind it.
        steps: tokens that it takes, at least 2; None for ``max_new_tokens`` of the request.
    """

    start: float
    end: float
    steps: int | None = None

    def at(self, progress: float) -> float:
        """The temperature at a place between 0 and 1."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True, slots=True)
class ExponentialSchedule:
    """As `LinearSchedule`, in equal ratios."""

    start: float
    end: float
    steps: int | None = None

    def at(self, progress: float) -> float:
        """The temperature at a place between 0 and 1."""
        return float(self.start * (self.end / self.start) ** progress)


Schedule: TypeAlias = float | tuple[float, ...] | LinearSchedule | ExponentialSchedule
_CURVES: dict[str, type[LinearSchedule | ExponentialSchedule]] = {
    "linear": LinearSchedule,
    "exponential": ExponentialSchedule,
}


@dataclass(frozen=True)
class TemperatureScale(LogitConstraint, name="temperature_scale"):
    """A temperature that changes as the response grows: the logits of token t are divided by it.

    The request's own ``temperature`` divides them too: leave that at 1 for this one alone. At ``temperature=0`` the
    best token stays the best, and only the log-probs change.

    Args:
        schedule: a number, the same for all tokens; a list of them, one per token, of which the last goes on; a
            `LinearSchedule` or an `ExponentialSchedule`. Each temperature is in [0.01, 100].

    Raises:
        InputError: a temperature outside that, NaN, an empty list, or fewer than 2 steps.
        InputTypeError: something else.
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        schedule = self.schedule
        if isinstance(schedule, (LinearSchedule, ExponentialSchedule)):
            steps = schedule.steps
            if steps is not None and type(steps) is not int:
                raise InputTypeError(f"TemperatureScale({schedule}): steps is an integer of at least 2, or None")
            if steps is not None and steps < 2:
                raise InputError(f"TemperatureScale({schedule}): expected steps of at least 2, or None")
            start, end = _read_temperature(schedule.start), _read_temperature(schedule.end)
            object.__setattr__(self, "schedule", type(schedule)(start, end, steps))
        elif isinstance(schedule, (list, tuple)):
            if not schedule:
                raise InputError("TemperatureScale([]): 0 temperatures; give at least 1")
            object.__setattr__(self, "schedule", tuple(_read_temperature(one) for one in schedule))
        else:
            object.__setattr__(self, "schedule", _read_temperature(schedule))

    def at(self, index: int, max_new_tokens: int) -> float:
        """The temperature of the response's token ``index``, of at most ``max_new_tokens``."""
        schedule = self.schedule
        if isinstance(schedule, float):
            return schedule
        if isinstance(schedule, tuple):
            return schedule[min(index, len(schedule) - 1)]
        last = (max_new_tokens if schedule.steps is None else schedule.steps) - 1
        return schedule.at(min(index / last, 1.0) if last > 0 else 0.0)

    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """See `LogitConstraint.apply`."""
        return logits_V / self.at(step.index, step.max_new_tokens)

    def fields(self) -> dict[str, Any]:
        """See `LogitConstraint.fields`."""
        schedule: Any = self.schedule
        for name, kind in _CURVES.items():
            if isinstance(schedule, kind):
                schedule = {name: [schedule.start, schedule.end, schedule.steps]}
                break
        return {**super().fields(), "schedule": schedule}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """See `LogitConstraint.from_fields`."""
        schedule = fields["schedule"]
        if isinstance(schedule, dict):
            ((name, values),) = schedule.items()
            schedule = _CURVES[name](*values)
        return super().from_fields({**fields, "schedule": schedule})


# --- checks ----------------------------------------------------------------------------------------------------------


def check_constraints(constraints: Sequence[LogitConstraint], vocab_size: int, max_new_tokens: int) -> None:
    """Holds the constraints of one request against the model and against one another.

    Raises:
        TokenIdError: an id that the model does not have.
        ConstraintError: the masks leave nothing to choose for some token of the response.
    """
    for constraint in constraints:
        constraint.check(vocab_size)
    masks = [constraint for constraint in constraints if isinstance(constraint, TokenConstraint)]
    if len(masks) < 2:
        return
    # Between these places the same masks act.
    places = {0}
    for mask in masks:
        places |= {mask.first_tokens or 0, *(p + after for p in mask.positions or () for after in (0, 1))}
    checked = set()
    for place in sorted(places):
        acting = tuple(i for i, mask in enumerate(masks) if mask.acts_on(place))
        if place >= max(max_new_tokens, 1) or len(acting) < 2 or acting in checked:
            continue
        checked.add(acting)
        left = masks[acting[0]].allowed(vocab_size)
        for i in acting[1:]:
            left &= masks[i].allowed(vocab_size)
        if not left.any():
            names = " and ".join(type(masks[i]).__name__ for i in acting)
            raise ConstraintError(
                f"{names} together leave 0 of {vocab_size} tokens for token {place} of the response; allow one that is "
                "not denied"
            )


def _read_positions(kind: str, positions: object) -> tuple[int, ...]:
    if not isinstance(positions, (list, tuple, set, frozenset, range)) or any(type(p) is not int for p in positions):
        raise InputTypeError(f"{kind}(positions={positions!r:.80}): expected integers, the response's tokens from 0")
    if not positions or min(positions) < 0:
        raise InputError(f"{kind}(positions={positions!r:.80}): expected at least one, each of at least 0")
    return tuple(sorted(set(positions)))


def _read_ids(what: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor):
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise InputTypeError(f"{what}: a tensor of {ids.dtype}; expected token ids, or ActionMask.from_mask")
        ids = ids.flatten().tolist()
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise InputTypeError(f"{what}: {ids!r:.80} is a {type(ids).__name__}; expected token ids")
    read = list(ids)
    wrong = next((one for one in read if type(one) is not int), None)
    if wrong is not None:
        raise InputTypeError(f"{what}: {wrong!r:.80} is a {type(wrong).__name__}; token ids are integers")
    if read and min(read) < 0:
        raise TokenIdError(f"{what}: {min(read)} is negative; token ids are at least 0")
    return tuple(sorted(set(read)))


def _where(mask_V: object) -> list[int]:
    if not isinstance(mask_V, torch.Tensor) or mask_V.dtype != torch.bool or mask_V.ndim != 1:
        raise InputTypeError(f"ActionMask.from_mask({mask_V!r:.80}): expected a bool tensor [V]")
    ids: list[int] = mask_V.nonzero().flatten().tolist()
    return ids


def _check_ids(kind: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and ids[-1] >= vocab_size:
        raise TokenIdError(
            f"{kind}: id {ids[-1]} is outside the vocabulary of {vocab_size}; ids are 0..{vocab_size - 1}. Was it made "
            "by another model's tokenizer?"
        )


def _read_temperature(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(
            f"TemperatureScale: {value!r:.80} is no temperature; expected a number, a list, or a schedule"
        )
    number = float(value)
    if not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
        raise InputError(
            f"TemperatureScale: temperature {number}; expected one in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}]. For "
            "the best token alone use temperature=0"
        )
    return number


def _marked(ids: Sequence[int], vocab_size: int) -> torch.Tensor:
    marked_V = torch.zeros(vocab_size, dtype=torch.bool)
    marked_V[torch.tensor(ids, dtype=torch.int64)] = True
    return marked_V


def _to_runs(ids: Sequence[int]) -> str:
    """Sorted ids as runs: ``"3-7,9"``."""
    if not ids:
        return ""
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(ids), 1) if b != a + 1), len(ids)]
    runs = [(ids[start], ids[stop - 1]) for start, stop in pairwise(breaks)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _from_runs(text: object) -> list[int]:
    if not isinstance(text, str):
        raise InputTypeError(f"{text!r:.80}: expected token ids as runs, such as '3-7,9'")
    ids: list[int] = []
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        # The text may come from the network: a few letters must not become a list that fills the memory.
        if int(last or first) - int(first) + len(ids) >= MAX_IDS:
            raise InputError(f"{text!r:.80}: more than {MAX_IDS} token ids")
        ids += range(int(first), int(last or first) + 1)
    return ids
