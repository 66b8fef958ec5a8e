"""Shows the server half's counters in SGLang's internal state and, with ``--enable-metrics``, in its ``/metrics``.

SGLang's processes write their metrics into files of one directory, from which its HTTP server reads the sums; so does
this. Knows prometheus_client, which SGLang requires, and nothing of what is counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torchrl_sglang_hidden.counters import SERVER, ServerCounters, Tally
from torchrl_sglang_hidden.protocol import CHANNEL

__all__ = ["AFTER_METRICS", "COUNTERS", "PREFIX", "publish", "publish_here"]

logger = logging.getLogger(__name__)

# In the internal state, beside the status of the server half: an older client reads that one as before.
COUNTERS = f"{CHANNEL}_counters"

PREFIX = "torchrl_sglang_hidden:"
_SAYS = {
    "requests": "Finished requests that asked something of the server half.",
    "rows": "Hidden states taken for them.",
    "refusals": "Requests that the server half refused.",
    "answer_bytes": "Bytes of states and logits in the answers.",
    "shared_bytes": "Those of them that went through shared memory.",
    "prefix_hits": "Prompts that went on from running values of a prompt that began alike.",
    "prefix_rows": "Rows that were not computed again for that reason.",
    "steps": "Forward steps in which the server half had something to do.",
    "step_seconds": "Time of the scheduler's thread that it took in them.",
    "weight_updates": "Changes of the weights that it saw.",
}


def publish(tally: Tally[ServerCounters], model_name: str) -> bool:
    """Write what is added to a tally from now on into SGLang's metrics, under names such as ``…:rows_total``.

    Args:
        tally: of this process; one that is published already stays as it is.
        model_name: the served model's, the label that SGLang's own metrics have.

    Returns:
        Whether this server has metrics.
    """
    # Read by prometheus_client when it is first imported: SGLang sets it before, where metrics are on.
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return False
    if tally.on_add is not None:
        return True
    from prometheus_client import CollectorRegistry, Counter

    # A registry of its own: SGLang's HTTP server reads the files, and a second counter of a name is an error.
    registry = CollectorRegistry()
    counters = {
        field.name: Counter(PREFIX + field.name, _SAYS[field.name], ["model_name"], registry=registry).labels(
            model_name
        )
        for field in fields(ServerCounters)
    }

    def on_add(amounts: Mapping[str, float]) -> None:
        for name, amount in amounts.items():
            counters[name].inc(amount)

    on_add({name: amount for name, amount in tally.pack().items() if amount})
    tally.on_add = on_add
    return True


def publish_here(server_args: Any) -> None:
    """Publish this process's counters, where the server was started with metrics."""
    if server_args.enable_metrics:
        publish(SERVER, str(server_args.served_model_name or server_args.model_path))


def after_streamer_class(streamer_class: type, scheduler: Any) -> None:
    """Publish the counters of a scheduler's process, when it is made."""
    publish_here(scheduler.server_args)


def after_internal_state(output: Any, *args: Any) -> None:
    """Add the counters to SGLang's internal state, which ``/server_info`` shows."""
    output.internal_state[COUNTERS] = SERVER.pack()


def after_weight_version(result: Any, *args: Any, **kwargs: Any) -> None:
    """Count a change of the weights."""
    SERVER.add(weight_updates=1)
    logger.info("torchrl_sglang_hidden: the weights changed, for the %d. time", SERVER.read().weight_updates)


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
AFTER_METRICS: dict[str, Callable[..., Any]] = {
    f"{_SCHEDULER}.get_output_streamer_class": after_streamer_class,
    f"{_SCHEDULER}.get_internal_state": after_internal_state,
    f"{_SCHEDULER}.record_weight_version_change": after_weight_version,
}
