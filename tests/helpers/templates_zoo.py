"""Chat templates of every kind that people bring, as strings, and a tokenizer for them.

    @pytest.mark.parametrize("template", ZOO, ids=str)
    def test_it(template: ZooTemplate) -> None:
        tokenizer = zoo_tokenizer(template)
        policy, engine = make("history", tokenizer=tokenizer)

Each is written after the template of a real family, shortened to what is particular about it. What a template does to a
chat stands beside it, so that a test can say what must come out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.byte_tokenizers import byte_characters


@dataclass(frozen=True)
class ZooTemplate:
    """A chat template, and what it does.

    Args:
        name: of the family that it is written after.
        source: the Jinja template.
        header: what a generation prompt ends with.
        end: what it writes after an assistant's words; the tokenizer's EOS.
        bos: what it begins every chat with, or an empty string.
        takes_system: whether a system's message may stand first.
        alternates: whether it refuses two messages of one role in a row.
        marks: whether it has ``{% generation %}``.
        rewrites: whether it may write an assistant's message otherwise than it was sampled: without its thoughts, or
            without blanks around it.
        variables: the variables it reads, beside the chat.
    """

    name: str
    source: str
    header: str
    end: str
    bos: str = ""
    takes_system: bool = True
    alternates: bool = False
    marks: bool = False
    rewrites: bool = False
    variables: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


CHATML = ZooTemplate(
    "chatml",
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
)

# Begins with BOS, and strips the blanks around every message.
LLAMA3 = ZooTemplate(
    "llama3",
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    bos="<|begin_of_text|>",
    rewrites=True,
)

# Refuses a system's message, and messages out of turn; calls the assistant "model".
GEMMA = ZooTemplate(
    "gemma",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    header="<start_of_turn>model\n",
    end="<end_of_turn>",
    bos="<bos>",
    takes_system=False,
    alternates=True,
    rewrites=True,
)

# Writes the system's words into the last question, and no header before an answer.
MISTRAL = ZooTemplate(
    "mistral",
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}"
    "{%- endif %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}",
    header="[/INST]",
    end="</s>",
    bos="<s>",
    alternates=True,
)

# Leaves out the thoughts of answers before the last question, and writes an empty one with enable_thinking=False.
QWEN3 = ZooTemplate(
    "qwen3",
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}"
    "{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'assistant' %}{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' + content }}{%- else %}{{- content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}{{- '<tool_call>\n' + call | tojson + '\n</tool_call>' }}{%- endfor %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    rewrites=True,
    variables=frozenset({"tools", "enable_thinking"}),
)

# Opens the thought itself, in the generation prompt, and leaves out the thoughts of all answers that are there.
R1 = ZooTemplate(
    "r1",
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{% else %}"
    "{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    header="<|Assistant|><think>\n",
    end="<|end_of_sentence|>",
    bos="<|begin_of_sentence|>",
    rewrites=True,
)

# Writes tools, and what was called, as JSON; as Hermes does.
TOOLS = ZooTemplate(
    "tools",
    "{%- if tools %}{{- '<|im_start|>system\nYou may call: <tools>' }}{%- for tool in tools %}"
    "{{- '\n' + tool | tojson }}"
    "{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'tool' %}"
    "{{- '<tool_response>\n' + message.content + '\n</tool_response>' }}{%- elif message.content %}"
    "{{- message.content }}"
    "{%- endif %}{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call | tojson + '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    variables=frozenset({"tools"}),
)

# Says which text is the assistant's: its words alone, …
GENERATION_TIGHT = ZooTemplate(
    "generation-tight",
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    marks=True,
)

# … or its words and the token that ends its turn.
GENERATION_WIDE = ZooTemplate(
    "generation-wide",
    GENERATION_TIGHT.source.replace("{% endgeneration %}<|im_end|>\n", "<|im_end|>{% endgeneration %}{{ '\n' }}"),
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    marks=True,
)

# Writes the time of day, unless it is told a date.
DATE = ZooTemplate(
    "date",
    "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y %H:%M:%S.%f') %}{%- endif %}"
    "{{- '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + CHATML.source,
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    variables=frozenset({"date_string"}),
)

# ChatML without the blanks around a message.
TRIM = ZooTemplate(
    "trim",
    CHATML.source.replace("{{ message.content }}", "{{ message.content | trim }}"),
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    rewrites=True,
)

ZOO = (CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3, R1, TOOLS, GENERATION_TIGHT, GENERATION_WIDE, DATE, TRIM)

SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>",
    "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|image_pad|>",
)  # fmt: skip


# What the tokenizer joins, so that most texts can be cut into tokens in several ways. "\n\n" is one token, as usual.
MERGES = ("th", "he", "an", "in", "er", "is", "ar", "Par", "Paris", "\n\n")


def zoo_tokenizer(template: ZooTemplate) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with the special tokens and the template of a family.

    Its EOS is what ends the family's turns, and its pad token the same, so that neither may be taken for the other.
    """
    characters = byte_characters()
    written = ["".join(characters[byte] for byte in piece.encode()) for piece in MERGES]
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    merges = []
    for piece in written:
        last = next(
            end for end in range(len(piece) - 1, 0, -1) if piece[:end] in vocabulary and piece[end:] in vocabulary
        )
        merges.append((piece[:last], piece[last:]))
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {
        "eos_token": template.end,
        "pad_token": template.end,
        **({"bos_token": template.bos} if template.bos else {}),
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template.source,
        extra_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        **named,
    )


def byte_by_byte(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text without special tokens cut into bytes, which the tokenizer itself would not do."""
    characters = byte_characters()
    return [tokenizer.convert_tokens_to_ids(characters[byte]) for byte in text.encode()]
