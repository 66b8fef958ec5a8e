"""What stands in for SGLang where the server half's own classes run without a server, and what counts their work.

Knows nothing of batches: whoever uses it drives the steps, the tests with a request of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_sglang_hidden.protocol import CHANNEL, pack_options
from torchrl_sglang_hidden.reduce.wanted import Wanted
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits

PROMPT_TOKENS = 8


class Request:
    """SGLang's request, with the attributes that the server half reads; its prompt has `PROMPT_TOKENS` tokens.

    Args:
        number: the first token of its prompt.
        wanted: what it wants of the states.
        logits: what it wants of the logits, or None.
    """

    def __init__(self, number: int, wanted: Wanted, logits: WantedLogits | None = None) -> None:
        custom = {CHANNEL: pack_options(wanted, "binary", logits)}
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=10**6)
        self.origin_input_ids = [number, *range(1, PROMPT_TOKENS)]
        self.output_ids: list[int] = []
        self.extra_key = self.session = self.multimodal_inputs = self.tokenizer = None
        self.done = False

    @property
    def output_ids_through_stop(self) -> list[int]:
        """The ids of its response."""
        return self.output_ids

    def finished(self) -> bool:
        """Return whether it has ended."""
        return self.done


def answer_of(capture: Any, req: Any) -> list[dict[str, Any]]:
    """Finish a request as SGLang's streamer does: return its answer as a list of one, or an empty list for none."""
    if hasattr(capture, "answer"):
        return capture.answer(req)  # a revision before this function
    tracked = capture.opened.get(req)
    (unfinished,) = capture.answers([req])
    if unfinished is None:
        return []
    if tracked.keeps_rows:
        wait_for_jobs(capture.later)  # its rows are written in another thread
    return unfinished.finish()


def wait_for_jobs(add: Callable[[Callable[[], None]], None]) -> None:
    """Wait until all jobs of a finisher are done; ``add`` adds one."""
    done = threading.Event()
    add(done.set)
    done.wait()


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        self.count += 1
        return function(*args, **(kwargs or {}))
