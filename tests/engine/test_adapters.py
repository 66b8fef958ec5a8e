"""Every other way to hand the wrapper an engine, and what this package believes of SGLang's own names."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.bad_link import bad_link
from helpers.policy_checks import QUESTIONS, assert_rows, history_input, make_policy, prompt_of, rows_of, tokens_input
from torchrl.modules.llm.backends.sglang import AsyncSGLang
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import SGLangHiddenWrapper, SGLangServer
from torchrl_sglang_hidden.sglang_api.sampling import SGLANG_NAMES

LEFT_OUT = {"n", "beam_width", "custom_params", "stream_interval", "watermark"}
INTERNAL = {
    "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized", "ebnf_full_assistant",
}  # fmt: skip


def test_a_bare_url_and_the_engines_own_tokenizer(smol: SGLangServer, smol_dir: str) -> None:
    policy = SGLangHiddenWrapper(smol.url, generate_kwargs={"max_new_tokens": 4, "temperature": 0})
    assert_rows(policy(history_input(QUESTIONS[:2])), smol_dir, ("response",))


def test_torchrls_own_backend(smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = make_policy(AsyncSGLang.connect(smol.url), tokenizer)
    assert_rows(policy(tokens_input([prompt_of(9, seed=1)])), smol_dir, ("response",))


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_several_urls_share_the_rows(
    smol: SGLangServer, smol_dir: str, tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> None:
    prompts = [prompt_of(5 + row, seed=row) for row in range(num_rows)]
    with bad_link(int(smol.url.rpartition(":")[2])) as link, SGLangServer([smol.url, link.url]) as both:
        out = make_policy(both, tokenizer)(tokens_input(prompts))
    assert_rows(out, smol_dir, ("prompt", "response", "full"))
    assert [row.prompt_ids for row in rows_of(out, ())] == prompts


def test_sglangs_sampling_parameters_are_the_ones_this_package_knows() -> None:
    program = (
        "from torchrl_sglang_hidden.server.cpu import use_cpu_engine; use_cpu_engine()\n"
        "from sglang.srt.sampling.sampling_params import SamplingParams\n"
        "print(*SamplingParams.__struct_fields__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(run.stdout.splitlines()[-1].split()) == SGLANG_NAMES | LEFT_OUT | INTERNAL
