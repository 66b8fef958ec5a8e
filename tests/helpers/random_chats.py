"""Random chats and answers over the tokenizers and templates of the two zoos, and an engine that records them.

`Case` is one tokenizer with one template. What hypothesis draws is plain, strings and numbers, so that a failure
shrinks to a chat that a person can read.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from hypothesis import strategies as st
from tensordict import TensorDictBase, lazy_stack
from tokenizers import AddedToken
from torchrl.data.llm import History
from transformers import PreTrainedTokenizerBase

from helpers import templates_zoo, tokenizers_zoo
from helpers.fake_engine import RecordingEngine, log_prob_of
from helpers.templates_zoo import ZooTemplate
from torchrl_sglang_hidden import ChatTemplateError, InputError, SGLangHiddenWrapper, ragged
from torchrl_sglang_hidden.records import Completion, Request

__all__ = [
    "CASES", "MODES", "Answer", "Case", "EchoEngine", "Talk", "Talking", "answers", "asked_on", "chats", "check_text",
    "messages_of", "spoken", "texts", "wild_chats", "writes",
]  # fmt: skip

Message = dict[str, Any]

# Private-use characters, which no piece has: where an oracle's template puts a message's words.
OPEN, CLOSE = "\ue000", "\ue001"

PIECES = (
    "yes", "The capital", " of France", "is it?", "hello, ", "10", "1", "0", "2024", "ab", "the",
    "🤖", "🇫🇷", "👨‍👩‍👧", "e\u0301", "日本語", "한국", "العربية", "ﬁ", "ß",
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "▁",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "</s>", "<s>", "<unk>", "[INST]", "[/INST]",
    "<|eot_id|>", "<end_of_turn>", "<|User|>", "[CLS]", "##ing", "<", "|>",
    "{{ x }}", "{% if %}", "{% generation %}", "'", '"', "\\", "\x00", "\ufffd",
)  # fmt: skip
# Each stands for a piece: a string of them is drawn at once, and a list of pieces in two draws for each.
PIECE_OF = {chr(0xE100 + index): piece for index, piece in enumerate(PIECES)}


@functools.cache
def texts(max_size: int = 5) -> st.SearchStrategy[str]:
    """Return texts of pieces that are known to break code, and now and then of any characters at all."""
    of_pieces = st.text("".join(PIECE_OF), max_size=max_size).map(lambda s: "".join(PIECE_OF[sign] for sign in s))
    any_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=OPEN + CLOSE), max_size=4)
    return st.one_of(of_pieces, of_pieces, of_pieces, any_text)


@dataclass(frozen=True)
class Answer:
    """What an engine samples.

    Args:
        text: cut into tokens as the tokenizer does, ...
        ids: ... with these behind it, each modulo the size of the vocabulary.
        end: "eos", the template's end of a turn ("end"), or nothing.
        spelled: cuts the tokens of the text into letters, where the vocabulary has them, as no tokenizer does.
    """

    text: str
    ids: tuple[int, ...]
    end: str
    spelled: bool = False


@functools.cache
def answers() -> st.SearchStrategy[Answer]:
    thoughts = st.sampled_from(("<think>\nhm\n</think>\n\nParis", "hm\n</think>\n\nParis", "Paris\n", " Paris"))
    raw = st.one_of(st.just(()), st.just(()), st.lists(st.integers(0, 999), max_size=3).map(tuple))
    return st.builds(Answer, st.one_of(texts(), thoughts), raw, st.sampled_from(("eos", "end", "")), st.booleans())


@dataclass(frozen=True)
class Case:
    """One tokenizer with one template.

    Args:
        kind: a key of the tokenizers' zoo.
        template: of the templates' zoo.
        native: whether the tokenizer has the template's special tokens; else it cuts them into pieces.
    """

    kind: str
    template: ZooTemplate
    native: bool

    def __str__(self) -> str:
        return f"{self.kind}-{self.template}-{'native' if self.native else 'foreign'}"

    def keeps(self, text: str) -> bool:
        """Whether the tokenizer gives a text back: SentencePiece reads its own sign for a blank as one."""
        return tokenizers_zoo.ZOO[self.kind].lossless and not ("▁" in text and self.kind.startswith("sentencepiece"))

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = tokenizers_zoo.zoo_tokenizer(self.kind, chat_template=self.template.source)
        if self.native:
            tokens = [token for token in templates_zoo.SPECIAL_TOKENS if token in self.template.source]
            tokens += [token for token in (self.template.bos, self.template.end) if token and token not in tokens]
            known = tokenizer.get_vocab()
            new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
            tokenizer.add_special_tokens({"additional_special_tokens": new})
            roles = {"eos_token": self.template.end, **({"bos_token": self.template.bos} if self.template.bos else {})}
            tokenizer.add_special_tokens(roles)
        return tokenizer

    def make_policy(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[SGLangHiddenWrapper, EchoEngine]:
        """Return a policy over a new engine that records what it gets."""
        engine = EchoEngine(
            tokenizer=tokenizer, vocab_size=len(tokenizer) + 1, context_length=99999, max_prompt_tokens=99000
        )
        if "date_string" in self.template.variables:
            options = {"chat_template_kwargs": {"date_string": "1 Jan"}, **options}
        return SGLangHiddenWrapper(engine, **{"tokenizer": tokenizer, "hidden": None, **options}), engine

    def render(
        self,
        chat: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str | None = None,
        ends: bool = False,
    ) -> str:
        """Return what the template writes for a chat; with ``ends``, and a generation prompt."""
        variables = {"date_string": "1 Jan"} if "date_string" in self.template.variables else {}
        text = tokenizer.apply_chat_template(
            list(chat),
            chat_template=source or self.template.source,
            tokenize=False,
            add_generation_prompt=ends,
            **variables,
        )
        return str(text)

    def sample(self, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids of an answer, one at least."""
        ids = list(tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        if answer.spelled:
            vocab = tokenizer.get_vocab()
            letters = [[vocab.get(letter) for letter in token] for token in tokenizer.convert_ids_to_tokens(ids)]
            ids = [i for own, cut in zip(ids, letters, strict=True) for i in ([own] if None in cut else cut)]
        ids += [token_id % len(tokenizer) for token_id in answer.ids]
        end = tokenizer.eos_token if answer.end == "eos" else self.template.end
        if answer.end and end is not None:
            ids += tokenizer(end, add_special_tokens=False)["input_ids"]
        return ids or [len(tokenizer) - 1]


# Each template with its own special tokens in every tokenizer, and ChatML cut into pieces.
CASES = tuple(
    Case(kind, template, native)
    for kind in tokenizers_zoo.ZOO
    for template in templates_zoo.ZOO
    for native in ((True, False) if template in (templates_zoo.CHATML, templates_zoo.R1) else (True,))
)


# What each template writes for an assistant's words, as it stands in the source.
_WORDS = {
    "chatml": ("message.content",),
    "date": ("message.content",),
    "trim": ("message.content | trim",),
    "llama3": ("message['content'] | trim",),
    "gemma": ("message['content'] | trim",),
    "mistral": ("message['content'] + eos_token",),
    "qwen3": ("'<think>\n' + thought + '\n</think>\n\n' + content", "{{- content }}"),
    "r1": ("message['content'].split('</think>')[-1]",),
    "tools": ("{{- message.content }}",),
}


def oracle_source(template: ZooTemplate) -> str:
    """Return the template with marks around what it writes of the assistant's, and nothing else changed."""
    if template.marks:
        source = template.source.replace("{% generation %}", f"{{{{ '{OPEN}' }}}}")
        return source.replace("{% endgeneration %}", f"{{{{ '{CLOSE}' }}}}")
    source = template.source
    for words in _WORDS[template.name]:
        inner = words.removeprefix("{{- ").removesuffix(" }}").removesuffix(" + eos_token")
        marked = " + ".join((_mark(OPEN), f"({inner})", _mark(CLOSE)))
        assert source.count(words) == 1, (template, words)
        source = source.replace(words, words.replace(inner, f"({marked})"))
    return source


def _mark(mark: str) -> str:
    return f"('{mark}' if message['role'] == 'assistant' else '')"


def spoken(case: Case, chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]] | None:
    """Return where the assistant's words stand in a chat's text; None where the template rewrites them.

    Raises:
        jinja2.TemplateError: the template does not write the chat.
    """
    marked = case.render(chat, tokenizer, source=oracle_source(case.template))
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    if case.template is templates_zoo.TOOLS:
        said = [content for content in said if content]
    ranges = []
    for content in said:
        start = marked.index(OPEN)
        marked = marked.replace(OPEN, "", 1)
        stop = marked.index(CLOSE)
        marked = marked.replace(CLOSE, "", 1)
        words = marked[start:stop]
        if case.template.marks or words.strip() == content.strip():
            ranges.append((start, stop))
        elif words.endswith(content):
            ranges.append((stop - len(content), stop))
        else:
            return None
    return [(start, stop) for start, stop in ranges if start < stop]


@st.composite
def chats(draw: Any, template: ZooTemplate, *, ends_with: str, size: int = 5) -> list[Message]:
    """Draw a chat that a template is made for, with words that it may not be.

    Args:
        template: refuses systems' messages, and messages out of turn, by its fields.
        ends_with: the role of the last message.
        size: the most pieces of one message.
    """
    chat: list[Message] = []
    if template.takes_system and draw(st.booleans()):
        chat.append({"role": "system", "content": draw(texts(size))})
    for _ in range(draw(st.integers(0, 2))):
        chat += [{"role": "user", "content": draw(texts(size))}, {"role": "assistant", "content": draw(texts(size))}]
    chat.append({"role": "user", "content": draw(texts(size))})
    if ends_with == "assistant":
        chat.append({"role": "assistant", "content": draw(texts(size))})
    return chat


@functools.cache
def wild_chats() -> st.SearchStrategy[list[Message]]:
    """Return chats of any order, with messages that no template was made for."""
    content = st.one_of(texts(), st.none(), st.sampled_from(("\ud800", "ok \udc80", "{{ 1 / 0 }}")))
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool", "Юзер", "")), "content": content},
        optional={
            "is_complete": st.booleans(),
            "tool_calls": st.just([{"type": "function", "function": {"name": "f", "arguments": {"x": "🤖"}}}]),
        },
    )
    return st.lists(message, max_size=4)


def messages_of(history: History) -> list[Message]:
    """Return the messages of a chat ``[turns]`` as plain dicts."""
    return [{"role": role, "content": content} for role, content in zip(history.role, history.content, strict=True)]


class EchoEngine(RecordingEngine):
    """A `RecordingEngine` that samples what it is told, in the order of its requests, without states.

    Attributes:
        to_sample: the ids for each request of the next call.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.to_sample: list[list[int]] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Check and record the requests, and answer each."""
        self._check(requests, self._info)
        self.requests += requests
        reading = requests[0].score_prompt
        sampled = [[] for _ in requests] if reading else self.to_sample
        return [self._complete(request, ids) for request, ids in zip(requests, sampled, strict=True)]

    def _complete(self, request: Request, ids: list[int]) -> Completion:
        scored = [log_prob_of(token_id) for token_id in request.prompt_ids]
        return Completion(
            prompt_ids=request.prompt_ids,
            response_ids=tuple(ids),
            text=self._text(ids) if ids else "",
            log_probs_T=torch.tensor([log_prob_of(token_id) for token_id in ids]),
            hidden={},
            finish_reason="stop",
            weight_version="v7",
            prompt_log_probs_P=torch.tensor(scored) if request.score_prompt else None,
        )


# --- what is checked of a turn ---------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "render": {},
    "prefer": {"prefer_tokens": True},
    "strict": {"prefer_tokens": "strict"},
    "append": {"chat": "append"},
}


@dataclass
class Talk:
    """One chat as it goes on.

    Args:
        row: the policy's input for the next turn.
        to_come: the answers of the next turns, each with the question behind it.
        ids: prompt and response of the turn before; empty before the first.
        sampled: which of these the policy sampled.
    """

    row: TensorDictBase
    to_come: list[tuple[Answer, str]]
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Talking:
    """A case in one mode."""

    case: Case
    tokenizer: PreTrainedTokenizerBase
    mode: str
    padded: bool

    def turn(self, talks: list[Talk]) -> list[Talk]:
        """Take one turn of all talks at once, and return those that go on; if one is refused, each by itself."""
        policy, engine = self.case.make_policy(
            self.tokenizer, pad_output=self.padded, inplace=False, **MODES[self.mode]
        )
        engine.to_sample = [self.case.sample(talk.to_come[0][0], self.tokenizer) for talk in talks]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refusal: InputError | None = None
            try:
                out = policy(lazy_stack([talk.row for talk in talks]))
            except InputError as error:
                refusal = error
        if refusal is not None:
            assert not engine.requests, "nothing is sent of a call that is refused"
            if len(talks) > 1:
                return [going for talk in talks for going in self.turn([talk])]
            assert "row 0" in str(refusal)
            assert self.may_refuse(talks[0], refusal), refusal
            return []
        sent = [list(request.prompt_ids) for request in engine.requests]
        kept = all(prompt[: len(talk.ids)] == talk.ids for prompt, talk in zip(sent, talks, strict=True))
        assert kept or self.mode in ("render", "prefer")
        said = [str(warning.message) for warning in caught]
        assert len(said) == (not kept and self.mode == "prefer"), said
        going = []
        for talk, row, prompt, response in zip(talks, out.unbind(0), sent, engine.to_sample, strict=True):
            self.check(talk, row, prompt, response)
            real = row["masks"].all_attention_mask
            (_, question), *to_come = talk.to_come
            sampled = row["masks"].all_assistant_mask[real].tolist()
            if to_come:
                going.append(Talk(asked_on(row, question), to_come, prompt + response, sampled))
        return going

    def may_refuse(self, talk: Talk, error: InputError) -> bool:
        """Whether a chat is one that this mode cannot serve."""
        chat = messages_of(talk.row["history"].prompt)
        if not writes(self.case, chat, self.tokenizer):
            return isinstance(error, ChatTemplateError)
        if self.mode == "strict":
            return bool(talk.ids) and isinstance(error, ChatTemplateError)
        # A tokenizer may write what follows otherwise behind other text.
        keeps = self.case.keeps(self.case.render(chat, self.tokenizer, ends=True))
        return self.mode == "append" and bool(talk.ids) and not keeps and "chat='append'" in str(error)

    def check(self, talk: Talk, row: TensorDictBase, prompt: list[int], response: list[int]) -> None:
        """Check what one turn wrote."""
        real = row["masks"].all_attention_mask
        assert row["tokens"].full[real].tolist() == prompt + response
        before = talk.sampled if self.mode == "append" else []
        expected = [*before, *[False] * (len(prompt) - len(before)), *[True] * len(response)]
        assert row["masks"].all_assistant_mask[real].tolist() == expected
        measured = ~row["log_probs"].full[real].isnan()
        assert measured.tolist() == expected
        text, chat = row["text"].prompt, messages_of(row["history"].prompt)
        if self.mode == "append" and talk.ids:
            assert text == self.tokenizer.decode(prompt)
        else:
            assert text == self.case.render(chat, self.tokenizer, ends=True)
            if prompt != self.tokenizer(text, add_special_tokens=False)["input_ids"]:
                assert self.mode in ("prefer", "strict")
                # What a tokenizer with losses writes of the text, not the text itself.
                own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert self.tokenizer.decode(prompt) == self.tokenizer.decode(own)
            elif self.case.keeps(text):
                check_text(self.tokenizer, prompt, text)
        answer = self.tokenizer.decode(response, skip_special_tokens=True)
        assert row["text"].response == answer
        assert messages_of(row["history"].full) == [*chat, {"role": "assistant", "content": answer}]


def asked_on(row: TensorDictBase, question: str) -> TensorDictBase:
    """Return the input of the next turn: what the turn before wrote, and a new question."""
    chat = [*messages_of(row["history"].full), {"role": "user", "content": question}]
    return row.set("history", ragged(history=[chat])[0]["history"])


def writes(case: Case, chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        case.render(chat, tokenizer)
    except jinja2.TemplateError:
        return False
    return True


def check_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> None:
    """Check that ids of a tokenizer without losses decode to a text; some write a blank before it, and take it away."""
    assert tokenizer.decode(list(ids)) in (text, text.removeprefix(" "))
