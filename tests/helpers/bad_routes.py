"""Bad bodies, and bad requests for the routes beside ``/generate``: those of OpenAI, of scores, vectors and control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers.bad_requests import VOCAB, Bad


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


# No model's context has room for it, and to tokenize it takes seconds.
LONG = "word " * 1_000_000
LONG_CHAT = [{"role": "user", "content": LONG}]

BAD_ROUTES: Mapping[str, Bad] = {
    # --- bodies ---
    "body: no JSON": Bad("/generate", b"{", "'type': 'json_invalid'"),
    "body: empty": Bad("/generate", b"", "'type': 'missing'"),
    "body: a number": Bad("/generate", b"5", "'type': 'dataclass_type'"),
    "body: null": Bad("/generate", b"null", "'type': 'dataclass_type'"),
    "body: a list": Bad("/generate", b"[1, 2]", "'type': 'dataclass_type'"),
    "body: bytes that are no UTF-8": Bad("/generate", b"\xff\xfe{}", "'type': 'json_invalid'"),
    "body: deeply nested": Bad("/generate", b"[" * 100_000, "'type': 'json_invalid'"),
    "body: 30 MB of text": Bad(
        "/generate", b'{"text": "' + b"a" * 30_000_000 + b'"}', "row 0: the text has 30000000 characters"
    ),
    "completions: an id over the vocabulary": complete(
        "row 0: token id 49152 at position 1 is outside the vocabulary of", prompt=[5, VOCAB]
    ),
    "completions: an id in a row": complete(
        "row 1: token id 49152 at position 0 is outside the vocabulary of", prompt=[[5], [VOCAB]]
    ),
    "completions: a negative id": complete(
        "row 0: token id -1 at position 0 is outside the vocabulary of 49152", prompt=[-1]
    ),
    "completions: an empty prompt": complete("Prompt cannot be empty", prompt=[]),
    "completions: an empty row": complete("row 1: the prompt has 0 tokens; SGLang needs at least 1", prompt=[[5], []]),
    "completions: an empty text": complete("Prompt cannot be empty", prompt=""),
    "completions: empty texts": complete("row 1: the prompt has 0 tokens; SGLang needs at least 1", prompt=["a", ""]),
    "completions: null": complete("'type': 'list_type'", prompt=None),
    "completions: floats": complete("'type': 'int_from_float'", prompt=[1.5]),
    "completions: 2**70": complete("'type': 'int_parsing_size'", prompt=[2**70]),
    "completions: a lone surrogate": complete("'type': 'json_invalid'", prompt="\ud800"),
    "completions: max_tokens -1": complete("'type': 'value_error'", max_tokens=-1),
    "completions: max_tokens of text": complete("'type': 'int_parsing'", max_tokens="x"),
    "completions: temperature -1": complete(
        "row 0: temperature=-1.0: Temperature must be non-negative, expected a", temperature=-1
    ),
    "completions: n 0": complete("row 0: n=0: expected an integer in 1..4096", n=0),
    "completions: n 10**12": complete("row 0: n=1000000000000: expected an integer in 1..4096", n=10**12),
    "completions: logprobs over the vocabulary": complete(
        "row 0: top_logprobs_num=49153: expected an integer in 0..49152, the", logprobs=VOCAB + 1
    ),
    "completions: logprobs of the prompt over the vocabulary": complete(
        "row 0: top_logprobs_num=49153: expected an integer in 0..49152, the", logprobs=VOCAB + 1, echo=True
    ),
    "completions: logprobs -1": complete(
        "row 0: top_logprobs_num=-1: expected an integer in 0..49152, the", logprobs=-1
    ),
    "completions: stop of numbers": complete("'type': 'string_type'", stop=[5]),
    "completions: logit_bias of no id": complete(
        "row 0: logit_bias={'x': 1.0}: expected a dict of token id to a number", logit_bias={"x": 1}
    ),
    "completions: logit_bias over the vocabulary": complete(
        "row 0: logit_bias must has keys in [0, 49151], got 49152", logit_bias={str(VOCAB): 1}
    ),
    "completions: repetition_penalty 1e-300": complete(
        "row 0: repetition_penalty=1e-300: repetition_penalty must be", repetition_penalty=1e-300, temperature=1
    ),
    "completions: stream of a bad id": complete(
        "row 0: token id 49152 at position 0 is outside the vocabulary of", prompt=[VOCAB], stream=True
    ),
    "completions: stream of an empty text": complete("Prompt cannot be empty", prompt="", stream=True),
    "completions: no prompt": Bad("/v1/completions", {"model": "default"}, "'type': 'missing'"),
    "chat: no messages": chat("Messages cannot be empty", messages=[]),
    "chat: a text": chat("'type': 'list_type'", messages="hi"),
    "chat: a message without a role": chat("'type': 'missing'", messages=[{"content": "hi"}]),
    "chat: a message without content": chat("'type': 'value_error'", messages=[{"role": "user"}]),
    "chat: content of numbers": chat("'type': 'value_error'", messages=[{"role": "user", "content": 5}]),
    "chat: an unknown role": chat("'type': 'value_error'", messages=[{"role": 5, "content": "hi"}]),
    "chat: a lone surrogate": chat("'type': 'json_invalid'", messages=[{"role": "user", "content": "\ud800"}]),
    "chat: an image for a text model": chat(
        "Model only supports text input; received unsupported content type",
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            }
        ],
    ),
    "chat: top_logprobs over the vocabulary": chat(
        "row 0: top_logprobs_num=49153: expected an integer in 0..49152, the", logprobs=True, top_logprobs=VOCAB + 1
    ),
    "chat: top_logprobs -1": chat(
        "row 0: top_logprobs_num=-1: expected an integer in 0..49152, the", logprobs=True, top_logprobs=-1
    ),
    "chat: tools of text": chat("'type': 'list_type'", tools="x"),
    "chat: a tool without a function": chat("'type': 'missing'", tools=[{"type": "function"}]),
    "chat: a tool's broken schema": chat(
        "Tool 0 function has invalid 'parameters' schema: 5 is not valid under",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
        tool_choice="required",
    ),
    "chat: tool_choice of nothing": chat(
        "Tools cannot be empty if tool choice is set to a specific tool",
        tool_choice={"type": "function", "function": {"name": "nothing"}},
    ),
    "chat: response_format unknown": chat("'type': 'literal_error'", response_format={"type": "nonsense"}),
    "chat: response_format's broken schema": chat(
        "row 0: Failed to compile json grammar",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
    ),
    "chat: n 0": chat("row 0: n=0: expected an integer in 1..4096", n=0),
    "chat: n 10**12": chat("row 0: n=1000000000000: expected an integer in 1..4096", n=10**12),
    "chat: temperature of text": chat("'type': 'float_parsing'", temperature="x"),
    "chat: temperature 1e300": chat(temperature=1e300),
    "chat: max_completion_tokens -1": chat(
        "row 0: max_new_tokens=-1: expected an integer of at least 0 (0 reads", max_completion_tokens=-1
    ),
    "chat: logit_bias over the vocabulary": chat(
        "row 0: logit_bias must has keys in [0, 49151], got 49152", logit_bias={str(VOCAB): 1}
    ),
    "chat: stop_token_ids over the vocabulary": chat(
        "row 0: stop_token_ids has id 49152, outside the vocabulary of 49152", stop_token_ids=[VOCAB], min_tokens=1
    ),
    "chat: a template's arguments": chat("'type': 'dict_type'", chat_template_kwargs="x"),
    "chat: a template's argument of the server's own": chat(
        "chat_template_kwargs has 'tokenize', which is the server's own", chat_template_kwargs={"tokenize": True}
    ),
    "chat: a million words": chat("messages and tools, with their fields' names, have 50000", messages=LONG_CHAT),
    "chat: a million words in parts": chat(
        "messages and tools, with their fields' names, have 50000",
        messages=[{"role": "user", "content": [{"type": "text", "text": LONG}]}],
    ),
    "chat: seed 2**70": chat("'type': 'int_parsing_size'", seed=2**70),
    "chat: stream with an unknown tool": chat("'type': 'list_type'", stream=True, tools=5),
    "chat: a regex unclosed": chat("row 0: Failed to compile regex grammar", regex="("),
    "responses: no input": Bad("/v1/responses", {"model": "default"}, "'type': 'missing'"),
    "responses: numbers": Bad("/v1/responses", {"model": "default", "input": 5}, "'type': 'string_type'"),
    "responses: max_output_tokens -1": Bad(
        "/v1/responses",
        {"model": "default", "input": "a", "max_output_tokens": -1},
        "The model 'default' does not exist",
    ),
    "messages: no messages": Bad(
        "/v1/messages", {"model": "default", "max_tokens": 2, "messages": []}, "Messages cannot be empty"
    ),
    "messages: max_tokens -1": Bad(
        "/v1/messages",
        {"model": "default", "max_tokens": -1, "messages": [{"role": "user", "content": "a"}]},
        "max_tokens: Value error, max_tokens must be positive",
    ),
    "messages: a million words": Bad(
        "/v1/messages",
        {"model": "default", "max_tokens": 2, "messages": LONG_CHAT},
        "messages and tools, with their fields' names, have 50000",
    ),
    "count_tokens: a million words": Bad(
        "/v1/messages/count_tokens",
        {"model": "default", "messages": LONG_CHAT},
        "messages and tools, with their fields' names, have 50000",
    ),
    "score: a label over the vocabulary": score(
        "Token ID 49152 is out of vocabulary (vocab size: 49152)", label_token_ids=[VOCAB]
    ),
    "score: a negative label": score("label_token_ids must contain nonnegative integers", label_token_ids=[-1]),
    "score: no labels": score("label_token_ids must be a nonempty list", label_token_ids=[]),
    "score: a query over the vocabulary": score(
        "row 0: token id 49152 at position 0 is outside the vocabulary of", query=[VOCAB]
    ),
    "score: a negative id": score(
        "row 1: token id -1 at position 2 is outside the vocabulary of 49152", items=[[5], [-1]]
    ),
    "score: nothing at all": score("row 0: the prompt has 0 tokens; SGLang needs at least 1", query=[], items=[[]]),
    "score: an empty text": score("row 0: the prompt has 0 tokens; SGLang needs at least 1", query="", items=[""]),
    "score: no items": score(items=[]),
    "score: text and ids": score(query="a", items=[[5]]),
    "score: an override of a wrong width": score(
        "query_embed_overrides has 2 numbers at position 0; expected 576",
        embed_override_token_id=5,
        query_embed_overrides=[[1.0, 2.0]],
    ),
    "score: ragged overrides": score(
        "query_embed_overrides has 1 numbers at position 1; expected 576",
        query=[5, 5],
        embed_override_token_id=5,
        query_embed_overrides=[[1.0] * 576, [1.0]],
    ),
    "score: a million words": score("query and items have 5000001 characters", query=LONG, items=["a"]),
    "score: temperature 1e-300": score("temperature requires apply_softmax=True", temperature=1e-300),
    "embeddings: of a model that generates": Bad(
        "/v1/embeddings",
        {"model": "default", "input": "a"},
        "row 0: This model does not appear to be an embedding model by",
    ),
    "embeddings: an id over the vocabulary": Bad(
        "/v1/embeddings",
        {"model": "default", "input": [VOCAB]},
        "row 0: This model does not appear to be an embedding model by",
    ),
    "encode: of a model that generates": Bad(
        "/encode", {"text": "a"}, "row 0: This model does not appear to be an embedding model by"
    ),
    "encode: an empty text": Bad("/encode", {"text": ""}, "row 0: the prompt has 0 tokens; SGLang needs at least 1"),
    "encode: an id over the vocabulary": Bad(
        "/encode", {"input_ids": [VOCAB]}, "row 0: This model does not appear to be an embedding model by"
    ),
    "classify: of a model that generates": Bad(
        "/classify", {"text": "a"}, "row 0: This model does not appear to be an embedding model by"
    ),
    "rerank: of a model that generates": Bad(
        "/v1/rerank",
        {"query": "a", "documents": ["b"]},
        "row 0: This model does not appear to be an embedding model by",
    ),
    "tokenize: a number": Bad("/tokenize", {"prompt": 5}, "'type': 'list_type'"),
    "tokenize: a lone surrogate": Bad("/tokenize", {"prompt": "\ud800"}, "'type': 'json_invalid'"),
    "tokenize: a million words": Bad("/tokenize", {"prompt": LONG}, "the texts have 5000000 characters"),
    "tokenize: a million words in rows": Bad(
        "/tokenize", {"prompt": ["word " * 1000] * 1000}, "the texts have 5000000 characters"
    ),
    "tokenize: a chat of a million words": Bad(
        "/tokenize", {"messages": LONG_CHAT}, "messages and tools, with their fields' names, have 50000"
    ),
    "detokenize: 2**70": Bad("/detokenize", {"tokens": [2**70]}, "'type': 'int_parsing_size'"),
    "detokenize: a negative id": Bad(
        "/detokenize", {"tokens": [5, -1]}, "row 0: token id -1 at position 1 is outside the vocabulary of 49152"
    ),
    "ollama: no prompt": Bad("/api/generate", {"model": "x"}, "'type': 'missing'"),
    "ollama: an empty prompt": Bad("/api/generate", {"model": "x", "prompt": "", "stream": False}),
    "ollama: options that are none": Bad(
        "/api/generate", {"model": "x", "prompt": "a", "options": {"top_k": -9}}, "row 0: top_k=-9"
    ),
    "ollama: a chat's options that are none": Bad(
        "/api/chat",
        {"model": "x", "messages": [{"role": "user", "content": "a"}], "options": {"num_predict": -2}},
        "row 0: max_new_tokens=-2",
    ),
    "ollama: a chat of a million words": Bad(
        "/api/chat", {"model": "x", "messages": LONG_CHAT}, "the messages have 5000000 characters"
    ),
    "sagemaker: no messages": Bad("/invocations", {"model": "default", "messages": []}, "Messages cannot be empty"),
    "vertex: nothing": Bad("/vertex_generate", {"instances": []}),
    "vertex: an id over the vocabulary": Bad(
        "/vertex_generate",
        {"instances": [{"input_ids": [VOCAB]}]},
        "row 0: token id 49152 at position 0 is outside the vocabulary of",
    ),
    # --- the server half's own route ---
    "vectors: an id over the vocabulary": vectors(
        "row 0: token id 49152 at position 1 is outside the vocabulary of", input=[[5, VOCAB]]
    ),
    "vectors: a negative id": vectors(
        "row 1: token id -1 at position 0 is outside the vocabulary of 49152", input=[[5], [-1]]
    ),
    "vectors: an empty row": vectors("row 1: the prompt has 0 tokens; SGLang needs at least 1", input=[[5], []]),
    "vectors: nothing": vectors("input=[] has 0 rows; give at least 1 prompt", input=[]),
    "vectors: an empty text": vectors("row 0: an empty text, 0 tokens; SGLang needs at least 1", input=""),
    "vectors: a lone surrogate": vectors(
        "row 0: has '\\ud800' at character 0, half of a surrogate pair and no", input="\ud800"
    ),
    "vectors: no layer of the model": vectors(
        "layers=999: the model has 30 layers; use 0..29, -1 for the final", layers=[999]
    ),
    "vectors: no JSON": Bad(
        "/v1/hidden_states", b"{", "the body is no JSON (Expecting property name enclosed in double"
    ),
    "vectors: 2**70": vectors("row 0: token id 1180591620717411303424 at position 0 is outside the", input=[[2**70]]),
    "vectors: an unknown field": vectors("unknown field 'nonsense': known: input, images, model, segments", nonsense=1),
    # --- control ---
    "abort_request: rid 5": Bad("/abort_request", {"rid": 5}, "'type': 'is_instance_of'"),
    "abort_request: nothing": Bad("/abort_request", {}),
    "abort_request: an unknown rid": Bad("/abort_request", {"rid": "nothing"}),
    "open_session: a text": Bad("/open_session", {"capacity_of_str_len": "x"}, "'type': 'is_instance_of'"),
    "open_session: timeout of text": Bad(
        "/open_session", {"capacity_of_str_len": 5, "timeout": "x"}, "'type': 'is_instance_of'"
    ),
    "open_session: id 5": Bad("/open_session", {"capacity_of_str_len": 5, "session_id": 5}, "'type': 'is_instance_of'"),
    "close_session: an unknown one": Bad("/close_session", {"session_id": "nothing"}),
    "close_session: id 5": Bad("/close_session", {"session_id": 5}, "'type': 'is_instance_of'"),
    "set_internal_state: unknown": Bad("/set_internal_state", {"server_args": {"nonsense": 1}}),
    "set_internal_state: of text": Bad(
        "/set_internal_state", {"server_args": {"pp_max_micro_batch_size": "x"}}, "'type': 'is_instance_of'"
    ),
    "set_internal_state: 2**70": Bad("/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 2**70}}),
    "set_internal_state: a text": Bad("/set_internal_state", {"server_args": "x"}, "'type': 'is_instance_of'"),
    "start_profile: by stages without end": Bad(
        "/start_profile", {"profile_by_stage": True, "activities": ["CPU"]}, "profile_by_stage=true without num_steps"
    ),
    "start_profile: output_dir 5": Bad("/start_profile", {"output_dir": 5}, "'type': 'is_instance_of'"),
    "start_profile: a path that cannot be": Bad(
        "/start_profile",
        {"output_dir": "/proc/nowhere/x", "num_steps": 1, "activities": ["CPU"]},
        "output_dir='/proc/nowhere/x' cannot be written to",
    ),
    "stop_profile: of none": Bad("/stop_profile", {}, "Profiling is not in progress"),
    "start_expert_distribution_record: of a dense model": Bad(
        "/start_expert_distribution_record", {}, "ExpertDistributionReq failed"
    ),
    "dump_expert_distribution_record: of a dense model": Bad(
        "/dump_expert_distribution_record", {}, "ExpertDistributionReq failed"
    ),
    "configure_logging: of text": Bad("/configure_logging", {"log_requests": "x"}, "'type': 'is_instance_of'"),
    "configure_logging: a level of text": Bad(
        "/configure_logging", {"log_requests_level": "x"}, "'type': 'is_instance_of'"
    ),
    "configure_logging: level 99": Bad(
        "/configure_logging", {"log_requests": True, "log_requests_level": 99}, "log_requests_level=99: expected an"
    ),
    "configure_logging: an unknown level": Bad(
        "/configure_logging", {"log_level": "nonsense"}, "log_level='nonsense': expected the name of a level"
    ),
    "update_weights_from_disk: nowhere": Bad(
        "/update_weights_from_disk",
        {"model_path": "/nowhere"},
        "Failed to get weights iterator: Invalid HF URI 'hf:///nowhere",
    ),
    "update_weights_from_disk: path 5": Bad("/update_weights_from_disk", {"model_path": 5}, "'type': 'is_instance_of'"),
    "update_weights_from_disk: an unknown format": Bad(
        "/update_weights_from_disk",
        {"model_path": "/nowhere", "load_format": "nonsense"},
        "load_format='nonsense': expected one of",
    ),
    "update_weights_from_tensor: garbage": Bad(
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["AAAA"], "flush_cache": True},
        "unpickles what it is sent, which can run code; use",
    ),
    "update_weights_from_tensor: none": Bad(
        "/update_weights_from_tensor",
        {"serialized_named_tensors": []},
        "unpickles what it is sent, which can run code; use",
    ),
    "update_weights_from_tensor: an unknown format": Bad(
        "/update_weights_from_tensor",
        {"serialized_named_tensors": ["AAAA"], "load_format": "nonsense"},
        "unpickles what it is sent, which can run code; use",
    ),
    "update_weights_from_distributed: no group": Bad(
        "/update_weights_from_distributed",
        {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]]},
        "update_weights_from_distributed must run between",
    ),
    "update_weights_from_distributed: an unknown dtype": Bad(
        "/update_weights_from_distributed",
        {"names": ["x"], "dtypes": ["nonsense"], "shapes": [[1]]},
        "update_weights_from_distributed must run between",
    ),
    "update_weights_from_ipc: garbage": Bad(
        "/update_weights_from_ipc",
        {"zmq_handles": {"x": "y"}},
        "unpickles what it is sent, which can run code; use",
    ),
    "destroy_weights_update_group: of none": Bad(
        "/destroy_weights_update_group", {"group_name": "nothing"}, "The group to be destroyed does not exist"
    ),
    "init_weights_update_group: port of text": Bad(
        "/init_weights_update_group",
        {"master_address": "h", "master_port": "x", "rank_offset": 0, "world_size": 2},
        "'type': 'is_instance_of'",
    ),
    "init_weights_update_group: as rank 0": Bad(
        "/init_weights_update_group",
        {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 0, "world_size": 2, "backend": "gloo"},
        "rank_offset=0, world_size=2: rank 0 is the trainer's",
    ),
    "init_weights_update_group: of a trainer that is gone": Bad(
        "/init_weights_update_group",
        {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
            "backend": "gloo",
            "group_name": "torchrl-sglang-hidden-gone",
        },
        "nothing listens at 127.0.0.1:1",
    ),
    "end_weight_update: of none": Bad(
        "/end_weight_update", {}, "no weight-update session is open; call begin_weight_update() first"
    ),
    "send_weights_to_remote_instance: to none": Bad(
        "/send_weights_to_remote_instance",
        {"master_address": "127.0.0.1", "ports": "x"},
        "SendWeightsToRemoteInstanceReqInput failed",
    ),
    "get_weights_by_name: unknown": Bad("/get_weights_by_name", {"name": "nothing"}, "Get parameter by name failed"),
    "get_weights_by_name: name 5": Bad("/get_weights_by_name", {"name": 5}, "'type': 'is_instance_of'"),
    "get_weights_by_name: truncate_size -5": Bad(
        "/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": -5}
    ),
    "update_weight_version: a number": Bad("/update_weight_version", {"new_version": 5}, "'type': 'is_instance_of'"),
    "weights_checker: unknown": Bad("/weights_checker", {"action": "nonsense"}, "Unsupported action='nonsense"),
    "load_lora_adapter: nowhere": Bad(
        "/load_lora_adapter",
        {"lora_name": "x", "lora_path": "/nowhere"},
        '{"rid":null,"http_worker_ipc":null,"success":false,"error_message":"Lo',
    ),
    "unload_lora_adapter: unknown": Bad(
        "/unload_lora_adapter",
        {"lora_name": "x"},
        '{"rid":null,"http_worker_ipc":null,"success":false,"error_message":"Lo',
    ),
    "load_lora_adapter_from_tensors: garbage": Bad(
        "/load_lora_adapter_from_tensors",
        {"lora_name": "x", "serialized_tensors": "AAAA", "config_dict": {}},
        "unpickles what it is sent, which can run code; use",
    ),
    "slow_down: for ever": Bad(
        "/slow_down", {"forward_sleep_time": 1e300}, "forward_sleep_time=1e+300: expected at most 60 seconds"
    ),
    "slow_down: of text": Bad("/slow_down", {"forward_sleep_time": "x"}, "'type': 'is_instance_of'"),
    "pause_generation: an unknown mode": Bad("/pause_generation", {"mode": "nonsense"}, "'type': 'is_instance_of'"),
    "pd_role_switch: not taken": Bad(
        "/pd_role_switch", {"new_role": "prefill"}, "--enable-pd-role-switch is not set on this server"
    ),
    "hicache: clear without one": Bad(
        "/hicache/storage-backend/clear", {}, "Hierarchical cache storage backend cleared"
    ),
    "parse_function_call: an unknown parser": Bad(
        "/parse_function_call", {"text": "x", "tools": [], "tool_call_parser": "nonsense"}, "nonsense"
    ),
    "separate_reasoning: an unknown parser": Bad(
        "/separate_reasoning", {"text": "x", "reasoning_parser": "nonsense"}, "nonsense"
    ),
    "add_external_corpus: without speculation": Bad(
        "/add_external_corpus", {"corpus_id": "x", "documents": ["y"]}, "Ngram speculative decoding is not enabled"
    ),
}
