"""Two turns of 200 random chats on a real server: what `policy/test_random_chats.py` holds without one."""

from __future__ import annotations

import pytest
from helpers.random_chats import Answer, Case, Talk, Talking, asked_on, chats, texts
from helpers.templates_zoo import CHATML, GENERATION_WIDE, LLAMA3, QWEN3, R1, ZooTemplate
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from tensordict import lazy_stack
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import HiddenSpec, SGLangHiddenWrapper, SGLangServer, ragged

ROWS = 20


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3, R1, GENERATION_WIDE], ids=str)
def test_random_chats_go_on_from_what_was_sampled(
    template: ZooTemplate, smol: SGLangServer, tokenizer: PreTrainedTokenizerBase
) -> None:
    case = Case("byte_level", template, native=False)
    talking = Talking(case, tokenizer, "append", padded=False)
    policy = SGLangHiddenWrapper(
        smol,
        tokenizer=tokenizer,
        chat_template=template.source,
        chat="append",
        inplace=False,
        hidden=HiddenSpec(("prompt",)),
        generate_kwargs={"max_new_tokens": 2},
    )

    def keeps(text: str) -> bool:
        """Whether the demo model's tokenizer gives a text back: it has no tokens for some bytes of rare characters."""
        return bool(tokenizer.decode(tokenizer(text)["input_ids"]) == text)

    said = chats(template, ends_with="user", size=2).filter(lambda chat: keeps(case.render(chat, tokenizer)))
    row = st.tuples(said, texts(2).filter(keeps))

    # The first example is of empty chats, all the same: 200 are of the others. A failure is not made smaller, which
    # would ask the server hundreds of times.
    @seed(1)
    @settings(max_examples=3, phases=[Phase.generate])
    @given(st.lists(row, min_size=ROWS, max_size=ROWS))
    def claim(rows: list[tuple[list[dict[str, str]], str]]) -> None:
        talks = [Talk(ragged(history=[chat])[0], [(Answer("", (), ""), question)]) for chat, question in rows]
        for _ in range(2):
            out = policy(lazy_stack([talk.row for talk in talks]))
            for place, row in enumerate(out.unbind(0)):
                talk = talks[place]
                prompt, response = row["tokens"].prompt.tolist(), row["tokens"].response.tolist()
                assert prompt[: len(talk.ids)] == talk.ids
                talking.check(talk, row, prompt, response)
                # The server's own count of the ids that it got.
                assert int(row["hidden_states"].prompt_count) == len(prompt)
                sampled = row["masks"].all_assistant_mask.tolist()
                question = talk.to_come[0][1]
                talks[place] = Talk(asked_on(row, question), talk.to_come, prompt + response, sampled)

    claim()
