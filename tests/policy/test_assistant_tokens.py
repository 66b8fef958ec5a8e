"""Which tokens of a scored chat are the assistant's: ``all_assistant_mask``.

1. Every token that holds any part of the assistant's text, with ``{% generation %}`` and by its words alike, also where
   a character is several tokens, and where the chat begins with it.
2. A template whose tag has the end of the turn marks it; without the tag, ``mark_end_of_turn=True`` does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine
from helpers.templates_zoo import CHATML, GENERATION_TIGHT, GENERATION_WIDE, ZOO, ZooTemplate, zoo_tokenizer

from torchrl_sglang_hidden import ChatTemplateError, InputError, InputTypeError, SGLangHiddenWrapper, ragged

ANSWERS = ("🤖", "ok 🇫🇷", "A", "Paris", "日本\n", "x\n\ny", "é")


def marked(template: ZooTemplate, chat: list[dict[str, Any]], **options: Any) -> tuple[list[str], list[bool]]:
    """Return the text of each run of marked tokens of a chat, and the mask."""
    tokenizer = zoo_tokenizer(template)
    engine = RecordingEngine(tokenizer=tokenizer, vocab_size=len(tokenizer), context_length=999, max_prompt_tokens=900)
    variables = {"date_string": "1 Jan"} if "date_string" in template.variables else {}
    config = {"tokenizer": tokenizer, "hidden": None, "generate": False, "chat_template_kwargs": variables}
    out = SGLangHiddenWrapper(engine, **{**config, **options})(ragged(history=[chat], full=True))
    ids, mask = out["tokens"].full[0], out["masks"].all_assistant_mask[0]
    edges = torch.cat([torch.tensor([False]), mask, torch.tensor([False])]).int().diff().nonzero().flatten().tolist()
    runs = [ids[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return [tokenizer.decode(run) for run in runs], mask.tolist()


def chat_of(*answers: str) -> list[dict[str, Any]]:
    chat = []
    for answer in answers:
        chat += [{"role": "user", "content": f"Say {answer}!"}, {"role": "assistant", "content": answer}]
    return chat


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", ZOO, ids=str)
def test_every_token_of_the_assistants_text_is_marked(template: ZooTemplate, answer: str) -> None:
    end = template.end if template is GENERATION_WIDE else ""
    runs, mask = marked(template, chat_of(answer, "Paris"))
    assert [run.strip() for run in runs] == [f"{answer.strip()}{end}" if not answer.endswith("\n") or end == ""
                                             else f"{answer}{end}", f"Paris{end}"]  # fmt: skip
    assert sum(mask) < len(mask) - 4


@pytest.mark.parametrize(("answer", "tokens"), [("🤖", 4), ("ok 🇫🇷", 11)])
def test_the_tag_marks_as_many_tokens_as_the_words(answer: str, tokens: int) -> None:
    # Hugging Face looks the end up by its last character, and leaves that character's other tokens out.
    counts = {sum(marked(template, chat_of(answer))[1]) for template in (GENERATION_TIGHT, CHATML)}
    assert counts == {tokens}


@pytest.mark.parametrize(
    "body",
    [
        "{% set said %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}<|im_start|>{{ said }}<|im_end|>",
        "{% filter trim %} <|im_start|>{% generation %}{{ m.content }}{% endgeneration %}<|im_end|> {% endfilter %}",
    ],
)
def test_a_tag_whose_place_is_not_known_is_refused(body: str) -> None:
    # Hugging Face counts what was written before the block, and marks what stands there.
    source = "{% for m in messages %}{% if m.role == 'assistant' %}" + body + "{% else %}"
    source += "<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"row 0, .*generation %} where its place in the text is not known"):
        marked(CHATML, chat_of("Paris", "A"), chat_template=source)


def test_a_tag_in_a_comment_is_none() -> None:
    assert marked(CHATML, chat_of("Paris"), chat_template="{# {% generation %} #}" + CHATML.source)[0] == ["Paris"]
    with pytest.raises(ChatTemplateError, match=r"chat_template_kwargs has .'date'., which the chat template does not"):
        marked(CHATML, chat_of("A"), chat_template="{# date #}" + CHATML.source, chat_template_kwargs={"date": "1 Jan"})


def test_a_tag_around_the_last_answer_alone_marks_that() -> None:
    body = "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>{% endfor %}"
    assert marked(CHATML, chat_of("Paris", "A"), chat_template=source)[0] == ["A"]


def test_a_chat_that_begins_with_the_assistants_first_token() -> None:
    # Hugging Face takes a first token that is also the last one for none, and marks all that follows.
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    chat = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Why so?"}]
    for source in (template, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        _, mask = marked(CHATML, chat, chat_template=source)
        assert mask == [True] + [False] * (len(mask) - 1)
        assert len(mask) > 3


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", [template for template in ZOO if not template.rewrites], ids=str)
def test_the_token_that_ends_a_turn_is_marked_if_it_is_asked_for(template: ZooTemplate, answer: str) -> None:
    ends = "" if template is GENERATION_TIGHT else template.end
    runs, _ = marked(template, chat_of(answer, "Paris"), mark_end_of_turn=True)
    assert runs == [f"{answer}{ends}", f"Paris{ends}"]


def test_an_open_turn_has_no_end() -> None:
    chat = chat_of("Paris", "The")
    chat[-1]["is_complete"] = False
    assert marked(CHATML, chat, mark_end_of_turn=True)[0] == ["Paris<|im_end|>", "The"]


def test_a_template_that_ends_turns_without_a_token() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match=r"row 0.*no special token behind the assistant's message 1, but 'user: Say"):
        marked(CHATML, chat_of("Paris", "Rome"), chat_template=template, mark_end_of_turn=True)
    with pytest.raises(InputTypeError, match="mark_end_of_turn=1: expected True or False"):
        marked(CHATML, chat_of("Paris"), mark_end_of_turn=1)
