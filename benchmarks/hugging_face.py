"""Pooled states by this package, and by Hugging Face ``generate(output_hidden_states=True)`` and a few lines.

The server sleeps while Hugging Face works in this process on all cores, so that each side has the machine to itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hidden_states import STATE_RTOL
from rollout import HIDDEN, batch_of, responses_of
from rounds import Call, DifferentAnswersError, Rounds, take_turns
from serving import client_of, greedy, new_prompts, settle
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer

GENERATE = "generate"
# Log-probs of the two sides differ by some 1e-5: nearer ones may change places, and the rest of the row with them.
TIE = 1e-3


def compare_generate(server: SGLangServer, *, prompts: int, prompt_tokens: int, new_tokens: int, rounds: int) -> Rounds:
    """Let Hugging Face and this package's policy take turns at generating, with the mean of the response's states."""
    path = server.info.model_path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # As the server does, which is told to ignore it: `min_new_tokens` would forbid the token, and choose another.
    model.generation_config.eos_token_id = None
    policy = SGLangHiddenWrapper(
        server,
        tokenizer=AutoTokenizer.from_pretrained(path),
        input_mode="tokens",
        hidden=HiddenSpec(segments=("response",)),
        generate_kwargs=greedy(new_tokens),
    )

    def generate(batch: Sequence[Sequence[int]]) -> Call:
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        ids_BP = torch.tensor(batch)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids_BP,
                attention_mask=torch.ones_like(ids_BP),
                max_new_tokens=new_tokens,
                do_sample=False,
                output_hidden_states=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
            # The last layer's last position of each step is the state that produced the step's token.
            states_BTD = torch.stack([step[-1][:, -1] for step in out.hidden_states], 1)
            pooled_BD = states_BTD.mean(1)
            log_probs_BTV = torch.stack(out.logits, 1).log_softmax(-1)
            tokens_BT = out.sequences[:, ids_BP.shape[1] :]
            log_probs_BTV.gather(-1, tokens_BT[..., None])
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads)
        best_BT2 = log_probs_BTV.topk(2).values
        margins = (best_BT2[..., 0] - best_BT2[..., 1]).tolist()
        return Call(seconds, {"tokens": tokens_BT.tolist(), "states": pooled_BD, "margins": margins})

    with client_of(server) as client:

        def ask_policy(batch: Sequence[Sequence[int]]) -> Call:
            prompts_TD = batch_of(batch)
            settle(client)
            start = time.perf_counter()
            out = policy(prompts_TD)
            states_BD = out.get(("hidden_states", "response"))
            seconds = time.perf_counter() - start
            return Call(seconds, {"tokens": responses_of(out), "states": states_BD})

        sides: dict[str, Any] = {GENERATE: generate, HIDDEN: ask_policy}
        return take_turns(
            f"Hugging Face, {prompts} × ({prompt_tokens} + {new_tokens}) tokens",
            sides,
            lambda number: new_prompts(server.info, prompts if number else 2, prompt_tokens, seed=number),
            rounds=rounds,
            compare=_largest_difference,
        )


def _largest_difference(calls: Mapping[str, Call]) -> float:
    expected, found = calls[GENERATE].found, calls[HIDDEN].found
    same = [
        row
        for row, (a, b) in enumerate(zip(expected["tokens"], found["tokens"], strict=True))
        if not _part(a, b, expected["margins"][row])
    ]
    if not same:
        raise DifferentAnswersError("the two sides' tokens part in every row; no ratio means anything")
    expected_BD, found_BD = expected["states"][same], found["states"][same]
    worst = float(((found_BD - expected_BD).norm(dim=1) / expected_BD.norm(dim=1)).max())
    if not worst < STATE_RTOL:
        raise DifferentAnswersError(f"the two sides' states differ by {worst:.1e} relative; no ratio means anything")
    return worst


def _part(expected: Sequence[int], found: Sequence[int], margins: Sequence[float]) -> bool:
    """Return whether two greedy rows part where the best two tokens are equally good, to the rounding of float32."""
    differ = [index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if differ and margins[differ[0]] > TIE:
        raise DifferentAnswersError(
            f"{HIDDEN!r} generated other tokens than {GENERATE!r}, where the best token's log-prob is "
            f"{margins[differ[0]]:.1e} over the next one's, more than {TIE:.0e}; no ratio means anything"
        )
    return bool(differ)
