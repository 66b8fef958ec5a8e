"""Bad requests of every kind, as any client could send them to any route of a server, and the words that refuse them.

A refusal is a status 4xx whose body matches the words. A stream of SGLang's begins with status 200 before the request
is looked at, and says the same in its first event. Words of None stand for a request that is odd, but whose answer is
right: what it must come to is in `HARMLESS`.
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


def complete(words: str | None = None, /, **fields: Any) -> Bad:
    return Bad("/v1/completions", {"model": "default", "prompt": [5, 6], "max_tokens": 2, **fields}, words)


def chat(words: str | None = None, /, **fields: Any) -> Bad:
    messages = [{"role": "user", "content": "hi"}]
    return Bad("/v1/chat/completions", {"model": "default", "messages": messages, "max_tokens": 2, **fields}, words)


def score(words: str | None = None, /, **fields: Any) -> Bad:
    body = {"model": "default", "query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [5, 6], **fields}
    return Bad("/v1/score", body, words)


def vectors(words: str | None = None, /, **fields: Any) -> Bad:
    return Bad("/v1/hidden_states", {"input": [[5, 6, 7]], **fields}, words)


NAN, INFINITY = float("nan"), float("inf")
DEEP = b'{"input_ids": ' + b"[" * 5000 + b"]" * 5000 + b"}"

BAD: Mapping[str, Bad] = {
    # --- token ids ---
    "id: the vocabulary's size": generate(input_ids=[5, VOCAB]),
    "id: over the vocabulary, in row 2": generate(input_ids=[[5], [6, 7], [8, VOCAB + 1000]]),
    "id: 2**31": generate(input_ids=[2**31]),
    "id: 2**62": generate(input_ids=[2**62]),
    "id: 2**70": generate(input_ids=[2**70]),
    "id: -1": generate(input_ids=[5, -1]),
    "id: -2**40": generate(input_ids=[[5], [-(2**40)]]),
    "ids: an empty row": generate(input_ids=[[5], []]),
    "ids: no ids": generate(input_ids=[]),
    "ids: one empty row": generate(input_ids=[[]]),
    "ids: empty rows": generate(input_ids=[[], []]),
    "ids: floats": generate(input_ids=[1.5, 2.0]),
    "ids: strings": generate(input_ids=["5", "6"]),
    "ids: nested": generate(input_ids=[[[5, 6]]]),
    "ids: a null": generate(input_ids=[5, None]),
    "ids: bools": generate(input_ids=[True, False]),
    "ids: a bool among ints": generate(input_ids=[[5, 6], [7, True]]),
    "ids: an int, then a row": generate(input_ids=[5, [6]]),
    "ids: a row, then an int": generate(input_ids=[[5], 6]),
    "ids: an object": generate(input_ids={"0": 5}),
    "ids: a text": generate(input_ids="5 6"),
    "ids: one number": generate(input_ids=5),
    "ids: as many as the context": generate(input_ids=[5] * CONTEXT),
    "ids: a long row in a batch": generate(input_ids=[[5], [6] * (CONTEXT + 10)]),
    "ids: two million": generate(input_ids=[5] * 2_000_000),
    "ids: deeply nested": Bad("/generate", DEEP),
    # --- text ---
    "text: empty": text(""),
    "text: an empty row": text(["ok", ""]),
    "text: no rows": text([]),
    "text: a number": text(5),
    "text: numbers": text([5, 6]),
    "text: a null": text([None]),
    "text: nested": text([["a", "b"]]),
    "text: a lone surrogate": text("a \ud800 b"),
    "text: a lone surrogate in a row": text(["ok", "\udfff"]),
    "text: a NUL": text("a\x00b"),
    "text: a million words": text("word " * 1_000_000),
    "text and ids of other rows": generate(text="one", input_ids=[[5], [6]]),
    "text and ids of more rows": generate(text=["one", "two"], input_ids=[[5], [6], [7]]),
    "nothing to read": generate(input_ids=...),
    "embeddings of nothing": generate(input_ids=..., input_embeds=[]),
    "embeddings of a wrong width": generate(input_ids=..., input_embeds=[[0.5, 0.5]]),
    "embeddings that are no numbers": generate(input_ids=..., input_embeds=[[NAN] * 576]),
    "embeddings: a text": generate(input_ids=..., input_embeds="x"),
    "an image for a text model": generate(image_data="data:image/png;base64,AAAA"),
    "images for other rows": generate(input_ids=[[5], [6]], image_data=["x", "y", "z"]),
    "a video for a text model": generate(video_data="x.mp4"),
    "audio: a number": generate(audio_data=5),
    "modalities: a number": generate(modalities=5),
    # --- sampling parameters ---
    "sampling_params: a text": generate(sampling_params="greedy"),
    "sampling_params: an empty list": generate(sampling_params=[]),
    "sampling_params: a list for one prompt": generate(sampling_params=[{"max_new_tokens": 2}]),
    "sampling_params: too few": generate(input_ids=[[5], [6]], sampling_params=[{"max_new_tokens": 2}]),
    "sampling_params: a list of numbers": generate(input_ids=[[5], [6]], sampling_params=[1, 2]),
    "sampling_params: an unknown name": sampling(temprature=0.5),
    "sampling_params: a name of 4 kB": sampling(**{"x" * 4096: 1}),
    "temperature: a text": sampling(temperature="hot"),
    "temperature: NaN": sampling(temperature=NAN),
    "temperature: infinite": sampling(temperature=INFINITY),
    "temperature: -1": sampling(temperature=-1),
    "temperature: a list": sampling(temperature=[1.0]),
    "temperature: true": sampling(temperature=True),
    "temperature: 1e-5": sampling(temperature=1e-5),
    "temperature: 1e300": sampling(temperature=1e300),
    "temperature: 1e-44": sampling(temperature=1e-5, top_p=1e-44),
    "top_p: 0": sampling(top_p=0),
    "top_p: 2": sampling(top_p=2),
    "top_p: NaN": sampling(top_p=NAN),
    "top_p: a text": sampling(top_p="x"),
    "top_k: 0": sampling(top_k=0),
    "top_k: -5": sampling(top_k=-5),
    "top_k: 2**31": sampling(top_k=2**31),
    "top_k: 2**70": sampling(top_k=2**70),
    "top_k: 1.5": sampling(top_k=1.5),
    "top_k: a text": sampling(top_k="all"),
    "min_p: NaN": sampling(min_p=NAN),
    "min_p: 2": sampling(min_p=2),
    "min_p: a list": sampling(min_p=[0.1]),
    "frequency_penalty: 3": sampling(frequency_penalty=3),
    "frequency_penalty: NaN": sampling(frequency_penalty=NAN),
    "presence_penalty: a text": sampling(presence_penalty="x"),
    "repetition_penalty: 0": sampling(repetition_penalty=0),
    "repetition_penalty: 1e-38": sampling(repetition_penalty=1e-38),
    "repetition_penalty: 1e-300": sampling(repetition_penalty=1e-300),
    "repetition_penalty: a text": sampling(repetition_penalty="x"),
    "max_new_tokens: -1": sampling(max_new_tokens=-1),
    "max_new_tokens: over the context": sampling(max_new_tokens=CONTEXT),
    "max_new_tokens: 2**40": sampling(max_new_tokens=2**40),
    "max_new_tokens: 2**70": sampling(max_new_tokens=2**70),
    "max_new_tokens: 1.5": sampling(max_new_tokens=1.5),
    "max_new_tokens: a text": sampling(max_new_tokens="2"),
    "max_new_tokens: true": sampling(max_new_tokens=True),
    "max_new_tokens: a list": sampling(max_new_tokens=[2]),
    "min_new_tokens: over max_new_tokens": sampling(min_new_tokens=3),
    "min_new_tokens: -1": sampling(min_new_tokens=-1),
    "min_new_tokens: a text": sampling(min_new_tokens="x"),
    "min_new_tokens: 2**70": sampling(min_new_tokens=2**70, max_new_tokens=None),
    "min_new_tokens: 0.5": sampling(min_new_tokens=0.5),
    "stop_token_ids: over the vocabulary": sampling(stop_token_ids=[VOCAB], min_new_tokens=1),
    "stop_token_ids: negative": sampling(stop_token_ids=[-1], min_new_tokens=1),
    "stop_token_ids: -2**40": sampling(stop_token_ids=[-(2**40)], min_new_tokens=1),
    "stop_token_ids: 2**40": sampling(stop_token_ids=[2**40], min_new_tokens=1),
    "stop_token_ids: 2**70": sampling(stop_token_ids=[2**70]),
    "stop_token_ids: texts": sampling(stop_token_ids=["x"]),
    "stop_token_ids: one number": sampling(stop_token_ids=5),
    "stop_token_ids: 1.5": sampling(stop_token_ids=[1.5]),
    "stop_token_ids: nested": sampling(stop_token_ids=[[5]]),
    "stop: a number": sampling(stop=5),
    "stop: numbers": sampling(stop=[5]),
    "stop: empty": sampling(stop=[""]),
    "stop: a null": sampling(stop=[None]),
    "stop: 100 texts": sampling(stop=["x"] * 100),
    "stop: a lone surrogate": sampling(stop="\ud800"),
    "stop: an object": sampling(stop={"a": 1}),
    "stop_regex: unclosed": sampling(stop_regex="("),
    "stop_regex: a number": sampling(stop_regex=5),
    "stop_regex: 300 characters": sampling(stop_regex="a" * 300),
    "stop_regex: one that backtracks": sampling(stop_regex="(a+)+$"),
    "stop_regex: a lone surrogate": sampling(stop_regex="\ud800"),
    "n: 0": sampling(n=0),
    "n: -1": sampling(n=-1),
    "n: a text": sampling(n="2"),
    "n: 1.5": sampling(n=1.5),
    "n: true": sampling(n=True),
    "n: 10**12": sampling(n=10**12),
    "n: 2**70": sampling(n=2**70),
    "n: differs from row to row": generate(input_ids=[[5], [6]], sampling_params=[{"n": 1}, {"n": 2}]),
    "beam_width: 0": sampling(beam_width=0),
    "beam_width: 2**40": sampling(beam_width=2**40),
    "beam_width: a text": sampling(beam_width="x"),
    "json_schema: no JSON": sampling(json_schema="{"),
    "json_schema: an object": sampling(json_schema={"type": "object"}),
    "json_schema: an unknown type": sampling(json_schema='{"type": "nonsense"}'),
    "json_schema: a reference to nothing": sampling(json_schema='{"$ref": "#/nothing"}'),
    "json_schema: a number": sampling(json_schema="5"),
    "json_schema: deep": sampling(json_schema='{"type":"array","items":' * 3000 + "{}" + "}" * 3000),
    "regex: unclosed": sampling(regex="("),
    "regex: a number": sampling(regex=5),
    "regex: a range to nowhere": sampling(regex="[z-a]"),
    "regex: a lone surrogate": sampling(regex="\ud800"),
    "ebnf: no grammar": sampling(ebnf="this is no grammar"),
    "ebnf: without a root": sampling(ebnf='a ::= "x"'),
    "ebnf: endless": sampling(ebnf="root ::= root"),
    "structural_tag: no JSON": sampling(structural_tag="x"),
    "structural_tag: empty": sampling(structural_tag="{}"),
    "two grammars": sampling(regex="a", json_schema="{}"),
    "logit_bias: over the vocabulary": sampling(logit_bias={str(VOCAB): 1.0}),
    "logit_bias: negative": sampling(logit_bias={"-1": 1.0}),
    "logit_bias: no id": sampling(logit_bias={"x": 1.0}),
    "logit_bias: a text": sampling(logit_bias={"5": "x"}),
    "logit_bias: NaN": sampling(logit_bias={"5": NAN}),
    "logit_bias: infinite": sampling(logit_bias={"5": INFINITY}),
    "logit_bias: 1e300": sampling(logit_bias={"5": 1e300}),
    "logit_bias: a list": sampling(logit_bias=[5]),
    "logit_bias: id 1.5": sampling(logit_bias={"1.5": 1.0}),
    "sampling_seed: 2**70": sampling(sampling_seed=2**70),
    "sampling_seed: a text": sampling(sampling_seed="x"),
    "sampling_seed: 1.5": sampling(sampling_seed=1.5),
    "ignore_eos: a text": sampling(ignore_eos="x"),
    "skip_special_tokens: a number": sampling(skip_special_tokens=5),
    "no_stop_trim: a list": sampling(no_stop_trim=[]),
    "stream_interval: 0": generate(stream=True, sampling_params={"max_new_tokens": 2, "stream_interval": 0}),
    "stream_interval: a text": sampling(stream_interval="x"),
    "watermark: a text": sampling(watermark="x"),
    "watermark: an object": generate(watermark={"x": 1}),
    "a field that is the server's own: is_normalized": sampling(is_normalized=True, temperature=None),
    "a field that is the server's own: stop_strs": sampling(stop_strs=5),
    "a field that is the server's own: stop_str_max_len": sampling(stop_str_max_len="x"),
    "custom_params: a text": sampling(custom_params="x"),
    "custom_params: nested": sampling(custom_params={"a": {"b": {"c": {"d": 1}}}}),
    "custom_params: 2**70": sampling(custom_params={"a": 2**70}),
    "custom_params: the end of reasoning": sampling(custom_params={"__sglang_reasoning_end_token_ids": [-5]}),
    # --- what the server half reads ---
    "options: a number": options(5),
    "options: another protocol": options({"protocol": 10**6, "options": "{}"}),
    "options: no JSON": options({"protocol": PROTOCOL, "options": "{"}),
    "options: empty": options({"protocol": PROTOCOL, "options": "{}"}),
    "options: a number for the text": options({"protocol": PROTOCOL, "options": 5}),
    "options: a layer that is none": options(
        {
            "protocol": PROTOCOL,
            "options": '{"segments":["response"],"pooling":"mean","layers":[999],"tokens":false,'
            '"row_dtype":"float32","spans":{},"way":"text"}',
        }
    ),
    # --- log-probs ---
    "return_logprob: a text": generate(return_logprob="x"),
    "return_logprob: too few": generate(input_ids=[[5], [6]], return_logprob=[True]),
    "return_logprob: a list for one prompt": generate(return_logprob=[True]),
    "top_logprobs_num: over the vocabulary": generate(return_logprob=True, top_logprobs_num=VOCAB + 1),
    "top_logprobs_num: of the prompt, over the vocabulary": generate(
        return_logprob=True, logprob_start_len=0, top_logprobs_num=VOCAB + 1
    ),
    "top_logprobs_num: -1": generate(return_logprob=True, top_logprobs_num=-1),
    "top_logprobs_num: a text": generate(return_logprob=True, top_logprobs_num="x"),
    "top_logprobs_num: 2**40": generate(return_logprob=True, top_logprobs_num=2**40),
    "top_logprobs_num: 2**70": generate(return_logprob=True, top_logprobs_num=2**70),
    "top_logprobs_num: a list for one prompt": generate(return_logprob=True, top_logprobs_num=[5]),
    "logprob_start_len: -5": generate(return_logprob=True, logprob_start_len=-5),
    "logprob_start_len: behind the prompt": generate(return_logprob=True, logprob_start_len=100),
    "logprob_start_len: a text": generate(return_logprob=True, logprob_start_len="x"),
    "logprob_start_len: 2**70": generate(return_logprob=True, logprob_start_len=2**70),
    "logprob_start_len: a list for one prompt": generate(return_logprob=True, logprob_start_len=[0]),
    "token_ids_logprob: over the vocabulary": generate(return_logprob=True, token_ids_logprob=[VOCAB]),
    "token_ids_logprob: negative": generate(return_logprob=True, token_ids_logprob=[-1]),
    "token_ids_logprob: texts": generate(return_logprob=True, token_ids_logprob=["x"]),
    "token_ids_logprob: nested": generate(return_logprob=True, token_ids_logprob=[[5]]),
    "token_ids_logprob: 2**70": generate(return_logprob=True, token_ids_logprob=[2**70]),
    "token_ids_logprob: true": generate(return_logprob=True, token_ids_logprob=[True]),
    "return_flat_raw_top_logprobs_b64: alone": generate(return_flat_raw_top_logprobs_b64=True),
    "return_flat_raw_top_logprobs: without log-probs": generate(return_flat_raw_top_logprobs=True),
    "return_text_in_logprobs: a text": generate(return_logprob=True, return_text_in_logprobs="x"),
    # --- the other fields ---
    "rid: a number": generate(rid=5),
    "rid: a list for one prompt": generate(rid=["a"]),
    "rid: twice in a batch": generate(input_ids=[[5], [6]], rid=["a", "a"]),
    "rid: too few": generate(input_ids=[[5], [6]], rid=["a"]),
    "rid: numbers": generate(input_ids=[[5], [6]], rid=[1, 2]),
    "rid: a lone surrogate": generate(rid="\ud800"),
    "rid: a health check's": generate(rid="HEALTH_CHECK_1", input_ids=[VOCAB]),
    "stream: a text": generate(stream="x"),
    "stream: of a bad id": generate(stream=True, input_ids=[VOCAB]),
    "stream: of a batch with a bad id": generate(stream=True, input_ids=[[5], [-1]]),
    "stream: of an empty text": generate(stream=True, input_ids=..., text=""),
    "n = 2 of a bad id": generate(input_ids=[VOCAB], sampling_params={"n": 2, "max_new_tokens": 2}),
    "n = 2 of a bad row": generate(input_ids=[[5], [-1]], sampling_params={"n": 2, "max_new_tokens": 2}),
    "return_hidden_states: a text": generate(return_hidden_states="x"),
    "return_hidden_states: the last": generate(return_hidden_states="last"),
    "return_hidden_states: a number": generate(return_hidden_states=5),
    "return_hidden_states: too few": generate(input_ids=[[5], [6]], return_hidden_states=[True]),
    "return_hidden_states: a list for one prompt": generate(return_hidden_states=[True]),
    "return_routed_experts: of a dense model": generate(return_routed_experts=True),
    "routed_experts_start_len: -1": generate(return_routed_experts=True, routed_experts_start_len=-1),
    "return_indexer_topk: of a model without": generate(return_indexer_topk=True),
    "return_sampling_mask: of everything": generate(
        return_sampling_mask=True, sampling_params={"max_new_tokens": 2, "temperature": 1.0}
    ),
    "sampling_logprobs_mode: alone": generate(sampling_logprobs_mode="selected"),
    "sampling_logprobs_mode: unknown": generate(return_sampling_mask=True, sampling_logprobs_mode="x"),
    "lora_path: of none": generate(lora_path="nothing"),
    "lora_path: a number": generate(lora_path=5),
    "lora_path: too few": generate(input_ids=[[5], [6]], lora_path=["a"]),
    "lora_id: of none": generate(lora_id="nothing"),
    "session_params: an unknown session": generate(session_params={"id": "nothing"}),
    "session_params: id 5": generate(session_params={"id": 5}),
    "session_params: an unknown field": generate(session_params={"id": "nothing", "nope": 1}),
    "session_params: a text": generate(session_params="x"),
    "session_params: an empty turn": generate(session_params={"id": "nothing"}, input_ids=[]),
    "session_id: a number": generate(session_id=5),
    "session_id beside session_params": generate(session_id="a", session_params={"id": "b"}),
    "custom_logit_processor: not taken": generate(custom_logit_processor='{"callable": "00"}'),
    "custom_logit_processor: a number": generate(custom_logit_processor=5),
    "bootstrap_room: a text": generate(bootstrap_room="x"),
    "bootstrap_room: 2**70": generate(bootstrap_room=2**70),
    "bootstrap_port: a text": generate(bootstrap_host="h", bootstrap_port="x", bootstrap_room=1),
    "bootstrap_room: too few": generate(input_ids=[[5], [6]], bootstrap_room=[1]),
    "routed_dp_rank: 5": generate(routed_dp_rank=5),
    "routed_dp_rank: a text": generate(routed_dp_rank="x"),
    "data_parallel_rank: -1": generate(data_parallel_rank=-1),
    "priority: a text": generate(priority="x"),
    "priority: 2**70": generate(priority=2**70),
    "kv_hints: a text": generate(kv_hints="x"),
    "kv_hints: an object": generate(kv_hints={"x": 1}),
    "extra_key: a number": generate(extra_key=5),
    "cache_salt: too few": generate(input_ids=[[5], [6]], cache_salt=["a"]),
    "routing_key: a number": generate(routing_key=5),
    "conversation_id: a number": generate(conversation_id=5),
    "http_worker_ipc: a client's": generate(http_worker_ipc="ipc:///tmp/nowhere"),
    "max_thinking_tokens: not taken": generate(max_thinking_tokens=5),
    "multi_item_delimiter_indices: behind the prompt": generate(multi_item_delimiter_indices=[100]),
    "multi_item_delimiter_indices: negative": generate(
        multi_item_delimiter_indices=[-5], return_logprob=True, logprob_start_len=0
    ),
    "multi_item_delimiter_indices: texts": generate(multi_item_delimiter_indices=["x"]),
    "token_indices_to_pool: behind the prompt": generate(token_indices_to_pool=[100]),
    "token_indices_to_pool: negative": generate(token_indices_to_pool=[-7]),
    "positional_embed_overrides: a text": generate(positional_embed_overrides="x"),
    "positional_embed_overrides: an object": generate(positional_embed_overrides={"embeds": [[1.0]], "positions": [0]}),
    "encoder_urls: a number": generate(encoder_urls=5),
    "need_wait_for_mm_inputs": generate(need_wait_for_mm_inputs=True, num_items_assigned={"image": [1]}),
    "a field that nobody knows": generate(nonsense=5),
    "background: a text": generate(background="x"),
    "received_time: a text": generate(received_time="x"),
    # --- bodies ---
    "body: no JSON": Bad("/generate", b"{"),
    "body: empty": Bad("/generate", b""),
    "body: a number": Bad("/generate", b"5"),
    "body: null": Bad("/generate", b"null"),
    "body: a list": Bad("/generate", b"[1, 2]"),
    "body: bytes that are no UTF-8": Bad("/generate", b"\xff\xfe{}"),
    "body: deeply nested": Bad("/generate", b"[" * 100_000),
    "body: 30 MB of text": Bad("/generate", b'{"text": "' + b"a" * 30_000_000 + b'"}'),
    # --- OpenAI's routes ---
    "completions: an id over the vocabulary": complete(prompt=[5, VOCAB]),
    "completions: an id in a row": complete(prompt=[[5], [VOCAB]]),
    "completions: a negative id": complete(prompt=[-1]),
    "completions: an empty prompt": complete(prompt=[]),
    "completions: an empty row": complete(prompt=[[5], []]),
    "completions: an empty text": complete(prompt=""),
    "completions: empty texts": complete(prompt=["a", ""]),
    "completions: null": complete(prompt=None),
    "completions: floats": complete(prompt=[1.5]),
    "completions: 2**70": complete(prompt=[2**70]),
    "completions: a lone surrogate": complete(prompt="\ud800"),
    "completions: max_tokens -1": complete(max_tokens=-1),
    "completions: max_tokens of text": complete(max_tokens="x"),
    "completions: temperature -1": complete(temperature=-1),
    "completions: n 0": complete(n=0),
    "completions: n 10**12": complete(n=10**12),
    "completions: logprobs over the vocabulary": complete(logprobs=VOCAB + 1),
    "completions: logprobs of the prompt over the vocabulary": complete(logprobs=VOCAB + 1, echo=True),
    "completions: logprobs -1": complete(logprobs=-1),
    "completions: stop of numbers": complete(stop=[5]),
    "completions: logit_bias of no id": complete(logit_bias={"x": 1}),
    "completions: logit_bias over the vocabulary": complete(logit_bias={str(VOCAB): 1}),
    "completions: repetition_penalty 1e-300": complete(repetition_penalty=1e-300, temperature=1),
    "completions: stream of a bad id": complete(prompt=[VOCAB], stream=True),
    "completions: stream of an empty text": complete(prompt="", stream=True),
    "completions: no prompt": Bad("/v1/completions", {"model": "default"}),
    "chat: no messages": chat(messages=[]),
    "chat: a text": chat(messages="hi"),
    "chat: a message without a role": chat(messages=[{"content": "hi"}]),
    "chat: a message without content": chat(messages=[{"role": "user"}]),
    "chat: content of numbers": chat(messages=[{"role": "user", "content": 5}]),
    "chat: an unknown role": chat(messages=[{"role": 5, "content": "hi"}]),
    "chat: a lone surrogate": chat(messages=[{"role": "user", "content": "\ud800"}]),
    "chat: an image for a text model": chat(
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            }
        ]
    ),
    "chat: top_logprobs over the vocabulary": chat(logprobs=True, top_logprobs=VOCAB + 1),
    "chat: top_logprobs -1": chat(logprobs=True, top_logprobs=-1),
    "chat: tools of text": chat(tools="x"),
    "chat: a tool without a function": chat(tools=[{"type": "function"}]),
    "chat: a tool's broken schema": chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
        tool_choice="required",
    ),
    "chat: tool_choice of nothing": chat(tool_choice={"type": "function", "function": {"name": "nothing"}}),
    "chat: response_format unknown": chat(response_format={"type": "nonsense"}),
    "chat: response_format's broken schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    ),
    "chat: n 0": chat(n=0),
    "chat: n 10**12": chat(n=10**12),
    "chat: temperature of text": chat(temperature="x"),
    "chat: temperature 1e300": chat(temperature=1e300),
    "chat: max_completion_tokens -1": chat(max_completion_tokens=-1),
    "chat: logit_bias over the vocabulary": chat(logit_bias={str(VOCAB): 1}),
    "chat: stop_token_ids over the vocabulary": chat(stop_token_ids=[VOCAB], min_tokens=1),
    "chat: a template's arguments": chat(chat_template_kwargs="x"),
    "chat: seed 2**70": chat(seed=2**70),
    "chat: stream with an unknown tool": chat(stream=True, tools=5),
    "chat: a regex unclosed": chat(regex="("),
    "responses: no input": Bad("/v1/responses", {"model": "default"}),
    "responses: numbers": Bad("/v1/responses", {"model": "default", "input": 5}),
    "responses: max_output_tokens -1": Bad(
        "/v1/responses", {"model": "default", "input": "a", "max_output_tokens": -1}
    ),
    "messages: no messages": Bad("/v1/messages", {"model": "default", "max_tokens": 2, "messages": []}),
    "messages: max_tokens -1": Bad(
        "/v1/messages", {"model": "default", "max_tokens": -1, "messages": [{"role": "user", "content": "a"}]}
    ),
    "score: a label over the vocabulary": score(label_token_ids=[VOCAB]),
    "score: a negative label": score(label_token_ids=[-1]),
    "score: no labels": score(label_token_ids=[]),
    "score: a query over the vocabulary": score(query=[VOCAB]),
    "score: a negative id": score(items=[[5], [-1]]),
    "score: nothing at all": score(query=[], items=[[]]),
    "score: an empty text": score(query="", items=[""]),
    "score: no items": score(items=[]),
    "score: text and ids": score(query="a", items=[[5]]),
    "score: an override of a wrong width": score(embed_override_token_id=5, query_embed_overrides=[[1.0, 2.0]]),
    "score: temperature 1e-300": score(temperature=1e-300),
    "embeddings: of a model that generates": Bad("/v1/embeddings", {"model": "default", "input": "a"}),
    "embeddings: an id over the vocabulary": Bad("/v1/embeddings", {"model": "default", "input": [VOCAB]}),
    "encode: of a model that generates": Bad("/encode", {"text": "a"}),
    "encode: an empty text": Bad("/encode", {"text": ""}),
    "encode: an id over the vocabulary": Bad("/encode", {"input_ids": [VOCAB]}),
    "classify: of a model that generates": Bad("/classify", {"text": "a"}),
    "rerank: of a model that generates": Bad("/v1/rerank", {"query": "a", "documents": ["b"]}),
    "tokenize: a number": Bad("/tokenize", {"prompt": 5}),
    "tokenize: a lone surrogate": Bad("/tokenize", {"prompt": "\ud800"}),
    "detokenize: a negative id": Bad("/detokenize", {"tokens": [-1]}),
    "detokenize: 2**70": Bad("/detokenize", {"tokens": [2**70]}),
    "ollama: no prompt": Bad("/api/generate", {"model": "x"}),
    "ollama: an empty prompt": Bad("/api/generate", {"model": "x", "prompt": "", "stream": False}),
    "sagemaker: no messages": Bad("/invocations", {"model": "default", "messages": []}),
    "vertex: nothing": Bad("/vertex_generate", {"instances": []}),
    "vertex: an id over the vocabulary": Bad("/vertex_generate", {"instances": [{"input_ids": [VOCAB]}]}),
    # --- the server half's own route ---
    "vectors: an id over the vocabulary": vectors(input=[[5, VOCAB]]),
    "vectors: a negative id": vectors(input=[[5], [-1]]),
    "vectors: an empty row": vectors(input=[[5], []]),
    "vectors: nothing": vectors(input=[]),
    "vectors: an empty text": vectors(input=""),
    "vectors: a lone surrogate": vectors(input="\ud800"),
    "vectors: no layer of the model": vectors(layers=[999]),
    "vectors: no JSON": Bad("/v1/hidden_states", b"{"),
    "vectors: 2**70": vectors(input=[[2**70]]),
    "vectors: an unknown field": vectors(nonsense=1),
    # --- control ---
    "abort_request: rid 5": Bad("/abort_request", {"rid": 5}),
    "abort_request: nothing": Bad("/abort_request", {}),
    "abort_request: an unknown rid": Bad("/abort_request", {"rid": "nothing"}),
    "open_session: a text": Bad("/open_session", {"capacity_of_str_len": "x"}),
    "open_session: timeout of text": Bad("/open_session", {"capacity_of_str_len": 5, "timeout": "x"}),
    "open_session: id 5": Bad("/open_session", {"capacity_of_str_len": 5, "session_id": 5}),
    "close_session: an unknown one": Bad("/close_session", {"session_id": "nothing"}),
    "close_session: id 5": Bad("/close_session", {"session_id": 5}),
    "set_internal_state: unknown": Bad("/set_internal_state", {"server_args": {"nonsense": 1}}),
    "set_internal_state: of text": Bad("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": "x"}}),
    "set_internal_state: 2**70": Bad("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 2**70}}),
    "set_internal_state: a text": Bad("/set_internal_state", {"server_args": "x"}),
    "start_profile: output_dir 5": Bad("/start_profile", {"output_dir": 5}),
    "start_profile: a path that cannot be": Bad(
        "/start_profile", {"output_dir": "/proc/nowhere/x", "num_steps": 1, "activities": ["CPU"]}
    ),
    "start_profile: an unknown activity": Bad("/start_profile", {"activities": ["nonsense"], "num_steps": 1}),
    "start_profile: num_steps -1": Bad("/start_profile", {"num_steps": -1, "activities": ["CPU"]}),
    "stop_profile: of none": Bad("/stop_profile", {}),
    "start_expert_distribution_record: of a dense model": Bad("/start_expert_distribution_record", {}),
    "dump_expert_distribution_record: of a dense model": Bad("/dump_expert_distribution_record", {}),
    "configure_logging: of text": Bad("/configure_logging", {"log_requests": "x"}),
    "configure_logging: a level of text": Bad("/configure_logging", {"log_requests_level": "x"}),
    "update_weights_from_disk: nowhere": Bad("/update_weights_from_disk", {"model_path": "/nowhere"}),
    "update_weights_from_disk: path 5": Bad("/update_weights_from_disk", {"model_path": 5}),
    "update_weights_from_disk: an unknown format": Bad(
        "/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "nonsense"}
    ),
    "update_weights_from_tensor: garbage": Bad(
        "/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "flush_cache": True}
    ),
    "update_weights_from_tensor: none": Bad("/update_weights_from_tensor", {"serialized_named_tensors": []}),
    "update_weights_from_tensor: an unknown format": Bad(
        "/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"], "load_format": "nonsense"}
    ),
    "update_weights_from_distributed: no group": Bad(
        "/update_weights_from_distributed", {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]]}
    ),
    "update_weights_from_distributed: an unknown dtype": Bad(
        "/update_weights_from_distributed", {"names": ["x"], "dtypes": ["nonsense"], "shapes": [[1]]}
    ),
    "update_weights_from_ipc: garbage": Bad("/update_weights_from_ipc", {"zmq_handles": {"x": "y"}}),
    "destroy_weights_update_group: of none": Bad("/destroy_weights_update_group", {"group_name": "nothing"}),
    "init_weights_update_group: port of text": Bad(
        "/init_weights_update_group",
        {"master_address": "h", "master_port": "x", "rank_offset": 0, "world_size": 2},
    ),
    "end_weight_update: of none": Bad("/end_weight_update", {}),
    "send_weights_to_remote_instance: to none": Bad(
        "/send_weights_to_remote_instance", {"master_address": "127.0.0.1", "ports": "x"}
    ),
    "get_weights_by_name: unknown": Bad("/get_weights_by_name", {"name": "nothing"}),
    "get_weights_by_name: name 5": Bad("/get_weights_by_name", {"name": 5}),
    "get_weights_by_name: truncate_size -5": Bad(
        "/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": -5}
    ),
    "update_weight_version: a number": Bad("/update_weight_version", {"new_version": 5}),
    "weights_checker: unknown": Bad("/weights_checker", {"action": "nonsense"}),
    "load_lora_adapter: nowhere": Bad("/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}),
    "unload_lora_adapter: unknown": Bad("/unload_lora_adapter", {"lora_name": "x"}),
    "load_lora_adapter_from_tensors: garbage": Bad(
        "/load_lora_adapter_from_tensors", {"lora_name": "x", "serialized_tensors": "AAAA", "config_dict": {}}
    ),
    "slow_down: of text": Bad("/slow_down", {"forward_sleep_time": "x"}),
    "pause_generation: an unknown mode": Bad("/pause_generation", {"mode": "nonsense"}),
    "pd_role_switch: not taken": Bad("/pd_role_switch", {"new_role": "prefill"}),
    "hicache: clear without one": Bad("/hicache/storage-backend/clear", {}),
    "parse_function_call: an unknown parser": Bad(
        "/parse_function_call", {"text": "x", "tools": [], "tool_call_parser": "nonsense"}
    ),
    "separate_reasoning: an unknown parser": Bad("/separate_reasoning", {"text": "x", "reasoning_parser": "nonsense"}),
    "add_external_corpus: without speculation": Bad("/add_external_corpus", {"corpus_id": "x", "documents": ["y"]}),
}
