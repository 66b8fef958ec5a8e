"""Reads how SGLang really runs, and says where decoder layers cannot be read that way.

SGLang keeps the arguments that it was started with as they were given. What it made of them, with defaults and one
option's consequences for another, stands in its runtime context. Imports SGLang inside `read_settings` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings", "read_settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What SGLang made of its arguments, as far as the server half depends on it.

    Args:
        full_states: whether steps bring every position's state, and not the last one's or none.
        packed_states: whether these states are other layers', packed for a draft model.
        diffuses: whether a diffusion language model is served.
        two_batches: whether the layers run on two halves of a batch in turn.
        compiles: whether torch.compile compiles the model's forward pass.
        splits_attention: whether data-parallel ranks share the layers: data-parallel attention.
        tensor_ranks: tensor-parallel ranks.
        decode_graph_rows: most rows of a decode graph; 0 where none runs.
        graphs: the device whose graphs run, such as ``"cuda"``; empty where none runs.
        raw_log_probs: whether log-probs of sampled tokens leave the temperature out.
    """

    full_states: bool = True
    packed_states: bool = False
    diffuses: bool = False
    two_batches: bool = False
    compiles: bool = False
    splits_attention: bool = False
    tensor_ranks: int = 1
    decode_graph_rows: int = 0
    graphs: str = ""
    raw_log_probs: bool = False

    @property
    def no_layers_because(self) -> str:
        """Why only what the head reads can be taken, with the remedy; empty where decoder layers can be too."""
        reasons = {
            "--enable-two-batch-overlap runs the layers in parts; start the server without it": self.two_batches,
            # A hook is Python code between compiled code. It would be compiled once more for every set of layers that
            # is asked for, also while a graph is captured, where torch refuses to compile.
            "--enable-torch-compile compiles the layers, and code between them cannot run; start the server without it":
                self.compiles,
            # A layer's output is completed by a collective of all ranks, but a rank knows its own requests only: one
            # rank would wait for another that does not read the layer.
            "with data-parallel attention the ranks would have to read every layer together, in each step; start the "
            "server without --enable-dp-attention": self.splits_attention,
            f"graphs of {self.graphs} devices are not known to record layers; start the server with "
            "--disable-cuda-graph": self.graphs not in ("", "cuda"),
        }  # fmt: skip
        return next((reason for reason, holds in reasons.items() if holds), "")


def read_settings() -> Settings:
    """Read the settings of the server that this process belongs to."""
    import sglang
    from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB
    from sglang.srt.runtime_context import get_context, get_parallel

    leaf, parallel = get_context().config_leaf, get_parallel()
    mode, device, decode = leaf("return_hidden_states_mode"), leaf("device"), leaf("cuda_graph_config").decode
    # SGLang has no graphs on the CPU except under torch.compile.
    graphs = decode.backend != "disabled" and device != "cpu"
    return Settings(
        full_states=mode == "full" or (mode is None and leaf("enable_return_hidden_states")),
        # The argument is new in SGLang 0.5.23, and asking for one that is not there raises.
        packed_states=sglang.__version__ != "0.5.22" and leaf("enable_return_aux_hidden_states"),
        diffuses=leaf("dllm_algorithm") is not None,
        two_batches=leaf("enable_two_batch_overlap"),
        compiles=leaf("enable_torch_compile"),
        splits_attention=parallel.attn_dp_enabled,
        tensor_ranks=parallel.tp_size,
        decode_graph_rows=max(decode.bs or (decode.max_bs or 0,)) if graphs else 0,
        graphs=device if graphs else "",
        raw_log_probs=SGLANG_RETURN_ORIGINAL_LOGPROB,
    )
