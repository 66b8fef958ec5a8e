"""Input of the vector service to token ids: those that a policy sends for the same prompts, whatever the tokenizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from helpers.fake_engine import RecordingEngine, tiny_tokenizer
from helpers.tokenizers_zoo import CHATML, ZOO, zoo_tokenizer

from torchrl_sglang_hidden import InputError, InputTypeError, PromptLengthError, SGLangHiddenWrapper, ragged
from torchrl_sglang_hidden.errors import ChatTemplateError
from torchrl_sglang_hidden.service.prompts import prompt_ids

TEXTS = ["hello", "the answer is yes", "<|begin_of_text|>hello", "<s>hello", "q: yes</s>"]
BOS_TEMPLATE = "{{ bos_token }}" + CHATML
CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go north"}],
]


def sent_by_a_policy(tokenizer: Any, mode: str, prompts: list[Any]) -> list[tuple[int, ...]]:
    engine = RecordingEngine(tokenizer=tokenizer, vocab_size=1000)
    policy = SGLangHiddenWrapper(
        engine, tokenizer=tokenizer, input_mode=mode, hidden=None, generate_kwargs={"max_new_tokens": 1}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tokenizers write behind a prompt
        policy(ragged(**{mode: prompts}))
    return [request.prompt_ids for request in engine.requests]


@pytest.mark.parametrize("name", ZOO)
def test_the_ids_of_a_text_are_a_policys(name: str) -> None:
    tokenizer = zoo_tokenizer(name)
    assert [prompt_ids(0, text, tokenizer) for text in TEXTS] == sent_by_a_policy(tokenizer, "text", TEXTS)


@pytest.mark.parametrize("template", [CHATML, BOS_TEMPLATE], ids=["chatml", "bos"])
@pytest.mark.parametrize("name", ["byte_level_bos", "sentencepiece_prepend", "unigram", "word_level"])
def test_the_ids_of_messages_are_a_policys(name: str, template: str) -> None:
    tokenizer = zoo_tokenizer(name, chat_template=template)
    assert [prompt_ids(0, chat, tokenizer) for chat in CHATS] == sent_by_a_policy(tokenizer, "history", CHATS)


@pytest.mark.parametrize("ids", [[5, 6], [], [5, "6"], [None], [True], [[5]]])
def test_ids_are_left_to_the_check_of_all_requests(ids: list[Any]) -> None:
    assert prompt_ids(0, ids, tiny_tokenizer()) == tuple(ids)


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ("", PromptLengthError, "row 3: an empty text, 0 tokens"),
        ("a\ud800", InputError, r"row 3: has '\\ud800' at character 1"),
        (5, InputTypeError, "row 3: 5 is a int; expected a text, a list of token ids"),
        (None, InputTypeError, "row 3: None is a NoneType"),
        ([{"role": "user", "content": "a"}, "b"], InputTypeError, "row 3, message 1: 'b' is a str; expected an object"),
        ([{"role": "user"}], InputTypeError, "row 3, message 0: .*expected .*each a string"),
        ([{"role": 5, "content": "a"}], InputTypeError, "each a string"),
        ([{"role": "user", "content": "a", "name": "b"}], InputTypeError, "'name': 'b'.* and no more"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], InputTypeError, "each a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], InputError, "type 'image_url'.*leave the part out"),
        ([{"role": "user", "content": ["a.png"]}], InputError, "type 'str'"),
        ([{"role": "user\udc00", "content": "a"}], InputError, "row 3, message 0: .*surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused_by_row(row: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prompt_ids(3, row, tiny_tokenizer())


def test_a_pictures_placeholder_is_refused_where_it_stands() -> None:
    tokenizer = tiny_tokenizer(additional_special_tokens=["<|image_pad|>"])
    for row in ("see <|image_pad|>", [{"role": "user", "content": "see <|image_pad|>"}]):
        with pytest.raises(
            InputError, match=r"row 0.*'<\|image_pad\|>'.*give the image with it,.*remove it from the text"
        ):
            prompt_ids(0, row, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "chat_template"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_cannot_write_the_messages(template: str | None, words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=f"row 0: the server's chat template.*{words}"):
        prompt_ids(0, CHATS[0], tokenizer)
