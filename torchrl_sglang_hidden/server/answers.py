"""Make a finished request's answer, in the scheduler's thread or in the finisher's.

Knows SGLang's tokenizers by attribute name, and imports nothing of SGLang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.errors import SpanError
from torchrl_sglang_hidden.protocol import PROTOCOL, answer_of
from torchrl_sglang_hidden.protocol.shared_memory import SharedFiles
from torchrl_sglang_hidden.server.tracked_request import TrackedRequest

__all__ = ["Answer", "Unfinished", "decoder_of"]

logger = logging.getLogger(__name__)

Answer = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is left to do for a request's answer: pool its spans, join its rows and logits, and write it.

    Args:
        tracked: the request.
        response_ids: of its response.
        decode: turns ids into text; None without a tokenizer.
        value: waits for the running value over its response.
        shared: where big answers may go.
    """

    tracked: TrackedRequest
    response_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str] | None
    value: Callable[[], torch.Tensor | None]
    shared: SharedFiles

    def finish(self) -> Answer:
        """Make the answer, as a list of one. May take long, and runs in any thread that comes behind the row store."""
        if self.tracked.refused:
            SERVER.add(requests=1, refusals=1)
            return [{"protocol": PROTOCOL, "refused": self.tracked.refused}]
        try:
            return self._make()
        except Exception as error:
            # In the scheduler's thread it would end the server, and in the finisher's the client would wait for ever.
            SERVER.add(requests=1, refusals=1)
            logger.exception("torchrl_sglang_hidden: an answer could not be made")
            refused = f"the answer could not be made ({error!r}); see the server's log"
            return [{"protocol": PROTOCOL, "refused": refused}]
        finally:
            self.tracked.release_rows()

    def _make(self) -> Answer:
        tracked = self.tracked
        pools = tracked.finish(self.response_ids, self.decode, self.value())
        wanted = tracked.logits.wanted
        logits = tracked.logits.finish() if wanted.wants_sampled or wanted.prompt_from is not None else None
        scores = None if tracked.scores is None else tracked.scores.finish(self.response_ids, self.decode)
        answer = answer_of(pools, tracked.options.way, self._share, logits, tracked.prompt_digest, scores)
        taken = tracked.pools.done + tracked.pools.count - tracked.spared
        SERVER.add(requests=1, rows=taken, **tracked.prefix_hit)
        return [answer]

    def _share(self, data: bytes) -> str | None:
        name = self.shared.share(data)
        SERVER.add(answer_bytes=len(data), shared_bytes=0 if name is None else len(data))
        return name


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str] | None:
    """Return what turns ids into text with a tokenizer, special tokens included; None without one.

    What is returned raises `SpanError` where the tokenizer does not take the ids.
    """
    if tokenizer is None:
        return None

    def decode(ids: Sequence[int]) -> str:
        try:
            return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        except Exception as error:  # a tokenizer is anybody's code, and what it raises would end the scheduler
            raise SpanError(f"the server's tokenizer cannot read the response: {error!r}; look at its log") from error

    return decode
