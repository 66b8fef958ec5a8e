"""Shares the rows of a batch among several servers by load.

Counts tokens of requests; knows nothing of how they travel.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torchrl_sglang_hidden.records import DEFAULT_NEW_TOKENS, Request

__all__ = ["LoadSharing"]

# Prompts whose server is remembered: an entry is two small integers.
MAX_REMEMBERED = 65536
# A group of equal prompts stays whole where this much over a server's fair share, for each server that has a part of
# it computes the prompt.
TOLERANCE = 1.1


def tokens_of(request: Request) -> int:
    """Return the most tokens that a request may take: its prompt's, and those it may sample."""
    return len(request.prompt_ids) + max(int(request.sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)), 1)


class LoadSharing:
    """Keeps account of the tokens that this client has under way on each server, and of who computed which prompt.

    Args:
        num_servers: how many servers share the rows.
    """

    def __init__(self, num_servers: int) -> None:
        self._tokens = [0] * num_servers
        self._server_of: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def share(self, requests: Sequence[Request], among: Sequence[int] | None = None) -> Iterator[list[list[int]]]:
        """Assign each row to a server; the rows count as under way until the ``with`` block ends.

        The longest rows go first, each to the server with the fewest tokens under way. Rows of one prompt stay
        together, on the server that computed the prompt last, unless that server would get too much.

        Args:
            requests: one for each row.
            among: numbers of the servers that may get rows; None for all.

        Yields:
            For each server its rows in ascending order, none for a server that gets no row.
        """
        costs = [tokens_of(request) for request in requests]
        with self._lock:
            shares = self._assign(requests, costs, range(len(self._tokens)) if among is None else among)
        taken = [sum(costs[row] for row in rows) for rows in shares]
        try:
            yield shares
        finally:
            with self._lock:
                self._tokens = [before - tokens for before, tokens in zip(self._tokens, taken, strict=True)]

    def _assign(self, requests: Sequence[Request], costs: Sequence[int], among: Sequence[int]) -> list[list[int]]:
        tokens = self._tokens

        def least() -> int:
            return min(among, key=tokens.__getitem__)

        shares: list[list[int]] = [[] for _ in tokens]
        fair = (sum(tokens[server] for server in among) + sum(costs)) / len(among)
        groups: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            # The same ids around other images are another prompt.
            groups[request.prompt_ids, request.images and request.images.data].append(row)
        for prompt, rows in sorted(groups.items(), key=lambda group: -sum(costs[row] for row in group[1])):
            key = hash(prompt)
            server = self._server_of.get(key, -1)
            server = server if server in among else least()
            whole = sum(costs[row] for row in rows)
            if tokens[server] + whole > TOLERANCE * fair:
                server = least()
            limit = TOLERANCE * fair if tokens[server] + whole <= TOLERANCE * fair else fair
            for row in rows:
                if tokens[server] + costs[row] > limit:
                    server = least()
                tokens[server] += costs[row]
                shares[server].append(row)
            self._server_of[key] = server
            self._server_of.move_to_end(key)
        while len(self._server_of) > MAX_REMEMBERED:
            self._server_of.popitem(last=False)
        return [sorted(rows) for rows in shares]
