"""What one client pays as rows and servers grow: the figures of the arithmetic in docs/scale.md, without any model.

Made-up answers of made-up servers: bytes as they travel, and seconds of one core for writing requests, for reading
answers, and for sharing rows among servers that are only counted. Other programs on the machine disturb little of this.

    python benchmarks/scale.py
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

from client_side import Sizes, engine_of, make_answers
from rich.table import Table
from rounds import CONSOLE, print_record, read_arguments
from serving import greedy

from torchrl_sglang_hidden import HiddenSpec
from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.fleet import Fleet
from torchrl_sglang_hidden.engines.sharing import LoadSharing
from torchrl_sglang_hidden.errors import EngineError
from torchrl_sglang_hidden.records import Completion, Request, failed_completion
from torchrl_sglang_hidden.server.prefix_sums import ENTRY_BYTES, MAX_BYTES
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_responses

HIDDEN = HiddenSpec(("prompt", "response"))
SERVERS = (1, 8, 64, 256)
TIMES = 5


def seconds_of(run: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the median time of a few runs."""
    times = []
    for _ in range(TIMES):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def measure_rows(rows: int, prompt_tokens: int, new_tokens: int, hidden_size: int) -> dict[str, float]:
    """Measure bytes and seconds for each row of a batch that asks for pooled states and log-probs."""
    sizes = Sizes(rows, prompt_tokens, new_tokens, hidden_size)
    prompts, answers = make_answers(sizes, states=True)
    _, plain = make_answers(sizes, states=False)
    info = engine_of(sizes, lambda: answers).info
    requests = [Request(tuple(prompt), greedy(new_tokens), hidden=HIDDEN) for prompt in prompts]
    text = json.dumps(answers)
    return {
        "request_bytes": len(json.dumps(to_payload(requests, info, binary=False))) / rows,
        "answer_bytes": len(text) / rows,
        "answer_bytes_without_states": len(json.dumps(plain)) / rows,
        "write_s": seconds_of(lambda: json.dumps(to_payload(requests, info, binary=False))) / rows,
        "read_s": seconds_of(lambda: read_responses(requests, json.loads(text), info)) / rows,
    }


class _CountedServer:
    """Answers at once, and counts the threads that are alive meanwhile."""

    def __init__(self, number: int, most: list[int]) -> None:
        self.url, self._most = f"http://server-{number}", most
        self.info = SimpleNamespace(weight_version="1")

    def generate(self, requests: Sequence[Request], rids: Sequence[str], rows: Sequence[int]) -> list[Completion]:
        time.sleep(0.05)  # longer than it takes to begin the calls of all servers
        self._most[0] = max(self._most[0], threading.active_count())
        return [failed_completion(request, EngineError("made up"), "1") for request in requests]


def measure_servers(servers: int, rows: int, prompt_tokens: int) -> dict[str, float]:
    """Measure what it takes to share the rows of one call, and the threads that wait for its answers."""
    requests = [Request((row, *range(prompt_tokens - 1)), {"max_new_tokens": 64}) for row in range(rows)]
    sharing = LoadSharing(servers)

    def share() -> None:
        with sharing.share(requests):
            pass

    most = [0]
    before = threading.active_count()
    fleet = Fleet([cast(Endpoint, _CountedServer(number, most)) for number in range(servers)], lambda: False)
    wall_s = seconds_of(lambda: fleet.generate(requests), time.perf_counter)
    return {
        "servers": servers,
        "share_s_per_row": seconds_of(share) / rows,
        "call_s": wall_s,
        "threads": most[0] - before,
    }


def main() -> None:
    """Run the benchmark of the command line."""
    args = read_arguments(__doc__, prompts=1024, prompt_tokens=512, new_tokens=512)
    table = Table("D", "request", "answer", "without states", "writing", "reading", title="for each row")
    by_size = {}
    for hidden_size in (576, 4096, 8192):
        found = measure_rows(64, args.prompt_tokens, args.new_tokens, hidden_size)
        by_size[hidden_size] = found
        sizes = [f"{found[key] / 1024:.1f} KiB" for key in ("request_bytes", "answer_bytes")]
        rest = f"{found['answer_bytes_without_states'] / 1024:.1f} KiB"
        table.add_row(str(hidden_size), *sizes, rest, *(f"{found[key] * 1e3:.2f} ms" for key in ("write_s", "read_s")))
    CONSOLE.print(table)
    shared = Table("servers", "sharing, µs a row", "a call, ms", "threads", title=f"{args.prompts} rows in one call")
    by_servers = [measure_servers(servers, args.prompts, args.prompt_tokens) for servers in SERVERS]
    for one in by_servers:
        shared.add_row(
            f"{one['servers']}",
            f"{one['share_s_per_row'] * 1e6:.1f}",
            f"{one['call_s'] * 1e3:.0f}",
            f"{one['threads']}",
        )
    CONSOLE.print(shared)
    kept = {size: MAX_BYTES // (4 * size + ENTRY_BYTES) for size in by_size}
    print_record("scale", args, {"rows": by_size, "servers": by_servers, "prefix_sums_of_one_layer": kept})


if __name__ == "__main__":
    main()
