"""Call the hook on SGLang's own logits processor and gatherer, as two tensor-parallel ranks would; print JSON.

Run as a program of its own, since SGLang's import takes seconds and changes the process. The second rank's half of the
logits is the negative of the first's. The gatherer's buffer is one that all calls share, and what it returns is a view
of it, as on machines with multicast: a second call in the same step overwrites what the first returned.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch

from torchrl_sglang_hidden.reduce.token_logits import RequestLogits
from torchrl_sglang_hidden.reduce.wanted_logits import WantedLogits
from torchrl_sglang_hidden.server.cpu import cpu_engine_environment
from torchrl_sglang_hidden.spec.logits import LogitsSpec

VOCAB, WIDTH, NUM_ROWS, PIECE = 16, 4, 9, 3


def make_processor(parallel: bool, calls: list[tuple[str, int]]) -> Any:
    """Make SGLang's processor without its constructor, which wants a running server."""
    from sglang.srt import distributed
    from sglang.srt.distributed.device_communicators import triton_symm_mem_ag
    from sglang.srt.layers.logits_processor import LogitsProcessor

    processor = LogitsProcessor.__new__(LogitsProcessor)
    torch.nn.Module.__init__(processor)
    off = (
        "use_attn_tp_group", "use_tp_lm_head_all_to_all", "use_fp32_lm_head", "use_fp32_lm_head_output", "enable_mis",
        "do_tensor_parallel_all_gather_dp_attn", "defer_verify_gather", "return_full_logits", "keep_last_hidden_states",
    )  # fmt: skip
    for name in off:
        setattr(processor, name, False)
    for name in ("logit_scale", "final_logit_softcapping", "expected_aux_hidden_states", "rl_on_policy_target"):
        setattr(processor, name, None)
    processor.config, processor.vocab_size = SimpleNamespace(vocab_size=VOCAB), VOCAB
    processor.do_tensor_parallel_all_gather = parallel

    gatherer = triton_symm_mem_ag.MultimemAllGatherer(128, enabled=False, skip_entry_sync=True)
    gatherer._state = SimpleNamespace(max_token_num=128, world_size=2, hidden_dim=VOCAB)
    buffer_NV = torch.zeros(128, VOCAB, dtype=torch.bfloat16)

    def in_buffer(state: Any, half_NV: torch.Tensor, **how: Any) -> torch.Tensor:
        assert (how["skip_entry_sync"], how["safe"]) == (True, False)
        calls.append(("multimem", len(half_NV)))
        buffer_NV[: len(half_NV)] = torch.cat([half_NV, -half_NV], -1)
        return buffer_NV[: len(half_NV)]

    def with_barriers(half_NV: torch.Tensor, dim: int = -1) -> torch.Tensor:
        calls.append(("safe", len(half_NV)))
        return torch.cat([half_NV, -half_NV], dim)

    triton_symm_mem_ag.all_gather_inner = in_buffer
    distributed.tensor_model_parallel_all_gather = with_barriers
    processor._logits_gatherer = gatherer
    return processor


class Req:
    """Stands for a request of SGLang's, which a weak reference can be made to."""


def run_hook(parallel: bool, fails: bool = False) -> dict[str, Any]:
    """Run `around_logits` for three prompts, the first and last of which want their logits."""
    from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from torchrl_sglang_hidden.server import plugin, prompt_logits
    from torchrl_sglang_hidden.server.next_tokens import StepLogits
    from torchrl_sglang_hidden.server.token_rows import PromptPart

    calls: list[tuple[str, int]] = []
    processor = make_processor(parallel, calls)
    gatherer = processor._logits_gatherer
    prompt_logits.PIECE_BYTES = 4 * VOCAB * PIECE
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB // (2 if parallel else 1), WIDTH, generator=generator).bfloat16()
    states_ND = torch.randn(NUM_ROWS, WIDTH, generator=generator).bfloat16()
    wanted = WantedLogits(LogitsSpec(full=True, segments=("prompt",)), prompt_from=1)
    requests = [RequestLogits(wanted, tuple(range(4))), RequestLogits(wanted, tuple(range(3)))]
    parts = (PromptPart(0, 0, 1, 4, requests[0]), PromptPart(2, 6, 1, 3, requests[1]))
    reqs = (Req(), Req(), Req())
    step = plugin._capture.running = StepLogits((), parts, reqs, VOCAB, NUM_ROWS)
    metadata = LogitsMetadata(
        forward_mode=ForwardMode.EXTEND, extend_seq_lens=torch.tensor([4, 2, 3]), extend_seq_lens_cpu=[4, 2, 3]
    )
    head = SimpleNamespace(weight=weight_VD)
    if fails:
        head.weight = torch.zeros(2, WIDTH + 1).bfloat16()
    error = ""
    output = None
    try:
        output = plugin.around_logits(
            LogitsProcessor.forward, processor, torch.arange(NUM_ROWS), states_ND, head, metadata
        )
    except RuntimeError as raised:
        error = type(raised).__name__
    half_NV = states_ND @ weight_VD.T
    full_NV = torch.cat([half_NV, -half_NV], -1) if parallel else half_NV
    step.taken().copy_to_host(torch.clone).consume(SimpleNamespace(reqs=reqs), [None] * 3)
    found = [request.finish().prompt for request in requests]
    return {
        "calls": calls,
        "restored": processor._logits_gatherer is gatherer,
        "error": error,
        "next": output is not None and torch.equal(output.next_token_logits, full_NV[[3, 5, 8]]),
        "prompts": None not in found
        and torch.equal(found[0].values_NC, full_NV[:3].float())
        and torch.equal(found[1].values_NC, full_NV[6:8].float()),
    }


if __name__ == "__main__":
    cpu_engine_environment().__enter__()
    print(json.dumps({"two ranks": run_hook(True), "one rank": run_hook(False), "fails": run_hook(True, fails=True)}))
