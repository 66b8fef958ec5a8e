"""Rendering chats: which template is used, with which variables and what time, and what is said where it fails.

1. Of a tokenizer's several templates the default is used, or the one that is named; none is ever guessed.
2. Variables come from the policy, the call and the row, each over the one before; one without an effect raises.
3. What a template raises comes out as `ChatTemplateError`, with the row, the message and a remedy, before anything is
   sent; and what it would leave out without a word raises too.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers.fake_engine import RecordingEngine
from helpers.templates_zoo import (
    CHATML,
    DATE,
    GEMMA,
    LLAMA3,
    MISTRAL,
    QWEN3,
    R1,
    TOOLS,
    ZOO,
    ZooTemplate,
    zoo_tokenizer,
)
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.data.llm.history import _CHAT_TEMPLATES, ContentBase
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms.tools import ToolTransformBase
from torchrl.modules.llm.policies import ChatHistory
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import ChatTemplateError, InputError, InputTypeError, SGLangHiddenWrapper, ragged

Chat = list[dict[str, Any]]

QUESTION: Chat = [{"role": "user", "content": "What is the capital?"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def make(tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[SGLangHiddenWrapper, RecordingEngine]:
    respond = options.pop("respond", lambda ids: [*tokenizer("Paris")["input_ids"], tokenizer.eos_token_id])
    size = {"vocab_size": len(tokenizer), "context_length": 4096, "max_prompt_tokens": 4000}
    engine = RecordingEngine(tokenizer=tokenizer, respond=respond, **size)
    return SGLangHiddenWrapper(engine, **{"tokenizer": tokenizer, "hidden": None, "inplace": False, **options}), engine


def sent(engine: RecordingEngine, policy: SGLangHiddenWrapper) -> list[str]:
    return [policy.tokenizer.decode(list(request.prompt_ids)) for request in engine.requests]


def ask(policy: SGLangHiddenWrapper, *chats: Chat, **fields: Any) -> TensorDictBase:
    return policy(ragged(history=chats or [QUESTION], **fields))


def rendered(template: ZooTemplate | str, chat: Chat, tokenizer: PreTrainedTokenizerBase, **variables: Any) -> str:
    return tokenizer.apply_chat_template(
        chat, chat_template=str(getattr(template, "source", template)), tokenize=False, add_generation_prompt=True,
        **variables,
    )  # fmt: skip


# --- which template ---------------------------------------------------------------------------------------------------


def test_every_template_of_the_zoo_is_sent_as_hugging_face_writes_it() -> None:
    chat = [*QUESTION, {"role": "assistant", "content": "Paris 🤖"}, {"role": "user", "content": "日本?\n"}]
    for template in ZOO:
        tokenizer = zoo_tokenizer(template)
        variables = {"date_string": "1 Jan"} if template is DATE else {}
        policy, engine = make(tokenizer, chat_template_kwargs=variables)
        out = ask(policy, chat)
        assert sent(engine, policy) == [out["text"].prompt[0]] == [rendered(template, chat, tokenizer, **variables)]
        assert sent(engine, policy)[0].endswith(template.header)


SEVERAL = {"default": CHATML.source, "tool_use": TOOLS.source, "rag": "{{ messages[0].content }}"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "default"),
        ({"chat_template_name": "rag"}, "rag"),
        ({"chat_template_name": "tool_use"}, "tool_use"),
        ({"chat_template_kwargs": {"tools": [WEATHER]}}, "tool_use"),
        ({"chat_template": SEVERAL["rag"]}, "rag"),
    ],
)
def test_a_tokenizer_with_several_templates(options: dict[str, Any], expected: str) -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template = SEVERAL
    policy, engine = make(tokenizer, **options)
    ask(policy)
    variables = options.get("chat_template_kwargs", {})
    assert sent(engine, policy) == [rendered(SEVERAL[expected], QUESTION, tokenizer, **variables)]


def test_a_tokenizers_own_name_comes_before_torchrls() -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template = {"qwen": "own {{ messages[0].content }}"}
    policy, engine = make(tokenizer, chat_template_name="qwen")
    ask(policy)
    assert sent(engine, policy) == ["own What is the capital?"]
    policy, engine = make(zoo_tokenizer(CHATML), chat_template_name="chatml_format")
    ask(policy)
    assert sent(engine, policy) == [rendered(_CHAT_TEMPLATES["chatml_format"], QUESTION, tokenizer)]


def test_a_name_that_no_template_has() -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template = SEVERAL
    with pytest.raises(
        ChatTemplateError, match=r"'tools': expected one of the tokenizer's \['default', 'rag', 'tool_use'\]"
    ):
        make(tokenizer, chat_template_name="tools")


@pytest.mark.parametrize("source", ["tool_use", "templates/chat.jinja", "{{ bos_token }}Hello", "/messages.jinja"])
def test_a_template_that_reads_no_messages(source: str) -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template = SEVERAL
    policy, engine = make(tokenizer, chat_template=source)
    with pytest.raises(ChatTemplateError, match=r"row 0, .* reads no messages.* a name goes into chat_template_name"):
        ask(policy)
    assert not engine.requests


def test_several_templates_and_no_default() -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template = {"rag": "x", "tool_use": "y"}
    policy, engine = make(tokenizer)
    with pytest.raises(
        ChatTemplateError, match=r"row 0.*\['rag', 'tool_use'\], and none is its default; .*chat_template_name="
    ):
        ask(policy)
    assert engine.requests == []


@pytest.mark.parametrize("path", ["", "Qwen/Qwen3-0.6B-Base", "meta-llama/Llama-3"])
def test_a_base_model_without_a_template_is_not_guessed(path: str) -> None:
    tokenizer = zoo_tokenizer(CHATML)
    tokenizer.chat_template, tokenizer.name_or_path = None, path
    policy, engine = make(tokenizer)
    for read in (policy, lambda td: policy.get_new_version(generate=False, input_key=("history", "prompt"))(td)):
        with pytest.raises(ChatTemplateError, match=r"no chat template, .*chat_template=, .*chat_template_name="):
            read(ragged(history=[QUESTION]))
    assert engine.requests == []
    policy.get_new_version(input_mode="text")(ragged(text=["a"]))


def test_several_templates_as_an_argument() -> None:
    with pytest.raises(InputTypeError, match=r"chat_template=.*of several, give one"):
        make(zoo_tokenizer(CHATML), chat_template=SEVERAL)


# --- variables --------------------------------------------------------------------------------------------------------


def test_variables_of_the_policy_the_call_and_the_row() -> None:
    template = "{{ a is defined and a }} {{ b is defined and b }} {{ c is defined and c }} {{ messages[0].content }}"
    policy, engine = make(zoo_tokenizer(CHATML), chat_template=template, chat_template_kwargs={"a": 1, "b": 1, "c": 1})
    policy(ragged(history=[QUESTION] * 2, chat_template_kwargs=[{"c": 3}, {}]), chat_template_kwargs={"b": 2, "c": 2})
    policy(ragged(history=[QUESTION]))
    assert [text[:5] for text in sent(engine, policy)] == ["1 2 3", "1 2 2", "1 1 1"]
    assert policy.chat_template_kwargs == {"a": 1, "b": 1, "c": 1}
    assert policy.get_new_version(chat_template_kwargs={"a": 5}).chat_template_kwargs == {"a": 5}


@pytest.mark.parametrize("wrap", [NonTensorData, dict])
def test_a_rows_variables_keep_their_types(wrap: Any) -> None:
    variables = {"tools": [WEATHER, WEATHER], "enable_thinking": False}
    row = TensorDict(history=ChatHistory(prompt=History.from_chats([QUESTION])[0], batch_size=()), batch_size=())
    row["chat_template_kwargs"] = wrap(variables)
    tokenizer = zoo_tokenizer(QWEN3)
    policy, engine = make(tokenizer)
    policy(lazy_stack([row]))
    assert sent(engine, policy) == [rendered(QWEN3, QUESTION, tokenizer, **variables)]
    assert sent(engine, policy)[0].endswith("<think>\n\n</think>\n\n")


def test_scoring_and_candidates_take_the_variables() -> None:
    tokenizer = zoo_tokenizer(TOOLS)
    policy, engine = make(tokenizer)
    chat = [*QUESTION, {"role": "assistant", "content": "Paris"}]
    scorer = policy.get_new_version(generate=False)
    scored = scorer(ragged(history=[chat], full=True), chat_template_kwargs={"tools": [WEATHER]})
    assert "You may call: <tools>" in scored["text"].full[0]
    assert scored["masks"].all_assistant_mask[0].sum() == len(tokenizer("Paris")["input_ids"])
    engine.requests.clear()
    policy.score(ragged(history=[QUESTION]), ["a", "b"], chat_template_kwargs={"tools": [WEATHER]})
    assert all("You may call: <tools>" in text for text in sent(engine, policy))


def a_tool(city: str) -> str:
    """Say the weather.

    Args:
        city: where.
    """
    return city


def test_tools_may_be_functions() -> None:
    tokenizer = zoo_tokenizer(TOOLS)
    policy, engine = make(tokenizer, chat_template_kwargs={"tools": [a_tool]})
    ask(policy)
    assert '"name": "a_tool"' in sent(engine, policy)[0]
    policy, engine = make(tokenizer, chat_template_kwargs={"tools": [lambda city: city]})
    with pytest.raises(ChatTemplateError, match=r"row 0.*DocstringParsingException"):
        ask(policy)
    assert engine.requests == []


@pytest.mark.parametrize("name", ["enable_thinkng", "tools", "documents"])
def test_a_variable_that_the_template_does_not_read(name: str) -> None:
    policy, engine = make(zoo_tokenizer(CHATML))
    with pytest.raises(ChatTemplateError, match=rf"row 0.*chat_template_kwargs has \['{name}'\]"):
        policy(ragged(history=[QUESTION]), chat_template_kwargs={name: [WEATHER]})
    assert engine.requests == []


@pytest.mark.parametrize(
    ("variables", "error", "words"),
    [
        ({"messages": []}, InputError, "chat_template_kwargs has 'messages'.*read from the TensorDict"),
        ({"add_generation_prompt": False}, InputError, "generate=False"),
        ({"continue_final_message": True}, InputError, "is_complete=False"),
        ([1], InputTypeError, "expected a dict"),
        ({1: 2}, InputTypeError, "expected a dict"),
        ("tools", InputTypeError, "expected a dict"),
    ],
)
def test_variables_that_cannot_be(variables: Any, error: type[Exception], words: str) -> None:
    policy, engine = make(zoo_tokenizer(CHATML))
    with pytest.raises(error, match=words):
        make(zoo_tokenizer(CHATML), chat_template_kwargs=variables)
    with pytest.raises(error, match=words):
        policy(ragged(history=[QUESTION]), chat_template_kwargs=variables)
    with pytest.raises(error, match=rf"row 1.*{words}"):
        ask(policy, QUESTION, QUESTION, chat_template_kwargs=[{}, NonTensorData(variables)])
    assert engine.requests == []


def test_variables_of_a_call_outside_history_mode() -> None:
    policy, engine = make(zoo_tokenizer(CHATML), input_mode="text")
    with pytest.raises(InputError, match="only history mode has a chat template"):
        policy(ragged(text=["a"]), chat_template_kwargs={"tools": []})
    assert engine.requests == []


def test_one_clock_per_call() -> None:
    # The template writes microseconds; in scoring each chat is rendered once for its text and once for its words.
    tokenizer = zoo_tokenizer(DATE)
    chat = [*QUESTION, {"role": "assistant", "content": "Paris"}]
    policy, engine = make(tokenizer, generate=False)
    for _ in range(2):
        policy(ragged(history=[chat] * 5, full=True))
    times = [re.findall(r"Today Date: (.*?)<", text)[0] for text in sent(engine, policy)]
    assert len(set(times[:5])) == len(set(times[5:])) == 1
    assert times[0] != times[5]
    policy, engine = make(tokenizer, chat_template_kwargs={"date_string": "1 Jan"})
    ask(policy)
    assert "Today Date: 1 Jan<" in sent(engine, policy)[0]


# --- what a template cannot write -------------------------------------------------------------------------------------

SYSTEM: Chat = [{"role": "system", "content": "Be brief."}]
ADDS = "{% for m in messages %}{{ m.role + m.content }}{{ m.tool_calls or '' }}{% endfor %}"
CALL: Chat = [
    {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("template", "chat", "words"),
    [
        (
            GEMMA,
            [*SYSTEM, *QUESTION],
            r"message 0, the system's, 'Be brief.': TemplateError: System role not supported",
        ),
        (GEMMA, [*QUESTION, *QUESTION], r"message 1, the user's, .*roles must alternate"),
        (MISTRAL, [*QUESTION, *QUESTION], r"message 1, the user's, .*roles must alternate"),
        (R1, [*QUESTION, *CALL], r"message 1, the assistant's, has tool_calls and no text"),
        (ADDS, [*QUESTION, *CALL], r"message 1, the assistant's, 'None': UndefinedError"),
        (
            CHATML,
            [*QUESTION, *CALL],
            r"message 1, the assistant's, has tool_calls and no text.*does not read tool_calls",
        ),
        (
            "{# tool_calls are left out #}" + CHATML.source,
            [*QUESTION, *CALL],
            r"message 1, the assistant's, has tool_calls and no text.*does not read tool_calls",
        ),
        ("{{ messages[0].content / 2 }}", QUESTION, r"message 0, the user's, .*TypeError"),
        ("{{ messages[7].content.x }}", QUESTION, r"UndefinedError"),
        ("{{ messages }}{{ 1 / 0 }}", QUESTION, r"ZeroDivisionError"),
        ("{{ messages[0].content", QUESTION, r"TemplateSyntaxError"),
        ("{{ messages }}{{ strftime_now('%Q' * 3, 1) }}", QUESTION, r"TypeError"),
        (
            "{{ messages }}{% if add_generation_prompt %}{{ nothing.x }}{% endif %}",
            QUESTION,
            r"the generation prompt: UndefinedError",
        ),
    ],
)
def test_what_a_template_raises_names_the_row_and_the_message(
    template: ZooTemplate | str, chat: Chat, words: str, generate: bool
) -> None:
    if not generate and "generation prompt" in words:
        return
    source = template if isinstance(template, str) else template.source
    tokenizer = zoo_tokenizer(CHATML if isinstance(template, str) else template)
    policy, engine = make(tokenizer, chat_template=source, generate=generate)
    good = [*QUESTION, {"role": "assistant", "content": "Paris"}]
    chats = [good, chat] if isinstance(template, ZooTemplate) else [chat]
    with pytest.raises(
        ChatTemplateError, match=rf"(?s)row {len(chats) - 1}, \('history', '\w+'\): .*{words}"
    ) as caught:
        policy(ragged(history=chats, full=not generate))
    assert engine.requests == []
    assert isinstance(caught.value, InputError)
    assert "give a chat_template" in str(caught.value)


def parts(*content: ContentBase) -> TensorDictBase:
    message = History(role="user", content=lazy_stack(list(content)), batch_size=())
    return TensorDict(history=ChatHistory(prompt=lazy_stack([message]), batch_size=()), batch_size=())


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, CHATML, TOOLS, GEMMA], ids=str)
def test_parts_for_a_template_that_adds_strings(template: ZooTemplate) -> None:
    # `+` raises, and `{{ message.content }}` would write Python's list.
    policy, engine = make(zoo_tokenizer(template))
    with pytest.raises(ChatTemplateError, match=r"row 0, .*message 0, the user's,"):
        policy(lazy_stack([parts(ContentBase(type="text", text="Hi"))]))
    assert engine.requests == []


def test_parts_for_a_template_that_takes_them() -> None:
    template = "{% for part in messages[0].content %}{{ part.text }}|{% endfor %}"
    policy, engine = make(zoo_tokenizer(CHATML), chat_template=template)
    one = History(role="user", content=ContentBase(type="text", text="alone"), batch_size=())
    row = TensorDict(history=ChatHistory(prompt=lazy_stack([one]), batch_size=()), batch_size=())
    policy(lazy_stack([parts(ContentBase(type="text", text="a"), ContentBase(type="text", text="b")), row]))
    assert sent(engine, policy) == ["a|b|", "alone|"]


def test_a_list_of_parts_that_differ_in_their_fields() -> None:
    template = "{% for part in messages[0].content %}{{ part.text }}|{% endfor %}"
    policy, engine = make(zoo_tokenizer(CHATML), chat_template=template)
    content = [ContentBase(type="text", text="a"), ContentBase(type="text", text="b", name="n")]
    ask(policy, [{"role": "user", "content": content}])
    assert sent(engine, policy) == ["a|b|"]


@pytest.mark.parametrize("kind", ["audio", "video", "file"])
def test_a_part_that_is_neither_text_nor_image(kind: str) -> None:
    policy, engine = make(
        zoo_tokenizer(CHATML), chat_template="{% for p in messages[0].content %}<|image_pad|>{% endfor %}"
    )
    row = parts(ContentBase(type="text", text="What is this?"), ContentBase(type=kind, url="http://x/y"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"row 0, .*message 0, part 1: .*of type '{kind}'; .* leave"):
        policy(lazy_stack([row]))
    assert engine.requests == []


@pytest.mark.parametrize("function", [True, False])
def test_tool_calls_beside_a_text_that_does_not_say_them(function: bool) -> None:
    named = {"name": "weather", "arguments": {"city": "Rome"}}
    calls = [{"type": "function", "function": named} if function else named]
    answer = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    policy, engine = make(zoo_tokenizer(CHATML))
    with pytest.raises(ChatTemplateError, match=r"message 1, the assistant's, has tool_calls, and .* does not read"):
        ask(policy, [*QUESTION, answer, *QUESTION])
    assert engine.requests == []
    # torchrl's History reads them out of the text, and leaves them in it.
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    ask(policy, [*QUESTION, {**answer, "content": written}, *QUESTION])
    assert written in sent(engine, policy)[0]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_placeholder_of_a_picture_in_a_text(role: str) -> None:
    # <|image_pad|> is a special token of this tokenizer; a text that only looks like one is a text.
    policy, engine = make(zoo_tokenizer(CHATML))
    chat = [*QUESTION, {"role": role, "content": "What is on <|image_pad|>?"}]
    with pytest.raises(InputError, match=rf"row 1, .*message 1, the {role}'s, has '<\|image_pad\|>'.*remove it"):
        ask(policy, QUESTION, chat)
    assert engine.requests == []
    ask(policy, [{"role": "user", "content": "What is on <image> or [IMG]?"}])
    assert len(engine.requests) == 1


def test_the_placeholder_of_a_picture_in_a_part() -> None:
    source = "{% for m in messages %}{% for part in m.content %}{{ part.text }}|{% endfor %}{% endfor %}"
    policy, engine = make(zoo_tokenizer(CHATML), chat_template=source)
    row = parts(ContentBase(type="text", text="What is"), ContentBase(type="text", text="on <|image_pad|>?"))
    with pytest.raises(InputError, match=r"row 0, .*message 0, the user's, has '<\|image_pad\|>'.*remove it"):
        policy(lazy_stack([row]))
    assert engine.requests == []


def test_the_placeholder_of_a_picture_in_text_mode() -> None:
    policy, engine = make(zoo_tokenizer(CHATML), input_mode="text")
    with pytest.raises(InputError, match=r"row 1, \('text', 'prompt'\): has '<\|image_pad\|>'.*remove it"):
        policy(ragged(text=["What is on it?", "What is on <|image_pad|>?"]))
    assert engine.requests == []
    out = policy(ragged(text=["What is on it?", "What is on <|image_pad|>?"]), on_error="nan")
    assert [row["error"][:10] for row in out.unbind(0)] == ["", "ImageError"]


# --- TorchRL's environments -------------------------------------------------------------------------------------------


class Weather(ToolTransformBase):
    """Answers every call of the tool."""

    tool_role = "tool"

    def _process_batch_item(self, content: str, index: int) -> list[str] | None:
        return ["sunny"] if "weather" in content else None


def test_a_chat_env_with_a_tool_transform() -> None:
    tokenizer = zoo_tokenizer(TOOLS)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    policy, engine = make(
        tokenizer,
        respond=lambda ids: [*tokenizer(call)["input_ids"], tokenizer.eos_token_id],
        inplace=True,
        generate_kwargs={"max_new_tokens": 200},
    )
    env = ChatEnv(batch_size=(2,), tokenizer=tokenizer).append_transform(Weather())
    query = TensorDict(query=["Rome?", "Oslo?"], batch_size=2).to_lazystack(0)
    for row in query.unbind(0):
        row["chat_template_kwargs"] = NonTensorData({"tools": [WEATHER]})
    td = env.reset(query)
    for _ in range(2):
        td = env.step_mdp(env.step(policy(td)))
    assert [text.count("<tools>") for text in sent(engine, policy)] == [1] * 4
    chat = [
        {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": call},
        {"role": "tool", "content": "sunny"},
    ]  # fmt: skip
    assert sent(engine, policy)[2] == rendered(TOOLS, chat, tokenizer, tools=[WEATHER])
