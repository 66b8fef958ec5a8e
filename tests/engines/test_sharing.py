"""`LoadSharing`: which of several servers gets which rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang_hidden.engines.sharing import TOLERANCE, LoadSharing, tokens_of
from torchrl_sglang_hidden.records import Request


def request(length: int, new: int = 10, start: int = 0) -> Request:
    return Request(tuple(range(start, start + length)), sampling={"max_new_tokens": new})


def shares_of(sharing: LoadSharing, requests: list[Request]) -> list[list[int]]:
    with sharing.share(requests) as shares:
        return shares


def test_rows_of_very_different_lengths_are_shared_by_their_tokens() -> None:
    requests = [request(length, start=row) for row, length in enumerate((400, 10, 10, 10, 200, 200, 10, 10))]
    shares = shares_of(LoadSharing(2), requests)
    tokens = [sum(tokens_of(requests[row]) for row in rows) for rows in shares]
    assert sorted(row for rows in shares for row in rows) == list(range(8))
    assert max(tokens) - min(tokens) <= 20, "equal contiguous shares would have 470 and 500"
    assert shares == [sorted(rows) for rows in shares]


def test_tokens_to_sample_count_too() -> None:
    requests = [request(5, new=1000), *(request(5, new=10, start=row) for row in range(1, 6))]
    assert [len(rows) for rows in shares_of(LoadSharing(2), requests)] == [1, 5]


def test_what_is_under_way_counts() -> None:
    sharing = LoadSharing(2)
    with sharing.share([request(1000)]) as first:
        assert first == [[0], []]
        assert shares_of(sharing, [request(9, start=5), request(9, start=6)]) == [[], [0, 1]]
    assert shares_of(sharing, [request(9, start=7), request(9, start=8)]) == [[0], [1]], "it has ended"


def test_rows_of_one_prompt_follow_it() -> None:
    """A group of samples goes where its prompt went ahead, so that the prompt is computed once."""
    sharing, prompts = LoadSharing(2), [request(50, start=100 * row) for row in range(4)]
    ahead = shares_of(sharing, prompts)
    samples = [prompts[3 - row // 8] for row in range(32)]
    assert [{3 - row // 8 for row in rows} for rows in shares_of(sharing, samples)] == [set(rows) for rows in ahead]


def test_one_large_group_is_shared() -> None:
    assert [len(rows) for rows in shares_of(LoadSharing(2), [request(50)] * 64)] == [32, 32]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 5),
)
def test_every_row_has_a_server_and_none_gets_much_more_than_its_share(
    rows: list[tuple[int, int, int]], num_servers: int
) -> None:
    requests = [request(length, new, start) for length, new, start in rows]
    sharing = LoadSharing(num_servers)
    shares = shares_of(sharing, requests)
    assert sorted(row for part in shares for row in part) == list(range(len(requests)))
    costs = [tokens_of(one) for one in requests]
    tokens = [sum(costs[row] for row in part) for part in shares]
    assert max(tokens) <= TOLERANCE * sum(costs) / num_servers + max(costs)
    assert sharing._tokens == [0] * num_servers
