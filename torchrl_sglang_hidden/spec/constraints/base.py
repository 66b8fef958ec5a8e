"""Defines the base of all constraints, their text form, and the registry of their names.

Knows nothing of the constraints that the package ships.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError, UnknownOptionError

__all__ = ["ConstraintStep", "LogitConstraint", "constraints_of", "known_constraints"]


@dataclass(frozen=True, slots=True)
class ConstraintStep:
    """Tells a constraint which token it constrains.

    Args:
        index: the token's index in the response, from 0; exact under overlap scheduling too.
        max_new_tokens: most tokens of the response.
        prompt_ids: the P ids of the prompt.
        response_ids: int64 ``[index]``, the response's earlier ids, on the logits' device. Copying them to the host
            waits for the accelerator. With ``on_host=True`` they are on the host already.
    """

    index: int
    max_new_tokens: int
    prompt_ids: Sequence[int]
    response_ids: torch.Tensor


_KINDS: dict[str, type[LogitConstraint]] = {}


@dataclass(frozen=True, kw_only=True)
class LogitConstraint(ABC):
    """Changes the logits of the next token: the base of every constraint, and of the ones that you write.

    A constraint that you write is a frozen dataclass with a name, whose fields JSON can carry, in a module that the
    server can import too. Start the server with the module: ``launch(constraint_modules=("my.module",))``.

    The server's own process calls `apply`. On an accelerator, an operation that fails on the device itself, such as an
    index outside of the vocabulary, cannot be caught there: it ends the server, with all requests in it. Declare such a
    constraint as ``class MyConstraint(LogitConstraint, name="…", on_host=True)``: `apply` then gets copies in the
    host's memory, where the same mistake is an error of one request. Each token then waits for the accelerator.

    Args:
        first_tokens: act on the first ``first_tokens`` tokens of the response only; None for all.
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
    on_host: ClassVar[bool] = False

    first_tokens: int | None = None
    positions: tuple[int, ...] | None = None

    def __init_subclass__(cls, *, name: str | None = None, on_host: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if on_host is not None:
            if not isinstance(on_host, bool):
                raise InputTypeError(f"{cls.__name__}: on_host={on_host!r:.80}; expected True or False")
            cls.on_host = on_host
        if name is None:
            return
        if not name.isidentifier():
            raise InputError(f"{cls.__name__}: name={name!r} is no identifier; give letters, digits and underscores")
        known = _KINDS.get(name)
        # A notebook cell that is run twice defines its class twice.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"{cls.__name__}: name={name!r} is that of {known.__module__}.{known.__qualname__}")
        cls.name = name
        _KINDS[name] = cls

    def __post_init__(self) -> None:
        kind = type(self).__name__
        # With an inherited name the server would make an object of the parent class.
        if "name" not in vars(type(self)):
            parent = type(self).__bases__[0].__name__
            raise InputTypeError(f"{kind} has no name; define it as class {kind}({parent}, name='…')")
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
        """Return whether the constraint acts on the response's token ``index``."""
        if self.positions is not None:
            return index in self.positions
        return self.first_tokens is None or index < self.first_tokens

    @abstractmethod
    def apply(self, logits_V: torch.Tensor, step: ConstraintStep) -> torch.Tensor:
        """Return the changed logits of one request's next token.

        Runs inside the server at every token, and on every tensor-parallel rank: keep it fast, and without random
        numbers. Under overlap scheduling it runs for one token more than the response has. That token is discarded,
        and an exception there is ignored.

        Args:
            logits_V: float ``[V]``, after SGLang's changes and earlier constraints; may be written to.
            step: the token that is constrained. Do not write to its ids.

        Returns:
            Logits ``[V]``, on the device of ``logits_V``. ``-inf`` removes a token.
        """

    def check(self, vocab_size: int) -> None:  # noqa: B027  most have nothing to check
        """Check the constraint against a model, before the request is sent.

        Args:
            vocab_size: V.

        Raises:
            TokenIdError: an id that the model does not have.
            ConstraintError: the constraint leaves no token to choose.
        """

    # --- as text -----------------------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON carries them, without fields that are None by default."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {field.name: value for field, value in values if value is not None or field.default is not None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Make a constraint of what `fields` returned."""
        return cls(**{name: _as_tuples(value) for name, value in fields.items()})

    def to_str(self) -> str:
        """Write the constraint as ``name:{json}``, for logs, configurations and the server.

        Raises:
            InputTypeError: a field that JSON cannot carry.
        """
        try:
            return f"{self.name}:{json.dumps(self.fields(), separators=(',', ':'), allow_nan=False)}"
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"{self!r:.200} cannot travel as JSON ({error}); use numbers, strings and lists"
            ) from error

    @staticmethod
    def from_str(text: str) -> LogitConstraint:
        """Read what `to_str` wrote.

        Raises:
            UnknownOptionError: no constraint with this name is defined in this process.
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
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
            raise InputError(
                f"{text!r:.80} cannot be read as a {kind.__name__}: {error}; use what to_str() writes"
            ) from error


def constraints_of(module: str) -> tuple[str, ...]:
    """List the names of the constraints that a module, or a module inside it, defines."""
    return tuple(sorted(n for n, kind in _KINDS.items() if f"{kind.__module__}.".startswith(f"{module}.")))


def known_constraints() -> tuple[str, ...]:
    """List the names of all constraints defined in this process."""
    return tuple(sorted(_KINDS))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _read_positions(kind: str, positions: object) -> tuple[int, ...]:
    if not isinstance(positions, (list, tuple, set, frozenset, range)) or any(type(p) is not int for p in positions):
        raise InputTypeError(f"{kind}(positions={positions!r:.80}): expected integers, the response's tokens from 0")
    if not positions or min(positions) < 0:
        raise InputError(f"{kind}(positions={positions!r:.80}): expected at least one, each of at least 0")
    return tuple(sorted(set(positions)))
