"""Call SGLang's language-model head for prompt tokens, whose logits SGLang itself does not compute.

Knows SGLang's logits processor, and nothing of what is done with the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torchrl_sglang_hidden.server.next_tokens import StepLogits

__all__ = ["take_prompt_logits"]


def take_prompt_logits(
    step_logits: StepLogits, processor: Any, hidden_states: Any, lm_head: Any, logits_metadata: Any
) -> None:
    """Take the planned logits of prompt tokens; where the head cannot give them, say so or leave them out.

    Args:
        step_logits: what is planned.
        processor: SGLang's ``LogitsProcessor``.
        hidden_states: the states that the head reads, one row for each position of the step.
        lm_head: the head.
        logits_metadata: SGLang's, or the batch that it is made from.
    """
    from sglang.srt.layers.logits_processor import LogitsMetadata

    if hasattr(lm_head, "set_lora"):
        # SGLang finds a row's adapter by the row's index in the whole step, and the head is called with a part of it.
        for part in step_logits.prompts:
            part.logits.refuse("the server's LoRA adapters act on the head, which then gives no logits of prompts")
        return
    if processor.do_tensor_parallel_all_gather_dp_attn:
        # All ranks must call the head together, and not all have these rows: the short count tells the client.
        return
    metadata = logits_metadata
    if not isinstance(metadata, LogitsMetadata):
        metadata = LogitsMetadata.from_forward_batch(metadata)

    def head(rows: Any) -> Any:
        return processor._get_logits(rows, lm_head, metadata, use_logits_buffer=False)

    collective = processor.do_tensor_parallel_all_gather
    with _gathering_safely(processor) if collective else nullcontext():
        step_logits.take_prompts(hidden_states, head, collective=collective)


@contextmanager
def _gathering_safely(processor: Any) -> Iterator[None]:
    """Let the head be called several times in a row.

    SGLang's own gatherer writes into buffers of all ranks without a barrier at entry (``skip_entry_sync``), and returns
    a view of its buffer: a rank that calls the head again at once may overwrite what another rank has not read yet.
    """
    from sglang.srt.distributed import tensor_model_parallel_all_gather

    gatherer = processor._logits_gatherer
    processor._logits_gatherer = tensor_model_parallel_all_gather
    try:
        yield
    finally:
        processor._logits_gatherer = gatherer
