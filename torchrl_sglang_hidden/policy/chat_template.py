"""Rendering chats: which template, with which variables, and what is said where it cannot write a chat.

Knows nothing of TensorDict keys or token ids. One `ChatTemplate` renders every chat of a call, so that all of them have
one clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any

from torchrl.data.llm import History
from torchrl.data.llm.history import _CHAT_TEMPLATES as NAMED_TEMPLATES

from torchrl_sglang_hidden.errors import ChatTemplateError, InputError, InputTypeError
from torchrl_sglang_hidden.sglang_api.prompt_text import check_no_placeholder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatTemplate",
    "Message",
    "RenderedChat",
    "goes_on",
    "messages_of",
    "read_variables",
    "select_template",
    "unused_number",
    "with_more_text",
]

Message = Mapping[str, Any]

NO_MESSAGE = "<none>"  # the role of what fills a chat up to the length of others; torchrl does not render it
# A tag around what the assistant wrote.
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# What a template gets from elsewhere, and from where.
RESERVED = {
    "messages": "the chat is read from the TensorDict",
    "add_generation_prompt": "generate=True writes one, generate=False none",
    "continue_final_message": "an assistant's last message with is_complete=False is continued",
    "chat_template": "use the argument chat_template, or chat_template_name",
    "conversations": "the chat is read from the TensorDict",
    "return_assistant_tokens_mask": "masks.all_assistant_mask has it",
}
# What a message may hold beside its text. A template that does not read it would leave it out without a word.
BESIDE_TEXT = ("tool_calls", "tool_responses")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The text of a chat.

    Args:
        text: what the template wrote.
        generated: half-open ranges of characters inside ``{% generation %}``; None where the template has no such tag.
    """

    text: str
    generated: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, its variables, and the time that it writes.

    Args:
        tokenizer: its special tokens are variables too, such as ``bos_token``.
        source: the template.
        variables: others, such as ``tools`` and ``enable_thinking``.
        now: what ``strftime_now`` says.

    Raises:
        ChatTemplateError: no Jinja, a template that reads no messages, or a variable that it does not read.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        """Refuse a source that writes no chat, and variables without an effect: a slip of the pen would not be seen."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            _compile_jinja_template(self.source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template {self.source!r:.80} cannot be read: TemplateSyntaxError: {error}; mend it, or give "
                "a chat_template that can"
            ) from error
        if "{" not in self.source or not self._reads("messages"):
            raise ChatTemplateError(
                f"the chat template {self.source!r:.80} reads no messages, so that every chat would become the same "
                "text; give the Jinja template itself, not its path; a name goes into chat_template_name"
            )
        unread = [name for name in self.variables if not self._reads(name)]
        if unread:
            raise ChatTemplateError(
                f"chat_template_kwargs has {unread}, which the chat template does not read, {self.source!r:.80}; leave "
                "out what it does not read, or give a chat_template that does"
            )

    @property
    def marks_assistant(self) -> bool:
        """Whether the template says itself which text is the assistant's, with ``{% generation %}``."""
        return GENERATION.search(COMMENT.sub("", self.source)) is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> RenderedChat:
        """Render a chat; one that `goes_on` ends with the text of its last message, without a generation prompt.

        Raises:
            ChatTemplateError: the template raises, or would leave a part of a message out without a word.
        """
        for turn, message in enumerate(messages):
            self._check_message(turn, message)
        mark = None
        if goes_on(messages):
            mark = unused_number(f"{messages}{self.source}")
            if not isinstance(messages[-1].get("content"), str):
                raise ChatTemplateError(
                    f"{_name(len(messages) - 1, messages[-1])} has is_complete=False and a content of "
                    f"{messages[-1].get('content')!r:.60}; give the text to go on from as one string"
                )
            messages = [*messages[:-1], with_more_text(messages[-1], mark)]
        try:
            rendered = self._write(messages, add_generation_prompt=add_generation_prompt and mark is None)
        except _foreign_errors() as error:
            raise ChatTemplateError(
                f"the chat template cannot write {self._culprit(messages)}: {type(error).__name__}: {error}; "
                "change the message, or give a chat_template that takes it"
            ) from error
        for turn, message in enumerate(messages):
            content = message.get("content")
            # What `{{ message.content }}` makes of a list.
            if isinstance(content, list) and str(content) in rendered.text:
                raise ChatTemplateError(
                    f"the chat template writes {_name(turn, message)} as Python's list of its parts, {content!r:.60}; "
                    "give the text as one string, or a chat_template that takes parts"
                )
        return rendered if mark is None else _cut(rendered, mark, messages)

    def _reads(self, name: str) -> bool:
        # A word of the template's text is taken for a variable too: what matters is that a slip of the pen is found.
        return re.search(rf"(?<![\w.]){re.escape(name)}\b", COMMENT.sub("", self.source)) is not None

    def _check_message(self, turn: int, message: Message) -> None:
        """Refuse texts that stand for a medium, and what the template would leave out: tool calls it never reads."""
        content = message.get("content")
        if isinstance(content, str):
            check_no_placeholder(_name(turn, message), content, self.tokenizer)
        for part in content if isinstance(content, list) else ():
            check_no_placeholder(_name(turn, message), str(part.get("text") or ""), self.tokenizer)
        for name in BESIDE_TEXT:
            value = message.get(name)
            said = content and (name != "tool_calls" or all(_function(call) in str(content) for call in value or ()))
            if value and not said and name not in COMMENT.sub("", self.source):
                raise ChatTemplateError(
                    f"{_name(turn, message)} has {name}{'' if content else ' and no text'}, and the chat template does "
                    f"not read {name}; give a chat_template that does, or the text of them as content"
                )

    def _write(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> RenderedChat:
        # Here and not above: transformers takes longer to import than the rest of this package together.
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, "strftime_now": self.now.strftime, **self.variables}
        (text,), ranges = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=self.marks_assistant,
            **variables,
        )
        return RenderedChat(text, tuple(ranges[0]) if self.marks_assistant else None)

    def _culprit(self, messages: Sequence[Message]) -> str:
        """Name what the template cannot write: the last message of the shortest beginning of the chat that fails."""
        for length in range(1, len(messages) + 1):
            try:
                self._write(messages[:length], add_generation_prompt=False)
            except _foreign_errors():
                return f"{_name(length - 1, messages[length - 1])} {str(messages[length - 1].get('content'))[:40]!r}"
        return "the generation prompt"


def messages_of(history: History) -> list[dict[str, Any]]:
    """Return the messages of one chat, ``[turns]``, as templates read them, without those that fill it up."""
    messages = [message for message in history.view(-1).tolist(tolist_first=True) if message.get("role") != NO_MESSAGE]
    for message in messages:
        if isinstance(message.get("content"), dict):  # torchrl's form of a single part
            message["content"] = [message["content"]]
    return messages


def goes_on(messages: Sequence[Message]) -> bool:
    """Whether the response continues the last message: one of the assistant's that says ``is_complete=False``."""
    return bool(messages) and messages[-1].get("role") == "assistant" and messages[-1].get("is_complete") is False


def with_more_text(message: Message, text: str) -> dict[str, Any]:
    """Return a message whose text goes on with more."""
    return {**message, "content": message["content"] + text}


def unused_number(text: str) -> str:
    """Return a number of 16 digits or more that is not in the text, to mark a place in it."""
    return next(number for number in map(str, count(10**15)) if number not in text)


def select_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, chat_template_name: str | None, *, tools: bool
) -> str:
    """Return the template that the arguments name, or the tokenizer's own.

    A name is one of the tokenizer's templates, where it has several, or one of torchrl's. Of several the default is
    the one for tools, ``"tool_use"``, where there are tools, else ``"default"``: Hugging Face's rule.

    Raises:
        ChatTemplateError: there is none, none of this name, or several without a default. None is ever guessed from the
            tokenizer's path.
    """
    own = tokenizer.chat_template
    templates: Mapping[str, str] = own if isinstance(own, Mapping) else {}
    if chat_template is not None:
        return chat_template
    if chat_template_name is not None:
        found = {**NAMED_TEMPLATES, **templates}.get(chat_template_name)
        if found is None:
            of_tokenizer = f"the tokenizer's {sorted(templates)}, or torchrl's " if templates else ""
            raise ChatTemplateError(
                f"chat_template_name={chat_template_name!r}: expected one of {of_tokenizer}{sorted(NAMED_TEMPLATES)}; "
                "or give chat_template"
            )
        return str(found)
    if isinstance(own, str):
        return own
    for name in ("tool_use", "default") if tools else ("default",):
        if name in templates:
            return str(templates[name])
    if templates:
        raise ChatTemplateError(
            f"the tokenizer {tokenizer.name_or_path!r} has the chat templates {sorted(templates)}, and none is its "
            "default; choose one with chat_template_name="
        )
    raise ChatTemplateError(
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template, as base models have none; give "
        f"chat_template=, a Jinja template, or chat_template_name=, one of {sorted(NAMED_TEMPLATES)}; or use "
        "input_mode='text'"
    )


def read_variables(name: str, variables: Any) -> dict[str, Any]:
    """Return the template variables that ``name`` holds, as a dict of the caller's own.

    Raises:
        InputTypeError: no mapping with names as keys.
        InputError: a variable that has its value from elsewhere.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
        raise InputTypeError(
            f"{name}={variables!r:.80}: expected a dict of the chat template's variables, such as "
            "{'enable_thinking': False}"
        )
    for key in variables:
        if key in RESERVED:
            raise InputError(f"{name} has {key!r}, which is no variable here: {RESERVED[key]}; leave it out")
    return dict(variables)


def _function(call: Any) -> str:
    """Return which function a tool call names; nothing where it has another form."""
    named = call.get("function", call) if isinstance(call, Mapping) else None
    return str(named.get("name", "")) if isinstance(named, Mapping) else ""


def _name(turn: int, message: Message) -> str:
    return f"message {turn}, the {message.get('role')}'s,"


def _cut(rendered: RenderedChat, mark: str, messages: Sequence[Message]) -> RenderedChat:
    """Cut a chat before a mark at the end of its last message."""
    stop = rendered.text.rfind(mark)
    if stop < 0:
        raise ChatTemplateError(
            f"the chat template leaves out {_name(len(messages) - 1, messages[-1])} which has is_complete=False, so "
            "that it cannot be gone on from; give a chat_template that writes it"
        )
    ranges = rendered.generated
    if ranges is not None:
        ranges = tuple((start, min(end, stop)) for start, end in ranges if start < stop)
    return RenderedChat(rendered.text[:stop], ranges)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Return what a template, which is code of the user's, and the reading of its tools can raise."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    own = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    return (TemplateError, DocstringParsingException, TypeHintParsingException, *own)
