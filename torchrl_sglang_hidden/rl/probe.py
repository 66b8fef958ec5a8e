"""`linear_probe`: what a linear map reads from hidden vectors, on rows it was not fitted to, against controls.

Knows nothing of where the vectors come from. Ridge regression in closed form: one decomposition serves every strength
and every control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.rl.measures import check_rows
from torchrl_sglang_hidden.rl.ridge import Ridge

__all__ = ["ProbeResult", "linear_probe"]

_FEWEST = 8


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How well a linear map reads targets from vectors of rows that it was not fitted to.

    Args:
        task: ``"classification"``, scored by accuracy; or ``"regression"``, scored by R², the share of the variance
            that is explained: 1 at best, below 0 where it does worse than the mean of the targets.
        score: of the test rows.
        zero_score: the same with zeros in place of the vectors: the most frequent class, or the mean, of the training
            rows.
        shuffle_scores: the same with the vectors of other rows, once for each random order.
        p_value: how often one of these was at least as good: at most 0.05 says that the vectors tell of the targets. It
            is at least 1 / (shuffles + 1).
        num_train, num_test: rows of each part.
        ridge: the strength that was chosen, by leaving out one training row at a time.
    """

    task: Literal["classification", "regression"]
    score: float
    zero_score: float
    shuffle_scores: tuple[float, ...]
    p_value: float
    num_train: int
    num_test: int
    ridge: float

    @property
    def beats_controls(self) -> bool:
        """Whether it is better than zeros, and than 95 % of the shuffled orders."""
        return self.score > self.zero_score and self.p_value <= 0.05


def linear_probe(
    states_ND: torch.Tensor,
    targets: torch.Tensor | Sequence[Any],
    *,
    groups: Sequence[Any] | torch.Tensor | None = None,
    test_fraction: float = 0.25,
    shuffles: int = 20,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear map from vectors to targets on some rows, and score it on the others.

    Features are standardised with the training rows' mean and deviation. Classes are regressed on as one column of 0
    and 1 each, and the largest wins.

    Args:
        states_ND: floating ``[N, D]``, N at least 8.
        targets: N of them. Floats, ``[N]`` or ``[N, M]``, are regressed on; bools, integers and strings are classes.
        groups: N names, such as the episode or the question of each row: rows of one name stay together, in training or
            in test. Neighbours in time are nearly equal, and a probe could otherwise look its test rows up.
        test_fraction: the part of the rows, or of the groups, that is for the test.
        shuffles: random orders of the control.
        seed: of the split and of these orders.

    Raises:
        InputError: another number of targets or groups than rows, a single class, constant targets, values that are not
            finite, or a part without rows.
        InputTypeError: vectors or targets of another type.
    """
    states_ND = check_rows("states_ND", states_ND, fewest=_FEWEST)
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction={test_fraction}: expected a number between 0 and 1")
    if type(shuffles) is not int or shuffles < 1:
        raise InputError(f"shuffles={shuffles!r:.80}: expected an integer of at least 1")
    columns = _read_targets(targets, len(states_ND))
    values_NM = columns.values.to(states_ND.device)
    generator = torch.Generator().manual_seed(seed)
    train, test = (part.to(states_ND.device) for part in _split(groups, len(states_ND), test_fraction, generator))
    ridge, test_states = Ridge(states_ND[train].double()), states_ND[test].double()
    both = torch.cat([train, test])

    def score_of(ordered_NM: torch.Tensor) -> tuple[float, float]:
        train_NM, test_NM = ordered_NM[: len(train)], ordered_NM[len(train) :]
        fit = ridge.fit(train_NM)
        return columns.score(fit.predict(test_states), test_NM, train_NM), fit.strength

    ordered_NM = values_NM[both]
    score, strength = score_of(ordered_NM)
    # To exchange the targets is to exchange the vectors, and leaves the decomposition as it is.
    orders = [torch.randperm(len(both), generator=generator).to(both.device) for _ in range(shuffles)]
    shuffled = tuple(score_of(ordered_NM[order])[0] for order in orders)
    mean_M = ordered_NM[: len(train)].mean(0).expand(len(test), -1)
    return ProbeResult(
        task="classification" if columns.is_classes else "regression",
        score=score,
        zero_score=columns.score(mean_M, ordered_NM[len(train) :], ordered_NM[: len(train)]),
        shuffle_scores=shuffled,
        p_value=(1 + sum(other >= score for other in shuffled)) / (1 + shuffles),
        num_train=len(train),
        num_test=len(test),
        ridge=strength,
    )


class _Targets(NamedTuple):
    """Targets as columns, float64 ``[N, M]``: a number each, or one column of 0 and 1 for each class."""

    values: torch.Tensor
    is_classes: bool

    def score(self, predicted: torch.Tensor, truth: torch.Tensor, train: torch.Tensor) -> float:
        """Return the accuracy; or R², against the mean of the training rows."""
        if self.is_classes:
            return float((predicted.argmax(-1) == truth.argmax(-1)).double().mean())
        spread = (truth - train.mean(0)).square().sum()
        return 1 - float((predicted - truth).square().sum() / spread.clamp(min=torch.finfo(torch.float64).tiny))


def _read_targets(targets: Any, num_rows: int) -> _Targets:
    """Return N targets as columns."""
    if isinstance(targets, torch.Tensor):
        if targets.ndim not in (1, 2) or (targets.ndim == 2 and not targets.is_floating_point()):
            raise InputError(f"targets has shape {tuple(targets.shape)}; expected [N], or [N, M] of floats")
    elif isinstance(targets, str) or not isinstance(targets, Sequence):
        raise InputTypeError(f"targets: a {type(targets).__name__}; expected a tensor, or a list with one for each row")
    if len(targets) != num_rows:
        raise InputError(f"{len(targets)} targets for {num_rows} vectors; pass one for each")
    if not isinstance(targets, torch.Tensor) and all(isinstance(target, float) for target in targets):
        targets = torch.tensor(targets, dtype=torch.float64)
    if isinstance(targets, torch.Tensor) and targets.is_floating_point():
        values = targets.detach().double().reshape(num_rows, -1)
        if not values.isfinite().all():
            raise InputError(f"targets: {int((~values.isfinite()).sum())} are not finite; leave their rows out")
        if (values == values[0]).all():
            raise InputError(f"targets: all are {values[0].tolist()}; give targets that differ")
        return _Targets(values, False)
    listed = targets.tolist() if isinstance(targets, torch.Tensor) else list(targets)
    kinds = {type(target) for target in listed}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise InputTypeError(
            f"targets of {sorted(kind.__name__ for kind in kinds)}; expected bools, integers or strings as classes, or "
            "floats to regress on"
        )
    names = sorted(set(listed))
    if len(names) < 2:
        raise InputError(f"targets: all are {names[0]!r:.80}; give at least 2 classes")
    classes = torch.tensor([names.index(target) for target in listed])
    return _Targets(torch.nn.functional.one_hot(classes, len(names)).double(), True)


def _split(
    groups: Any, num_rows: int, test_fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of both parts, each in order."""
    names = list(range(num_rows))
    if groups is not None:
        names = groups.tolist() if isinstance(groups, torch.Tensor) else list(groups)
        if len(names) != num_rows:
            raise InputError(f"{len(names)} groups for {num_rows} vectors; pass one for each")
    kinds = list(dict.fromkeys(names))
    count = min(max(round(test_fraction * len(kinds)), 1), len(kinds) - 1)
    if count < 1:
        raise InputError(f"groups: all {num_rows} rows are in one group; give at least 2 groups")
    tested = {kinds[index] for index in torch.randperm(len(kinds), generator=generator)[:count].tolist()}
    is_test = torch.tensor([name in tested for name in names])
    train, test = (~is_test).nonzero().flatten(), is_test.nonzero().flatten()
    if len(train) < 2:
        raise InputError(f"groups leave {len(train)} rows for training; needs at least 2: lower test_fraction")
    return train, test
