"""Chats of several turns, and what was sampled in the turns before.

1. ``chat="append"``: with every template the next prompt begins with exactly the ids of the turn before, prompt and
   response, and goes on with what the template writes behind an answer. Masks and log-probs stay with their tokens.
2. ``prefer_tokens=True`` keeps them where the template's text has them, and says once where the two part;
   ``"strict"`` raises there.
3. A chat that does not go on from the last one is rendered whole; one whose answers were changed says so.
4. An assistant's last message with ``is_complete=False`` is gone on from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.fake_engine import RecordingEngine, log_prob_of
from helpers.templates_zoo import (
    CHATML,
    DATE,
    QWEN3,
    R1,
    TOOLS,
    ZOO,
    ZooTemplate,
    byte_by_byte,
    zoo_tokenizer,
)
from helpers.torchrl_pipelines import UserAsksOn
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms import IncrementalTokenizer
from torchrl.modules.llm.policies import ChatHistory
from transformers import PreTrainedTokenizerBase

from torchrl_sglang_hidden import (
    ChatTemplateError,
    HiddenSpec,
    InputError,
    InputTypeError,
    Role,
    SGLangHiddenWrapper,
    Turn,
    ragged,
)
from torchrl_sglang_hidden.policy.sampled_turns import digest_with_response

# Answers that templates write otherwise: with thoughts, blanks, and more than one token for a character.
ANSWERS = ("Paris", " Paris\n", "hm\n</think>\n\nParis", "<think>\nhm\n</think>\n\nParis", "日本 🤖", "")
QUESTIONS = ("Where is the 🤖?", "Who?")
variants = pytest.mark.parametrize("template", ZOO, ids=str)


def make(
    template: ZooTemplate, answer: str = ANSWERS[0], **options: Any
) -> tuple[SGLangHiddenWrapper, RecordingEngine, PreTrainedTokenizerBase, list[int]]:
    """Return a policy whose every answer is cut into bytes, as the tokenizer would not do, and these ids."""
    tokenizer = zoo_tokenizer(template)
    response = [*byte_by_byte(answer, tokenizer), tokenizer.eos_token_id]
    size = {"vocab_size": len(tokenizer), "context_length": 9999, "max_prompt_tokens": 9000}
    engine = RecordingEngine(tokenizer=tokenizer, respond=options.pop("respond", lambda ids: response), **size)
    if template is DATE:
        options = {"chat_template_kwargs": {"date_string": "1 Jan"}, **options}
    config = {"tokenizer": tokenizer, "hidden": None, "chat": "append", "generate_kwargs": {"max_new_tokens": 99}}
    return SGLangHiddenWrapper(engine, **{**config, **options}), engine, tokenizer, response


def sent(engine: RecordingEngine) -> list[list[int]]:
    return [list(request.prompt_ids) for request in engine.requests]


def turns_of(policy: SGLangHiddenWrapper, turns: int, *transforms: Any) -> list[TensorDictBase]:
    """Return the policy's output of each turn of a chat environment with two rows."""
    env = ChatEnv(batch_size=(2,), tokenizer=policy.tokenizer).append_transform(UserAsksOn(["Why?", "And\n日本?"]))
    for transform in transforms:
        env = env.append_transform(transform)
    td, outputs = env.reset(TensorDict(query=list(QUESTIONS), batch_size=2)), []
    for _ in range(turns):
        td = policy(td)
        outputs.append(td.clone())
        td = env.step_mdp(env.step(td))
    return outputs


def chat_of(row: TensorDictBase) -> list[dict[str, str]]:
    chat = row["history"].prompt
    return [{"role": role, "content": content} for role, content in zip(chat.role, chat.content, strict=True)]


def behind(template: ZooTemplate, chat: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes behind the last answer of a chat, from the token that ends it."""
    last = max(turn for turn, message in enumerate(chat) if message["role"] == "assistant")
    marked = [*chat[:last], {"role": "assistant", "content": "MARK"}, *chat[last + 1 :]]
    variables = {"date_string": "1 Jan"} if template is DATE else {}
    text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True, **variables)
    return text.split("MARK")[1]


def real(row: TensorDictBase, leaf: str, of: str = "full") -> torch.Tensor:
    """Return the values of a row's leaf without those of pads."""
    return row[leaf, of][row["masks"].all_attention_mask]


# --- append -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
@variants
def test_no_turn_changes_what_was_sampled(template: ZooTemplate, answer: str, padded: bool) -> None:
    policy, engine, tokenizer, response = make(template, answer, pad_output=padded)
    outputs = turns_of(policy, 3)
    for turn, out in enumerate(outputs):
        for place, row in enumerate(out.unbind(0)):
            ids = sent(engine)[2 * turn + place]
            full, sampled = real(row, "tokens").tolist(), real(row, "masks", "all_assistant_mask")
            assert full == ids + response
            assert row["text"].prompt == tokenizer.decode(ids)
            # The mask has the answers of all turns, and nothing else.
            assert torch.tensor(full)[sampled].tolist() == response * (turn + 1)
            log_probs = real(row, "log_probs")
            assert torch.equal(log_probs.isnan(), ~sampled)
            assert log_probs[sampled].tolist() == [log_prob_of(token_id) for token_id in response] * (turn + 1)
            if turn:
                before = sent(engine)[2 * turn - 2 + place] + response
                assert ids[: len(before)] == before
                rest = behind(template, chat_of(row), tokenizer)
                assert rest.startswith(template.end)
                assert tokenizer.decode(ids[len(before) :]) == rest.removeprefix(template.end)


def test_a_generation_prompt_that_opens_a_thought_stays() -> None:
    policy, engine, tokenizer, _ = make(R1, "hm\n</think>\n\nParis")
    turns_of(policy, 2)
    text = tokenizer.decode(sent(engine)[2])
    end, question = R1.end, f"{R1.bos}<|User|>{QUESTIONS[0]}"
    assert text == f"{question}<|Assistant|><think>\nhm\n</think>\n\nParis{end}<|User|>Why?<|Assistant|><think>\n"


@pytest.mark.parametrize(
    ("cut", "stop", "rest"),
    [
        (
            lambda ids, tokenizer: ids[:-1],
            None,
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            lambda ids, tokenizer: [*ids[:-1], *byte_by_byte("\n#", tokenizer)],
            "\n#",
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            lambda ids, tokenizer: [*ids[:-1], tokenizer.convert_tokens_to_ids("</s>")],
            None,
            "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["by length", "by a stop string", "by another token"],
)
def test_answers_that_ended_otherwise(cut: Callable[..., list[int]], stop: str | None, rest: str) -> None:
    tokenizer = zoo_tokenizer(CHATML)
    response = cut([*byte_by_byte("Paris<", tokenizer), tokenizer.eos_token_id], tokenizer)
    options = {"max_new_tokens": len(response), **({"stop_sequences": [stop]} if stop else {})}
    policy, engine, tokenizer, _ = make(CHATML, respond=lambda ids: response, generate_kwargs=options)
    turns_of(policy, 2)
    before = sent(engine)[0] + response
    assert sent(engine)[2][: len(before)] == before
    assert tokenizer.decode(sent(engine)[2][len(before) :]) == rest


def test_a_template_without_end_tokens_and_a_stop_string_of_its_own() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer = zoo_tokenizer(CHATML)
    response = byte_by_byte(" Paris\nuser:", tokenizer)
    options = {"max_new_tokens": len(response), "stop_sequences": ["\nuser:"]}
    policy, engine, _, _ = make(CHATML, respond=lambda ids: response, generate_kwargs=options, chat_template=template)
    asked = {"role": "user", "content": "Hi"}
    out = policy(ragged(history=[[asked]]))
    # SGLang's text leaves the stop string out, which the fake engine's does not.
    digest = digest_with_response(out["chat_digest"][0].split()[0], [asked], " Paris", out[0]["tokens"].full.tolist())
    out[0]["history"].full[1].content, out[0]["chat_digest"] = " Paris", digest
    policy(edited(out, lambda chat: [chat[0], {**chat[1], "content": " Paris"}, {"role": "user", "content": "Why?"}]))
    assert tokenizer.decode(sent(engine)[1]) == "user: Hi\nassistant: Paris\nuser: Why?\nassistant:"


def test_a_template_with_blanks_before_the_end_of_a_turn() -> None:
    # The end that was sampled is not written a second time behind them.
    template = CHATML.source.replace("<|im_end|>", "\n<|im_end|>")
    policy, engine, tokenizer, _ = make(CHATML, chat_template=template)
    turns_of(policy, 2)
    end = "\n<|im_end|>\n<|im_start|>"
    expected = (
        f"<|im_start|>user\n{QUESTIONS[0]}{end}assistant\nParis<|im_end|>\n<|im_start|>user\nWhy?{end}assistant\n"
    )
    assert tokenizer.decode(sent(engine)[2]) == expected


@pytest.mark.parametrize(
    ("source", "role"),
    [
        (
            "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "system",
        ),
        (CHATML.source.replace("in messages", "in messages | reverse"), "user"),
    ],
)
def test_a_message_that_the_template_writes_before_the_answer(source: str, role: str) -> None:
    policy, engine, _, _ = make(CHATML, "Paris", chat_template=source)
    row = policy(ragged(history=[[{"role": "user", "content": "Where?"}]]))[0]
    row["history"] = ChatHistory(prompt=row["history"].full.append(History(role, "Be brief."), inplace=False))
    with pytest.raises(ChatTemplateError, match=rf"the {role}'s message 2 before the message 1, .*use chat='render'"):
        policy(lazy_stack([row]))
    assert len(engine.requests) == 1


def test_variables_that_change_the_beginning_are_said_once() -> None:
    """Tools that come with the second turn are in no prompt: the first turn's ids stay."""
    source = "{% if tools %}Tools: {{ tools }}\n{% endif %}" + CHATML.source
    policy, engine, tokenizer, _ = make(CHATML, "Paris", chat_template=source)
    out = policy(ragged(history=[[{"role": "user", "content": "Where?"}]]))
    out["history"] = ChatHistory(prompt=out["history"].full, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(out.copy())
    tools = {"tools": [{"type": "function", "function": {"name": "map"}}]}
    with pytest.warns(UserWarning, match=r"row 0: chat='append' keeps the beginning.*<\|im_start.*with .Tools: "):
        policy(out.copy(), chat_template_kwargs=tools)
    assert "Tools" not in tokenizer.decode(sent(engine)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(out.copy(), chat_template_kwargs=tools)


def test_a_chat_without_new_messages_goes_on() -> None:
    policy, engine, tokenizer, response = make(CHATML)
    out = policy(ragged(history=[[{"role": "user", "content": "Hi"}]]))
    out["history"] = ChatHistory(prompt=out["history"].full, batch_size=1)
    policy(out)
    assert sent(engine)[1][: len(sent(engine)[0]) + len(response)] == sent(engine)[0] + response
    assert tokenizer.decode(sent(engine)[1]).endswith("Paris<|im_end|>\n<|im_start|>assistant\n")


def test_another_chat_in_the_same_row_is_rendered_whole() -> None:
    policy, engine, tokenizer, _ = make(CHATML, prefer_tokens="strict")
    td = turns_of(policy, 2)[-1]
    td["history"] = ChatHistory(prompt=ragged(history=[[{"role": "user", "content": "Hi"}]] * 2)["history"].prompt)
    policy(td)
    assert tokenizer.decode(sent(engine)[-1]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert td["masks"].all_assistant_mask[0].tolist() == [False] * len(sent(engine)[-1]) + [True] * 6


def edited(td: TensorDictBase, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> TensorDictBase:
    """Return the input of the next turn, with the chats changed."""
    rows = []
    for row in td.unbind(0):
        full = row["history"].full
        chat = [{"role": role, "content": content} for role, content in zip(full.role, full.content, strict=True)]
        history = ragged(history=[change(chat)])["history"].prompt[0]
        rows.append(row.copy().set("history", ChatHistory(prompt=history, batch_size=())))
    return lazy_stack(rows)


@pytest.mark.parametrize("options", [{"chat": "append"}, {"chat": "render", "prefer_tokens": True}])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda chat: [chat[0], {**chat[1], "content": "Rome"}], "message 1 is not the answer that was sampled"),
        (lambda chat: [*chat[:2], {"role": "user", "content": "No!"}], "the chat goes on otherwise at message 2"),
        (lambda chat: chat[:2], "the chat goes on otherwise at message 2"),
    ],
)
def test_answers_that_were_changed_are_said(options: dict[str, Any], change: Callable[[Any], Any], words: str) -> None:
    policy, engine, _, _ = make(CHATML, **options)
    td = edited(turns_of(policy, 2)[-1], change)
    count = len(engine.requests)
    with pytest.raises(ChatTemplateError, match=rf"row 0.*{words}"):
        policy.get_new_version(prefer_tokens="strict")(td.copy())
    assert len(engine.requests) == count
    with pytest.warns(UserWarning, match=words):
        policy(td.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(td.copy())


@pytest.mark.parametrize(
    "options",
    [
        {"chat": "append"},
        {"chat": "render", "prefer_tokens": True},
        {"chat": "render", "prefer_tokens": True, "masks_key": None},
    ],
)
def test_ids_that_a_scoring_call_wrote_are_not_taken_for_sampled_ones(options: dict[str, Any]) -> None:
    """A call that scores in place writes the tokenizer's own ids, and the log-probs of all of them."""
    policy, engine, tokenizer, _ = make(CHATML, **options)
    out = policy.get_new_version(generate=False)(policy(ragged(history=[[ASKED]])))
    td = edited(out, lambda chat: [*chat, {"role": "user", "content": "Why?"}])
    with pytest.raises(ChatTemplateError, match=r"row 0.*the ids at 'tokens' are not those of its last turn"):
        policy.get_new_version(prefer_tokens="strict")(td.copy())
    with pytest.warns(UserWarning, match="another policy, or a call that scores, wrote in the row"):
        out = policy(td)
    text = tokenizer.apply_chat_template(chat_of(td[0]), tokenize=False, add_generation_prompt=True)
    assert sent(engine)[-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
    if "masks_key" not in options:
        assert out[0]["log_probs"].full.isnan().equal(~out[0]["masks"].all_assistant_mask), "no scored log-prob is left"


@pytest.mark.parametrize("padded", [False, True])
def test_log_probs_that_a_scoring_call_wrote_are_not_taken_for_sampled_ones(padded: bool) -> None:
    """Scored as ids, the sampled tokens stay, and beside them stand log-probs of the prompt and of another policy."""
    policy, engine, _, _ = make(CHATML, pad_output=padded)
    first = policy(ragged(history=[[ASKED]]))
    ids = real(first[0], "tokens").tolist()
    scored = policy.get_new_version(generate=False, input_mode="tokens", chat="render")(first)
    assert real(scored[0], "log_probs").isfinite().all()
    row = policy(edited(scored, lambda chat: [*chat, {"role": "user", "content": "Why?"}]))[0]
    assert sent(engine)[-1][: len(ids)] == ids
    assert real(row, "log_probs")[: len(ids)].isnan().all(), "no scored log-prob is left"
    assert row["log_probs"].response.isfinite().sum() == len(row["tokens"].response)


@pytest.mark.parametrize("key", ["masks", "log_probs", "tokens"])
def test_a_tensor_of_the_users_where_the_last_turn_was(key: str) -> None:
    policy, engine, _, _ = make(CHATML)
    td = edited(policy(ragged(history=[[ASKED]])), lambda chat: [*chat, {"role": "user", "content": "Why?"}])
    row = td[0].exclude(key).set(key, torch.zeros(3))
    with pytest.raises(
        InputTypeError, match=rf"(?s)row 0, .*\('{key}', '\w+'\) cannot be read.*for prefer_tokens or chat"
    ):
        policy(lazy_stack([row]))
    assert len(engine.requests) == 1


def test_two_policies_take_turns_in_one_row() -> None:
    """Each has keys of its own: neither leaves out what the other said."""

    def own(name: str, answer: str) -> tuple[SGLangHiddenWrapper, RecordingEngine, PreTrainedTokenizerBase]:
        leaves = ("tokens", "masks", "log_probs", "text")
        return make(CHATML, answer, **{f"{leaf}_key": f"{leaf}_{name}" for leaf in leaves})[:3]

    (first, engine, tokenizer), (second, _, _) = own("a", "Paris"), own("b", "Rome")
    td = first(ragged(history=[[ASKED]]))
    with pytest.warns(UserWarning, match="the tokens of its turns are not in the row, at 'tokens_b'"):
        td = second(edited(td, lambda chat: [*chat, {"role": "user", "content": "And you?"}]))
    td = edited(td, lambda chat: [*chat, {"role": "user", "content": "And now?"}])
    with pytest.warns(UserWarning, match="the ids at 'tokens_a' are not those of its last turn"):
        first(td)
    text = tokenizer.apply_chat_template(chat_of(td[0]), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(sent(engine)[-1]) == text
    assert all(word in text for word in ("Paris", "And you?", "Rome", "And now?"))


@pytest.mark.parametrize("masks_key", ["masks", None])
def test_a_response_that_ends_with_the_pad_id_is_known_among_pads(masks_key: str | None) -> None:
    options = {"chat": "render", "prefer_tokens": "strict", "pad_output": True, "masks_key": masks_key}
    answers = [byte_by_byte(answer, zoo_tokenizer(CHATML)) for answer in ("a", "Paris")]

    def respond(ids: Sequence[int]) -> list[int]:
        return [*answers[len(ids) < 24], policy.padding_value]

    policy, engine, tokenizer, _ = make(CHATML, respond=respond, **options)
    assert policy.padding_value == tokenizer.eos_token_id
    before = turns_of(policy, 2)[0]
    for place, row in enumerate(before.unbind(0)):
        whole = sent(engine)[place] + respond(sent(engine)[place])
        assert len(whole) < len(row["tokens"].full), "padded: on the right, and on the left"
        assert sent(engine)[2 + place][: len(whole)] == whole


@pytest.mark.parametrize("answer", ["Paris", " Paris\n", "<think>\nhm\n</think>\n\nParis"])
@variants
def test_spans_of_messages_are_right_or_refused(template: ZooTemplate, answer: str) -> None:
    policy, engine, tokenizer, _ = make(template, answer)
    env = ChatEnv(batch_size=(1,)).append_transform(UserAsksOn(["Why?"]))
    td = env.reset(TensorDict(query=["Where is the user?"], batch_size=1))
    td = env.step_mdp(env.step(policy(td)))
    for span, expected in ((Turn(1), [answer]), (Role("user"), ["Where is the user?", "Why?"])):
        reader = policy.get_new_version(hidden=HiddenSpec(("prompt",), spans={"it": span}), inplace=False)
        refused = ""
        try:
            reader(td)
        except InputError as error:
            refused = str(error)
        if refused:
            assert template.rewrites, refused
            assert isinstance(span, Role), refused
            assert "row 0, span 'it'" in refused
        else:
            request = engine.requests[-1]
            found = [tokenizer.decode(list(request.prompt_ids[a:b])) for a, b in request.spans["it"].intervals]
            assert found == expected


def test_what_was_sampled_survives_a_log_prob_that_is_not_there() -> None:
    policy, _, _, response = make(CHATML, return_log_probs=False)
    for turn, out in enumerate(turns_of(policy, 2)):
        assert int(out[0]["masks"].all_assistant_mask.sum()) == (turn + 1) * len(response)
        assert "log_probs" not in out.keys()  # noqa: SIM118


def test_what_append_needs() -> None:
    for key in ("tokens_key", "masks_key"):
        with pytest.raises(InputError, match=rf"chat='append' reads the turns before.*{key}=None"):
            make(CHATML, **{key: None})
    with pytest.raises(InputError, match="chat='grow': expected one of"):
        make(CHATML, chat="grow")
    with pytest.raises(InputError, match="prefer_tokens='maybe': expected True, False or 'strict'"):
        make(CHATML, prefer_tokens="maybe")
    policy, _, _, _ = make(CHATML)
    td = turns_of(policy, 1)[0]
    td = edited(td, lambda chat: [*chat, {"role": "user", "content": "Why?"}])
    for row in td.unbind(0):
        row["masks"] = row["masks"].empty()
    with pytest.raises(InputError, match=r"row 0.*which tokens were sampled at 'masks'"):
        policy(td)


# --- prefer_tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer])
@variants
def test_prefer_tokens_keeps_what_was_sampled_or_says_so(template: ZooTemplate, answer: str, incremental: bool) -> None:
    policy, engine, tokenizer, response = make(template, answer, chat="render", prefer_tokens=True, pad_output=True)
    transforms = [IncrementalTokenizer(tokenizer, chat_template=template.source)] if incremental else []
    if template is DATE and incremental:
        return  # torchrl's transform has no way in for a template's variables
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = turns_of(policy, 3, *transforms)
    said = [str(warning.message) for warning in caught if "said once" in str(warning.message)]
    kept = all(
        sent(engine)[2 * turn + place][: len(sent(engine)[2 * turn - 2 + place]) + len(response)]
        == sent(engine)[2 * turn - 2 + place] + response
        for turn in (1, 2)
        for place in (0, 1)
    )
    assert len(said) == (not kept)
    assert template.rewrites or kept
    for out in outputs:
        row = out[0]
        variables = {"date_string": "1 Jan"} if template is DATE else {}
        text = tokenizer.apply_chat_template(chat_of(row), tokenize=False, add_generation_prompt=True, **variables)
        assert row["text"].prompt == text
        assert int(row["masks"].all_assistant_mask.sum()) == len(response)
    strict, engine, _, _ = make(template, answer, chat="render", prefer_tokens="strict", pad_output=True)
    if kept:
        turns_of(strict, 3)
    else:
        with pytest.raises(ChatTemplateError, match=r"row 0, prefer_tokens='strict'.*chat='append'"):
            turns_of(strict, 3)


def test_the_warning_says_where_the_texts_part() -> None:
    policy, _, _, _ = make(R1, "hm\n</think>\n\nParis", chat="render", prefer_tokens=True)
    with pytest.warns(UserWarning, match=r"behind '.*<\|Assistant\|>' they go on with '<think>.*with '\\n\\nParis"):
        turns_of(policy, 2)


# --- prefill ----------------------------------------------------------------------------------------------------------

PREFILL = {"role": "assistant", "content": "The capital is ", "is_complete": False}
ASKED = {"role": "user", "content": "Capital?"}


@pytest.mark.parametrize("chat", ["render", "append"])
@variants
def test_a_message_that_is_not_complete_is_gone_on_from(template: ZooTemplate, chat: str) -> None:
    policy, engine, tokenizer, response = make(template, chat=chat)
    out = policy(ragged(history=[[ASKED, PREFILL], [ASKED]]))
    text, other = (tokenizer.decode(ids) for ids in sent(engine))
    # The template's own header may differ from its generation prompt: R1's opens a thought.
    assert text.endswith("The capital is ")
    assert template is QWEN3 or template is R1 or text == other + "The capital is "
    assert template.end not in text.removesuffix("The capital is ").split("Capital?")[1].lstrip(template.end)
    row = out[0]
    assert row["history"].full.content == ["Capital?", "The capital is Paris"]
    assert row["history"].full.is_complete == [True, True]
    assert row["history"].response.content == ["Paris"]
    assert row["text"].full == text + "Paris"
    assert row["masks"].all_assistant_mask.nonzero().flatten().tolist() == list(
        range(len(row["tokens"].prompt), len(row["tokens"].full))
    )
    # The next turn follows both halves.
    td = edited(out, lambda messages: [*messages, {"role": "user", "content": "Why?"}])
    policy(td)
    if chat == "append":
        before = [*sent(engine)[0], *response]
        assert sent(engine)[2][: len(before)] == before
        assert (
            tokenizer.decode(sent(engine)[2][len(before) :])
            == behind(template, chat_of(td[0]), tokenizer)[len(template.end) :]
        )


def test_an_answer_that_was_cut_is_gone_on_from() -> None:
    policy, engine, tokenizer, _ = make(
        CHATML, respond=lambda ids: byte_by_byte("Par", zoo_tokenizer(CHATML)), generate_kwargs={"max_new_tokens": 3}
    )
    td = edited(policy(ragged(history=[[ASKED]])), lambda chat: [chat[0], {**chat[1], "is_complete": False}])
    out = policy(td)
    assert sent(engine)[1] == sent(engine)[0] + byte_by_byte("Par", tokenizer)
    assert out[0]["history"].full.content == ["Capital?", "ParPar"]
    assert int(out[0]["masks"].all_assistant_mask.sum()) == 6
    td = edited(out, lambda chat: [*chat, {"role": "user", "content": "Why?"}])
    policy(td)
    assert sent(engine)[2][: len(sent(engine)[1]) + 3] == sent(engine)[1] + byte_by_byte("Par", tokenizer)


@variants
def test_scoring_goes_on_from_it_too(template: ZooTemplate) -> None:
    policy, engine, tokenizer, _ = make(template, generate=False)
    out = policy(ragged(history=[[ASKED, PREFILL]], full=True))
    text = tokenizer.decode(sent(engine)[0])
    assert text.endswith("The capital is ")
    marked = torch.tensor(sent(engine)[0])[out["masks"].all_assistant_mask[0]]
    assert tokenizer.decode(marked) == "The capital is "


@pytest.mark.parametrize("content", [None, 3])
def test_nothing_to_go_on_from(content: Any) -> None:
    policy, engine, _, _ = make(TOOLS)
    message = {**PREFILL, "content": content, "tool_calls": [{"name": "f", "arguments": {}}]}
    td = ragged(history=[[ASKED, {**message, "content": "x"}]])
    td[0]["history"].prompt[1].content = content
    with pytest.raises(ChatTemplateError, match=r"row 0.*message 1, the assistant's, has is_complete=False"):
        policy(td)
    assert engine.requests == []


def test_a_template_that_leaves_the_last_message_out() -> None:
    policy, engine, _, _ = make(CHATML, chat_template="{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match=r"row 0.*leaves out message 1, the assistant's"):
        policy(ragged(history=[[ASKED, PREFILL]]))
    assert engine.requests == []
