"""Keeps what fails for one request in SGLang's scheduler to that request: it ends, and the server goes on.

Three things can fail there for one request alone. It is taken in, and cannot be read: it is aborted with status 400. A
processor of its own raises while a token is sampled: so is it. The server half itself fails in a step: the requests of
the step that asked for something come back with the reason as their answer, and all others as always.

Knows SGLang's scheduler by attribute name; imports of SGLang are inside functions.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.errors import InputError
from torchrl_sglang_hidden.protocol import CHANNEL, Options, read_options
from torchrl_sglang_hidden.server.capture import Capture

__all__ = ["AROUND_ISOLATION", "REQUESTS", "IsolatedOutput", "isolated", "take_in"]

logger = logging.getLogger(__name__)

# Set on SGLang's batches: the requests of a step, in the order of its rows.
REQUESTS = "_torchrl_sglang_hidden_requests"
BAD_REQUEST = 400


# --- taken in ---------------------------------------------------------------------------------------------------------


def take_in(original: Callable[..., None], scheduler: Any, recv_req: Any, capture: Capture, **kwargs: Any) -> None:
    """Read the server half's options of a request, and abort a request that cannot be taken in.

    Args:
        original: SGLang's ``Scheduler.handle_generate_request``.
        scheduler: SGLang's.
        recv_req: the request.
        capture: knows which layers and heads the server has.
        kwargs: further arguments of ``original``.
    """
    try:
        params = recv_req.sampling_params.custom_params
        options = read_options(params)
        if options is not None:
            _check_asked(options, capture)
            # Read once: every step would have to otherwise, before the request is tracked.
            params[CHANNEL] = options
        _check_processor(scheduler, recv_req)
        original(scheduler, recv_req, **kwargs)
    except InputError as error:
        _abort(scheduler, recv_req, str(error))
    except Exception as error:  # SGLang's scheduler ends on any, for all requests
        logger.exception("torchrl_sglang_hidden: the request %s cannot be taken in", recv_req.rid)
        _abort(scheduler, recv_req, f"the server cannot take the request ({error!r:.400}); see the server's log")


def _check_asked(options: Options, capture: Capture) -> None:
    layers, scores = options.wanted.layers, options.scores
    if not capture.takes(layers):
        raise InputError(f"layers={layers}: the server does not give all their states; ask for others")
    if scores is None:
        return
    capture.heads.check(scores.heads)
    if scores.stop is not None and capture.ranks > 1:
        # Each rank would decide by numbers of its own, and one that goes on alone waits for the others for ever.
        raise InputError(
            f"stop_when={str(scores.stop)!r} with {capture.ranks} tensor-parallel ranks is not supported; leave it "
            "out, or use a server with tp_size=1"
        )


def around_embedding(original: Callable[..., None], scheduler: Any, recv_req: Any, **kwargs: Any) -> None:
    """Abort a request for embeddings that cannot be taken in."""
    try:
        original(scheduler, recv_req, **kwargs)
    except Exception as error:  # as above
        logger.exception("torchrl_sglang_hidden: the request %s cannot be taken in", recv_req.rid)
        _abort(scheduler, recv_req, f"the server cannot take the request ({error!r:.400}); see the server's log")


def _check_processor(scheduler: Any, recv_req: Any) -> None:
    """Read a processor of SGLang's own, which is code of the client's, before it stands in a batch with others."""
    text = recv_req.custom_logit_processor
    if text is None or not scheduler.server_args.enable_custom_logit_processor:
        return
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    try:
        CustomLogitProcessor.from_str(text)
    except Exception as error:  # whatever the bytes come to
        raise InputError(
            f"custom_logit_processor={text!r:.80} cannot be read ({error!r:.200}); send what its to_str() returns"
        ) from error


def _abort(scheduler: Any, recv_req: Any, message: str) -> None:
    """End one request that was not taken in, and leave nothing of it behind."""
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    SERVER.add(refusals=1)
    logger.info("torchrl_sglang_hidden: the request %s is refused: %s", recv_req.rid, message)
    scheduler.waiting_queue[:] = [req for req in scheduler.waiting_queue if req.rid != recv_req.rid]
    session_params = getattr(recv_req, "session_params", None)
    session_id = None if session_params is None else session_params.id
    session = None if session_id is None else scheduler.session_controller.get(session_id)
    if session is not None:
        node = session.req_nodes.get(recv_req.rid)
        # A later turn may go on from a request that has ended, and waits for one that has not.
        if node is not None and not node.req.finished():
            node.req.finished_reason = FINISH_ABORT(message, BAD_REQUEST, "BadRequestError")
    reason = {"type": "abort", "message": message, "status_code": BAD_REQUEST, "err_type": "BadRequestError"}
    scheduler.send_abort_output(AbortReq(rid=recv_req.rid, finished_reason=reason), recv_req)


# --- sampled ----------------------------------------------------------------------------------------------------------


def around_processors(
    original: Callable[..., None], logits: torch.Tensor, info: Any, *args: Any, **kwargs: Any
) -> None:
    """Apply SGLang's own processors one by one, and abort the requests of one that raises."""
    requests = getattr(info, REQUESTS, None)
    if requests is None:
        original(logits, info, *args)
        return
    for key, entry in info.custom_logit_processor.items():
        alone = copy.copy(info)
        alone.custom_logit_processor = {key: entry}
        try:
            original(logits, alone, *args)
        except torch.OutOfMemoryError:
            raise  # no fault of the processor's
        except Exception as error:  # a processor is anybody's code
            logger.exception("torchrl_sglang_hidden: a custom_logit_processor raised")
            _abort_running([requests[row] for row in entry.rows], f"its custom_logit_processor raised {error!r:.400}")


def _abort_running(requests: Sequence[Any], message: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    for req in requests:
        # The token of this step is still sampled, from logits that the processor did not change.
        req.to_finish = FINISH_ABORT(message, BAD_REQUEST, "BadRequestError")


# --- the server half's own work ---------------------------------------------------------------------------------------


@contextmanager
def isolated(capture: Capture, requests: Sequence[Any]) -> Iterator[None]:
    """Let an error of the server half cost the requests that asked it for something, and no others.

    Args:
        capture: has those requests.
        requests: SGLang's, of the step.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # what can do without the memory has caught it; the other ranks may wait for this one
    except Exception as error:  # a bug of ours, whichever
        logger.exception("torchrl_sglang_hidden: the server half failed in a step")
        capture.give_up(requests, f"the server half failed ({error!r:.400}); see the server's log, and report it")


@dataclass(frozen=True, slots=True)
class IsolatedOutput:
    """Carries what a step took, as SGLang's ``DeviceAuxiliaryOutput``; an error on its way costs its requests alone.

    Args:
        capture: has the requests.
        requests: SGLang's, of the step.
        output: what was taken.
    """

    capture: Capture
    requests: Sequence[Any]
    output: Any

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> IsolatedHostOutput:
        """Start the copies to the host."""
        output = None
        with isolated(self.capture, self.requests):
            output = self.output.copy_to_host(copy)
        return IsolatedHostOutput(self.capture, self.requests, output)


@dataclass(frozen=True, slots=True)
class IsolatedHostOutput:
    """Carries it on the host, as SGLang's ``HostAuxiliaryOutput``. The output is None where the copy failed."""

    capture: Capture
    requests: Sequence[Any]
    output: Any

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Hand over what arrived."""
        if self.output is not None:
            with isolated(self.capture, self.requests):
                self.output.consume(batch, commits)


AROUND_ISOLATION: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.scheduler.Scheduler.handle_embedding_request": around_embedding,
    "sglang.srt.layers.sampler.apply_custom_logit_processor": around_processors,
}
