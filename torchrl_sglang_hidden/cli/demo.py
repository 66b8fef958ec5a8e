"""``demo``: how its options become a call of `run_demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for the picture and the TensorDict; those of an earlier run are replaced.")
    ] = Path("demo_output"),
    # prompts.MAX_NEW_TOKENS; importing it would load PyTorch for the help. A test compares.
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one response.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
) -> None:
    """Collect two dozen responses and their hidden states from a small real model; needs no GPU.

    Starts an SGLang server, drives it with a TorchRL collector, and prints a table of the responses.

    Writes a picture of the pooled hidden states, and the TensorDict. The first run downloads 93 MB.
    """
    from torchrl_sglang_hidden.demo.run import run_demo

    run_demo(output_dir=output, max_new_tokens=max_new_tokens, temperature=temperature)
