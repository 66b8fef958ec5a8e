"""Tells of calls whose rows several servers answered with different weights, or with different versions of a head.

Knows completions and addresses, and nothing of how rows are spread.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

from torchrl_sglang_hidden.records import Completion

__all__ = ["Mixtures"]

logger = logging.getLogger(__name__)


class Mixtures:
    """Warns of the mixtures that a client's calls come back with.

    Args:
        is_updating: whether this process is giving the servers new weights, so that their versions may differ.
        is_pushing: whether this client is giving them a head.
    """

    def __init__(self, is_updating: Callable[[], bool], is_pushing: Callable[[], bool]) -> None:
        self._is_updating, self._is_pushing = is_updating, is_pushing
        # By head, the servers that were told of with their versions: these may stay apart for long.
        self._told: dict[str, dict[str, set[str]]] = {}

    def tell(self, answered: Mapping[str, Sequence[Completion | None]]) -> None:
        """Warn of what is mixed in one call.

        Args:
            answered: the completions of each server, by its address; None for a row that it did not answer.
        """
        answers = {url: [one for one in part if one is not None] for url, part in answered.items()}
        weights = {url: {one.weight_version for one in part if one.error is None} for url, part in answers.items()}
        if _apart(weights) and not self._is_updating():
            logger.warning(
                "the rows of one call are of different weights, %s, as each row's weight_version says; another client "
                "is updating the servers, or its update did not reach all of them",
                {url: sorted(found) for url, found in weights.items()},
            )
        for name in sorted({name for part in answers.values() for one in part for name in one.scores}):
            heads = {
                url: {one.scores[name].version for one in part if name in one.scores} for url, part in answers.items()
            }
            if self._is_pushing() or not self._is_news(name, heads):
                continue
            logger.warning(
                "the rows of one call are scored by different versions of head %r, %s, as each row's version says; it "
                "was pushed meanwhile, or not to all of the servers: push it again",
                name,
                {url: sorted(found) for url, found in heads.items()},
            )

    def _is_news(self, name: str, versions: Mapping[str, set[str]]) -> bool:
        """Return whether a head's versions are mixed as nothing said so far tells, and note what is said now.

        A call may reach some of the servers only, so that what it does not reach stays as it was told of.
        """
        told = self._told.setdefault(name, {})
        moved = {url: found for url, found in versions.items() if found and told.get(url) != found}
        if _apart(versions):
            told |= moved
            return bool(moved)
        for url in moved:
            told.pop(url, None)
        return False


def _apart(versions: Mapping[str, set[str]]) -> bool:
    """Return whether two servers have no version in common, as they have where an update came in the middle."""
    return any(a and b and a.isdisjoint(b) for a, b in itertools.combinations(versions.values(), 2))
