"""Bad requests of every kind, as any client could send them to any route of a server, and the words that refuse them.

A refusal is a status 4xx whose body matches the words. A stream of SGLang's begins with status 200 before the request
is looked at, and says the same in its first event. Words of None stand for a request that is odd, but whose answer is
right. Here are prompts, sampling parameters and what the server half reads; the rest is in `bad_fields` and
`bad_routes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL

VOCAB = 49152
CONTEXT = 8192


class Bad(NamedTuple):
    """One request: where it goes, its body (raw where it is bytes), and what refuses it."""

    path: str
    body: Any
    words: str | None = None


def to_bytes(body: Any) -> bytes:
    # NaN, infinity and lone surrogates too: the server's JSON reader takes them.
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def generate(words: str | None = None, /, **fields: Any) -> Bad:
    body: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    body |= fields
    return Bad("/generate", {name: value for name, value in body.items() if value is not ...}, words)


def sampling(words: str | None = None, /, **options: Any) -> Bad:
    return generate(words, sampling_params={"max_new_tokens": 2, "temperature": 0.5, **options})


def text(value: Any, words: str | None = None) -> Bad:
    return generate(words, input_ids=..., text=value)


def options(value: Any, words: str | None = None) -> Bad:
    """Return a request with broken options of the server half."""
    return sampling(words, custom_params={CHANNEL: value})


NAN, INFINITY = float("nan"), float("inf")
DEEP = b'{"input_ids": ' + b"[" * 5000 + b"]" * 5000 + b"}"

BAD: Mapping[str, Bad] = {
    # --- token ids ---
    "id: the vocabulary's size": generate(
        "row 0: token id 49152 at position 1 is outside the vocabulary of", input_ids=[5, VOCAB]
    ),
    "id: over the vocabulary, in row 2": generate(
        "row 2: token id 50152 at position 1 is outside the vocabulary of", input_ids=[[5], [6, 7], [8, VOCAB + 1000]]
    ),
    "id: 2**31": generate("row 0: token id 2147483648 at position 0 is outside the vocabulary of", input_ids=[2**31]),
    "id: 2**62": generate("row 0: token id 4611686018427387904 at position 0 is outside the", input_ids=[2**62]),
    "id: 2**70": generate("'type': 'value_error'", input_ids=[2**70]),
    "id: -1": generate("row 0: token id -1 at position 1 is outside the vocabulary of 49152", input_ids=[5, -1]),
    "id: -2**40": generate("row 1: token id -1099511627776 at position 0 is outside the", input_ids=[[5], [-(2**40)]]),
    "ids: an empty row": generate("row 1: the prompt has 0 tokens; SGLang needs at least 1", input_ids=[[5], []]),
    "ids: no ids": generate("the batch has 0 rows, or a prompt of 0 tokens; pass at least 1 prompt", input_ids=[]),
    "ids: one empty row": generate("row 0: the prompt has 0 tokens; SGLang needs at least 1", input_ids=[[]]),
    "ids: floats": generate("'type': 'value_error'", input_ids=[1.5, 2.0]),
    "ids: strings": generate("'type': 'value_error'", input_ids=["5", "6"]),
    "ids: nested": generate("'type': 'value_error'", input_ids=[[[5, 6]]]),
    "ids: a null": generate("'type': 'value_error'", input_ids=[5, None]),
    "ids: bools": generate("invalid type: boolean `true`, expected a sequence", input_ids=[True, False]),
    "ids: a bool among ints": generate("invalid type: boolean `true`, expected i64", input_ids=[[5, 6], [7, True]]),
    "ids: an int, then a row": generate("'type': 'value_error'", input_ids=[5, [6]]),
    "ids: a row, then an int": generate("'type': 'value_error'", input_ids=[[5], 6]),
    "ids: an object": generate("'type': 'value_error'", input_ids={"0": 5}),
    "ids: a text": generate("'type': 'value_error'", input_ids="5 6"),
    "ids: one number": generate("'type': 'value_error'", input_ids=5),
    "ids: as many as the context": generate(
        "row 0: The input (8192 tokens) is longer than the model's context", input_ids=[5] * CONTEXT
    ),
    "ids: a long row in a batch": generate(
        "row 1: The input (8202 tokens) is longer than the model's context", input_ids=[[5], [6] * (CONTEXT + 10)]
    ),
    "ids: two million": generate(
        "row 0: The input (2000000 tokens) is longer than the model's context", input_ids=[5] * 2_000_000
    ),
    "ids: deeply nested": Bad("/generate", DEEP, "'type': 'json_invalid'"),
    # --- text ---
    "text: empty": text("", "row 0: the prompt has 0 tokens; SGLang needs at least 1"),
    "text: an empty row": text(["ok", ""], "row 1: the prompt has 0 tokens; SGLang needs at least 1"),
    "text: no rows": text([], "the batch has 0 rows, or a prompt of 0 tokens; pass at least 1 prompt"),
    "text: a number": text(5, "'type': 'string_type'"),
    "text: numbers": text([5, 6], "'type': 'string_type'"),
    "text: a null": text([None], "'type': 'string_type'"),
    "text: nested": text([["a", "b"]], "'type': 'string_type'"),
    "text: a lone surrogate": text("a \ud800 b", "'type': 'json_invalid'"),
    "text: a lone surrogate in a row": text(["ok", "\udfff"], "'type': 'json_invalid'"),
    "text: a NUL": text("a\x00b"),
    "text: a million words": text("word " * 1_000_000, "row 0: the text has 5000000 characters"),
    "text and ids of other rows": generate(
        "text has 1 rows and input_ids 2; pass one of them, or the same prompts", text="one", input_ids=[[5], [6]]
    ),
    "text and ids of more rows": generate(
        "text has 2 rows and input_ids 3; pass one of them, or the same prompts",
        text=["one", "two"],
        input_ids=[[5], [6], [7]],
    ),
    "nothing to read": generate("Either text, input_ids or input_embeds should be provided", input_ids=...),
    "embeddings of nothing": generate(
        "the request cannot be read (list index out of range); look at the", input_ids=..., input_embeds=[]
    ),
    "embeddings of a wrong width": generate(
        "row 0: input_embeds is provided while disable_radix_cache is False", input_ids=..., input_embeds=[[0.5, 0.5]]
    ),
    "embeddings that are no numbers": generate("'type': 'json_invalid'", input_ids=..., input_embeds=[[NAN] * 576]),
    "embeddings: a text": generate("'type': 'list_type'", input_ids=..., input_embeds="x"),
    "an image for a text model": generate(
        "row 0: images, video or audio for a model that reads text alone", image_data="data:image/png;base64,AAAA"
    ),
    "images for other rows": generate(
        "The length of image_data should be equal to the batch size", input_ids=[[5], [6]], image_data=["x", "y", "z"]
    ),
    "a video for a text model": generate(
        "row 0: images, video or audio for a model that reads text alone", video_data="x.mp4"
    ),
    "audio: a number": generate("invalid type: integer `5`, expected one of the MediaInput shapes", audio_data=5),
    "modalities: a number": generate("'type': 'list_type'", modalities=5),
    # --- sampling parameters ---
    "sampling_params: a text": generate("'type': 'list_type'", sampling_params="greedy"),
    "sampling_params: an empty list": generate(
        "the request cannot be read (list index out of range); look at the", sampling_params=[]
    ),
    "sampling_params: a list for one prompt": generate(
        "row 0: the request cannot be read ('list' object has no attribute", sampling_params=[{"max_new_tokens": 2}]
    ),
    "sampling_params: too few": generate(
        "sampling_params has 1 values for 2 rows; give one for each, or one",
        input_ids=[[5], [6]],
        sampling_params=[{"max_new_tokens": 2}],
    ),
    "sampling_params: a list of numbers": generate("'type': 'dict_type'", input_ids=[[5], [6]], sampling_params=[1, 2]),
    "sampling_params: an unknown name": sampling(
        "unknown field `temprature`, expected one of `max_new_tokens`, `stop`", temprature=0.5
    ),
    "sampling_params: a name of 4 kB": sampling("unknown field", **{"x" * 4096: 1}),
    "temperature: a text": sampling('invalid type: string "hot", expected f64', temperature="hot"),
    "temperature: NaN": sampling("'type': 'json_invalid'", temperature=NAN),
    "temperature: infinite": sampling("'type': 'json_invalid'", temperature=INFINITY),
    "temperature: -1": sampling("row 0: temperature=-1: Temperature must be non-negative, expected a", temperature=-1),
    "temperature: a list": sampling("invalid type: sequence, expected f64", temperature=[1.0]),
    "temperature: true": sampling("invalid type: boolean `true`, expected f64", temperature=True),
    "temperature: 1e-5": sampling(temperature=1e-5),
    "temperature: 1e300": sampling(temperature=1e300),
    "temperature: 1e-44": sampling(temperature=1e-5, top_p=1e-44),
    "top_p: 0": sampling("row 0: top_p=0: top_p must be between 0 and 1, expected in (0, 1]", top_p=0),
    "top_p: 2": sampling("row 0: top_p=2: top_p must be between 0 and 1, expected in (0, 1]", top_p=2),
    "top_p: NaN": sampling("'type': 'json_invalid'", top_p=NAN),
    "top_p: a text": sampling('invalid type: string "x", expected f64', top_p="x"),
    "top_k: 0": sampling("row 0: top_k=0: top_k must be positive, expected an integer in", top_k=0),
    "top_k: -5": sampling("row 0: top_k=-5: top_k must be positive, expected an integer in", top_k=-5),
    "top_k: 2**31": sampling("row 0: top_k=2147483648: top_k must be positive, expected an integer", top_k=2**31),
    "top_k: 2**70": sampling("invalid type: floating point `1.1805916207174113e+21`, expected i64", top_k=2**70),
    "top_k: 1.5": sampling("invalid type: floating point `1.5`, expected i64", top_k=1.5),
    "top_k: a text": sampling('invalid type: string "all", expected i64', top_k="all"),
    "min_p: NaN": sampling("'type': 'json_invalid'", min_p=NAN),
    "min_p: 2": sampling("row 0: min_p=2: expected in [0, 1]", min_p=2),
    "min_p: a list": sampling("invalid type: sequence, expected f64", min_p=[0.1]),
    "frequency_penalty: 3": sampling("row 0: frequency_penalty=3: expected in [-2, 2]", frequency_penalty=3),
    "frequency_penalty: NaN": sampling("'type': 'json_invalid'", frequency_penalty=NAN),
    "presence_penalty: a text": sampling('invalid type: string "x", expected f64', presence_penalty="x"),
    "repetition_penalty: 0": sampling(
        "row 0: repetition_penalty=0: repetition_penalty must be positive", repetition_penalty=0
    ),
    "repetition_penalty: 1e-38": sampling(
        "row 0: repetition_penalty=1e-38: repetition_penalty must be positive", repetition_penalty=1e-38
    ),
    "repetition_penalty: 1e-300": sampling(
        "row 0: repetition_penalty=1e-300: repetition_penalty must be", repetition_penalty=1e-300
    ),
    "repetition_penalty: a text": sampling('invalid type: string "x", expected f64', repetition_penalty="x"),
    "max_new_tokens: -1": sampling(
        "row 0: max_new_tokens=-1: expected an integer of at least 0 (0 reads", max_new_tokens=-1
    ),
    "max_new_tokens: over the context": sampling(
        "row 0: Requested token count exceeds the model's maximum context", max_new_tokens=CONTEXT
    ),
    "max_new_tokens: 2**40": sampling(
        "row 0: Requested token count exceeds the model's maximum context", max_new_tokens=2**40
    ),
    "max_new_tokens: 2**70": sampling(
        "invalid type: floating point `1.1805916207174113e+21`, expected i64", max_new_tokens=2**70
    ),
    "max_new_tokens: 1.5": sampling("invalid type: floating point `1.5`, expected i64", max_new_tokens=1.5),
    "max_new_tokens: a text": sampling('invalid type: string "2", expected i64', max_new_tokens="2"),
    "max_new_tokens: true": sampling("invalid type: boolean `true`, expected i64", max_new_tokens=True),
    "max_new_tokens: a list": sampling("invalid type: sequence, expected i64", max_new_tokens=[2]),
    "min_new_tokens: over max_new_tokens": sampling(
        "row 0: min_new_tokens must be in [0, max_new_tokens(2)], got 3", min_new_tokens=3
    ),
    "min_new_tokens: -1": sampling("row 0: min_new_tokens=-1: expected an integer of at least 0", min_new_tokens=-1),
    "min_new_tokens: a text": sampling('invalid type: string "x", expected i64', min_new_tokens="x"),
    "min_new_tokens: 2**70": sampling(
        "invalid type: floating point `1.1805916207174113e+21`, expected i64", min_new_tokens=2**70, max_new_tokens=None
    ),
    "min_new_tokens: 0.5": sampling("invalid type: floating point `0.5`, expected i64", min_new_tokens=0.5),
    "stop_token_ids: over the vocabulary": sampling(
        "row 0: stop_token_ids has id 49152, outside the vocabulary of 49152", stop_token_ids=[VOCAB], min_new_tokens=1
    ),
    "stop_token_ids: negative": sampling(
        "row 0: stop_token_ids=[-1]: expected a token id or a list of them", stop_token_ids=[-1], min_new_tokens=1
    ),
    "stop_token_ids: -2**40": sampling(
        "row 0: stop_token_ids=[-1099511627776]: expected a token id or a list",
        stop_token_ids=[-(2**40)],
        min_new_tokens=1,
    ),
    "stop_token_ids: 2**40": sampling(
        "row 0: stop_token_ids has id 1099511627776, outside the vocabulary of",
        stop_token_ids=[2**40],
        min_new_tokens=1,
    ),
    "stop_token_ids: 2**70": sampling(
        "invalid type: floating point `1.1805916207174113e+21`, expected i64", stop_token_ids=[2**70]
    ),
    "stop_token_ids: texts": sampling('invalid type: string "x", expected i64', stop_token_ids=["x"]),
    "stop_token_ids: one number": sampling("invalid type: integer `5`, expected a sequence", stop_token_ids=5),
    "stop_token_ids: 1.5": sampling("invalid type: floating point `1.5`, expected i64", stop_token_ids=[1.5]),
    "stop_token_ids: nested": sampling("invalid type: sequence, expected i64", stop_token_ids=[[5]]),
    "stop: a number": sampling("invalid type: integer `5`, expected a value or an array of values for", stop=5),
    "stop: numbers": sampling("invalid type: integer `5`, expected a string", stop=[5]),
    "stop: empty": sampling("row 0: stop=['']: expected a non-empty string or a list of them", stop=[""]),
    "stop: a null": sampling("invalid type: null, expected a string", stop=[None]),
    "stop: 100 texts": sampling("row 0: at most 32 stop strings are allowed, got 100", stop=["x"] * 100),
    "stop: a lone surrogate": sampling("'type': 'json_invalid'", stop="\ud800"),
    "stop: an object": sampling("invalid type: map, expected a value or an array of values for", stop={"a": 1}),
    "stop_regex: unclosed": sampling(
        "row 0: the request cannot be read (missing ), unterminated subpattern", stop_regex="("
    ),
    "stop_regex: a number": sampling(
        "invalid type: integer `5`, expected a value or an array of values for", stop_regex=5
    ),
    "stop_regex: 300 characters": sampling(
        "row 0: stop_regex is 300 bytes, over the 256-byte limit", stop_regex="a" * 300
    ),
    # 81 is the id of "a": a search in 40 of them takes Python's `re` a day.
    "stop_regex: one that backtracks": sampling(
        "row 0: invalid stop_regex '(a|aa)+$b': not searched within",
        stop_regex="(a|aa)+$b",
        logit_bias={"81": 1e8},
        max_new_tokens=100,
    ),
    "stop_regex: a lone surrogate": sampling("'type': 'json_invalid'", stop_regex="\ud800"),
    "n: 0": sampling("row 0: n=0: expected an integer in 1..4096", n=0),
    "n: -1": sampling("row 0: n=-1: expected an integer in 1..4096", n=-1),
    "n: a text": sampling('invalid type: string "2", expected i64', n="2"),
    "n: 1.5": sampling("invalid type: floating point `1.5`, expected i64", n=1.5),
    "n: true": sampling("invalid type: boolean `true`, expected i64", n=True),
    "n: 10**12": sampling("row 0: n=1000000000000: expected an integer in 1..4096", n=10**12),
    "n: 4097": sampling("row 0: n=4097: expected an integer in 1..4096", n=4097),
    "n: too many of many": generate(
        "5 rows of n=4096 samples are 20480 requests, over the limit of 16384",
        input_ids=[[5]] * 5,
        sampling_params={"n": 4096},
    ),
    "n: differs from row to row": generate(
        "The parallel_sample_num should be the same for all samples in sample",
        input_ids=[[5], [6]],
        sampling_params=[{"n": 1}, {"n": 2}],
    ),
    "beam_width: 0": sampling("row 0: beam_width must be at least 1, got 0", beam_width=0),
    "beam_width: 2**40": sampling(
        "row 0: beam_width (1099511627776) is too large for the vocabulary", beam_width=2**40
    ),
    "beam_width: a text": sampling('invalid type: string "x", expected i64', beam_width="x"),
    "json_schema: no JSON": sampling("row 0: Failed to compile json grammar: Expecting property name", json_schema="{"),
    "json_schema: an object": sampling("invalid type: map, expected a string", json_schema={"type": "object"}),
    "json_schema: an unknown type": sampling(
        "row 0: Failed to compile json grammar", json_schema='{"type": "nonsense"}'
    ),
    "json_schema: a reference to nothing": sampling(
        "row 0: Failed to compile json grammar", json_schema='{"$ref": "#/nothing"}'
    ),
    "json_schema: a number": sampling("row 0: Failed to compile json grammar", json_schema="5"),
    "json_schema: deep": sampling(
        "row 0: Failed to compile json grammar: Grammar compilation failed",
        json_schema='{"type":"array","items":' * 3000 + "{}" + "}" * 3000,
    ),
    "regex: unclosed": sampling("row 0: Failed to compile regex grammar", regex="("),
    "regex: a number": sampling("invalid type: integer `5`, expected a string", regex=5),
    "regex: a range to nowhere": sampling("row 0: Failed to compile regex grammar", regex="[z-a]"),
    "regex: a lone surrogate": sampling("'type': 'json_invalid'", regex="\ud800"),
    "ebnf: no grammar": sampling("row 0: Failed to compile ebnf grammar", ebnf="this is no grammar"),
    "ebnf: without a root": sampling("row 0: Failed to compile ebnf grammar", ebnf='a ::= "x"'),
    "ebnf: endless": sampling("row 0: Grammar accept_token failed", ebnf="root ::= root"),
    "structural_tag: no JSON": sampling(
        "row 0: Failed to compile structural_tag grammar: Expecting value", structural_tag="x"
    ),
    "structural_tag: empty": sampling(
        "row 0: Failed to compile structural_tag grammar: Grammar compilation", structural_tag="{}"
    ),
    "two grammars": sampling(
        "row 0: Only one of json_schema, regex, ebnf, or structural_tag can be", regex="a", json_schema="{}"
    ),
    "logit_bias: over the vocabulary": sampling(
        "row 0: logit_bias must has keys in [0, 49151], got 49152", logit_bias={str(VOCAB): 1.0}
    ),
    "logit_bias: negative": sampling(
        "row 0: logit_bias={'-1': 1.0}: expected a dict of token id to a", logit_bias={"-1": 1.0}
    ),
    "logit_bias: no id": sampling(
        "row 0: logit_bias={'x': 1.0}: expected a dict of token id to a number", logit_bias={"x": 1.0}
    ),
    "logit_bias: a text": sampling('invalid type: string "x", expected f64', logit_bias={"5": "x"}),
    "logit_bias: NaN": sampling("'type': 'json_invalid'", logit_bias={"5": NAN}),
    "logit_bias: infinite": sampling("'type': 'json_invalid'", logit_bias={"5": INFINITY}),
    "logit_bias: 1e300": sampling(
        "row 0: logit_bias={'5': 1e+300}: expected a dict of token id to a", logit_bias={"5": 1e300}
    ),
    "logit_bias: a list": sampling("invalid type: sequence, expected a map", logit_bias=[5]),
    "logit_bias: id 1.5": sampling(
        "row 0: logit_bias={'1.5': 1.0}: expected a dict of token id to a", logit_bias={"1.5": 1.0}
    ),
    "sampling_seed: 2**70": sampling(
        "invalid type: floating point `1.1805916207174113e+21`, expected i64", sampling_seed=2**70
    ),
    "sampling_seed: a text": sampling('invalid type: string "x", expected i64', sampling_seed="x"),
    "sampling_seed: 1.5": sampling("invalid type: floating point `1.5`, expected i64", sampling_seed=1.5),
    "ignore_eos: a text": sampling('invalid type: string "x", expected a boolean', ignore_eos="x"),
    "skip_special_tokens: a number": sampling("invalid type: integer `5`, expected a boolean", skip_special_tokens=5),
    "no_stop_trim: a list": sampling("invalid type: sequence, expected a boolean", no_stop_trim=[]),
    "stream_interval: 0": generate(stream=True, sampling_params={"max_new_tokens": 2, "stream_interval": 0}),
    "stream_interval: a text": sampling('invalid type: string "x", expected i64', stream_interval="x"),
    "watermark: a text": sampling('invalid type: string "x", expected struct WatermarkRequestConfig', watermark="x"),
    "watermark: an object": generate("row 0: watermark contains unknown fields", watermark={"x": 1}),
    "a field that is the server's own: is_normalized": sampling(
        "unknown field `is_normalized`, expected one of `max_new_tokens`", is_normalized=True, temperature=None
    ),
    "a field that is the server's own: stop_strs": sampling(
        "unknown field `stop_strs`, expected one of `max_new_tokens`, `stop`", stop_strs=5
    ),
    "a field that is the server's own: stop_str_max_len": sampling(
        "unknown field `stop_str_max_len`, expected one of `max_new_tokens`", stop_str_max_len="x"
    ),
    "custom_params: a text": sampling("row 0: custom_params='x': expected a dict by names", custom_params="x"),
    "custom_params: nested": sampling(
        "row 0: custom_params={'a': {'b': {'c': {'d': 1}}}}: Expected `bool |",
        custom_params={"a": {"b": {"c": {"d": 1}}}},
    ),
    "custom_params: 2**70": sampling(custom_params={"a": 2**70}),
    "custom_params: the end of reasoning": sampling(
        "row 0: request reasoning end token IDs must be a non-empty",
        custom_params={"__sglang_reasoning_end_token_ids": [-5]},
    ),
    # --- what the server half reads ---
    "options: a number": options(5, "row 0: custom_params['torchrl_sglang_hidden']=5: expected what this"),
    "options: another protocol": options(
        {"protocol": 10**6, "options": "{}"}, "row 0: custom_params['torchrl_sglang_hidden'] has protocol=1000000"
    ),
    "options: no JSON": options(
        {"protocol": PROTOCOL, "options": "{"}, "row 0: custom_params['torchrl_sglang_hidden'] cannot be read: '{"
    ),
    "options: empty": options(
        {"protocol": PROTOCOL, "options": "{}"}, "row 0: custom_params['torchrl_sglang_hidden'] cannot be read: '{}"
    ),
    "options: a number for the text": options(
        {"protocol": PROTOCOL, "options": 5},
        f"row 0: custom_params['torchrl_sglang_hidden'] has protocol={PROTOCOL} and",
    ),
    "options: a layer that is none": options(
        {
            "protocol": PROTOCOL,
            "options": '{"segments":["response"],"pooling":"mean","layers":[999],"tokens":false,'
            '"row_dtype":"float32","spans":{},"way":"text"}',
        },
        "row 0: layers=(999,): the server does not give all their states",
    ),
}
