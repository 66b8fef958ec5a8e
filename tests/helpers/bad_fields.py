"""Bad requests for ``/generate`` by fields beside prompt and sampling parameters: log-probs, names, places."""

from __future__ import annotations

from collections.abc import Mapping

from helpers.bad_requests import VOCAB, Bad, generate

BAD_FIELDS: Mapping[str, Bad] = {
    # --- log-probs ---
    "return_logprob: a text": generate("'type': 'list_type'", return_logprob="x"),
    "return_logprob: too few": generate(
        "return_logprob has 1 values for 2 rows; give one for each, or one for",
        input_ids=[[5], [6]],
        return_logprob=[True],
    ),
    "return_logprob: a list for one prompt": generate(
        "row 0: return_logprob=[True]: Expected `bool`, got `array`", return_logprob=[True]
    ),
    "top_logprobs_num: over the vocabulary": generate(
        "row 0: top_logprobs_num=49153: expected an integer in 0..49152, the",
        return_logprob=True,
        top_logprobs_num=VOCAB + 1,
    ),
    "top_logprobs_num: of the prompt, over the vocabulary": generate(
        "row 0: top_logprobs_num=49153: expected an integer in 0..49152, the",
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=VOCAB + 1,
    ),
    "top_logprobs_num: -1": generate(
        "row 0: top_logprobs_num=-1: expected an integer in 0..49152, the", return_logprob=True, top_logprobs_num=-1
    ),
    "top_logprobs_num: a text": generate("'type': 'list_type'", return_logprob=True, top_logprobs_num="x"),
    "top_logprobs_num: 2**40": generate(
        "row 0: top_logprobs_num=1099511627776: expected an integer in", return_logprob=True, top_logprobs_num=2**40
    ),
    "top_logprobs_num: 2**70": generate("'type': 'list_type'", return_logprob=True, top_logprobs_num=2**70),
    "top_logprobs_num: a list for one prompt": generate(
        "row 0: top_logprobs_num=[5]: expected an integer in 0..49152, the", return_logprob=True, top_logprobs_num=[5]
    ),
    "logprob_start_len: -5": generate(
        "row 0: logprob_start_len=-5: expected an integer of at least 0, or -1",
        return_logprob=True,
        logprob_start_len=-5,
    ),
    "logprob_start_len: behind the prompt": generate(
        "row 0: req.logprob_start_len=100 is higher than the number of input",
        return_logprob=True,
        logprob_start_len=100,
    ),
    "logprob_start_len: a text": generate("'type': 'list_type'", return_logprob=True, logprob_start_len="x"),
    "logprob_start_len: 2**70": generate("'type': 'list_type'", return_logprob=True, logprob_start_len=2**70),
    "logprob_start_len: a list for one prompt": generate(
        "row 0: logprob_start_len=[0]: expected an integer of at least 0, or",
        return_logprob=True,
        logprob_start_len=[0],
    ),
    "token_ids_logprob: over the vocabulary": generate(
        "row 0: token_ids_logprob has id 49152, outside the vocabulary of",
        return_logprob=True,
        token_ids_logprob=[VOCAB],
    ),
    "token_ids_logprob: negative": generate(
        "row 0: token_ids_logprob has id -1, outside the vocabulary of 49152",
        return_logprob=True,
        token_ids_logprob=[-1],
    ),
    "token_ids_logprob: texts": generate("'type': 'list_type'", return_logprob=True, token_ids_logprob=["x"]),
    "token_ids_logprob: nested": generate(
        "row 0: token_ids_logprob=[[5]]: expected a list of token ids", return_logprob=True, token_ids_logprob=[[5]]
    ),
    "token_ids_logprob: 2**70": generate("'type': 'list_type'", return_logprob=True, token_ids_logprob=[2**70]),
    "token_ids_logprob: true": generate(
        "invalid type: boolean `true`, expected a sequence", return_logprob=True, token_ids_logprob=[True]
    ),
    "return_flat_raw_top_logprobs_b64: alone": generate(
        "return_flat_raw_top_logprobs_b64 requires", return_flat_raw_top_logprobs_b64=True
    ),
    "return_flat_raw_top_logprobs: without log-probs": generate(return_flat_raw_top_logprobs=True),
    "return_text_in_logprobs: a text": generate(
        "'type': 'bool_parsing'", return_logprob=True, return_text_in_logprobs="x"
    ),
    # --- the other fields ---
    "rid: a number": generate("'type': 'string_type'", rid=5),
    "rid: a list for one prompt": generate("rid=['a']: expected a string for one prompt", rid=["a"]),
    "rid: twice in a batch": generate(
        "Duplicate request IDs detected within the request: ['a']", input_ids=[[5], [6]], rid=["a", "a"]
    ),
    "rid: too few": generate(
        "The specified rids length mismatch with the batch_size for batch", input_ids=[[5], [6]], rid=["a"]
    ),
    "rid: numbers": generate("'type': 'string_type'", input_ids=[[5], [6]], rid=[1, 2]),
    "rid: a health check's": generate(
        "row 0: rid='HEALTH_CHECK_1': HEALTH_CHECK begins the server's own", rid="HEALTH_CHECK_1"
    ),
    "rid: a health check's, in row 1": generate(
        "row 1: rid='HEALTH_CHECK': HEALTH_CHECK begins the server's own",
        input_ids=[[5], [6]],
        rid=["a", "HEALTH_CHECK"],
    ),
    "stream: a text": generate("'type': 'bool_parsing'", stream="x"),
    "stream: of a bad id": generate(
        "row 0: token id 49152 at position 0 is outside the vocabulary of", stream=True, input_ids=[VOCAB]
    ),
    "stream: of a batch with a bad id": generate(
        "row 1: token id -1 at position 0 is outside the vocabulary of 49152", stream=True, input_ids=[[5], [-1]]
    ),
    "stream: of an empty text": generate(
        "row 0: the prompt has 0 tokens; SGLang needs at least 1", stream=True, input_ids=..., text=""
    ),
    "n = 2 of a bad id": generate(
        "row 0: token id 49152 at position 0 is outside the vocabulary of",
        input_ids=[VOCAB],
        sampling_params={"n": 2, "max_new_tokens": 2},
    ),
    "n = 2 of a bad row": generate(
        "row 1: token id -1 at position 0 is outside the vocabulary of 49152",
        input_ids=[[5], [-1]],
        sampling_params={"n": 2, "max_new_tokens": 2},
    ),
    "return_hidden_states: a text": generate("'type': 'list_type'", return_hidden_states="x"),
    "return_hidden_states: the last": generate(
        'invalid type: string "last", expected a value or an array of values', return_hidden_states="last"
    ),
    "return_hidden_states: a number": generate("'type': 'list_type'", return_hidden_states=5),
    "return_hidden_states: too few": generate(
        "The length of return_hidden_states should be equal to the batch size",
        input_ids=[[5], [6]],
        return_hidden_states=[True],
    ),
    "return_hidden_states: a list for one prompt": generate(
        "row 0: return_hidden_states=[True]: Expected `bool | str`, got `array`", return_hidden_states=[True]
    ),
    "return_routed_experts: of a dense model": generate(return_routed_experts=True),
    "routed_experts_start_len: -1": generate(
        "row 0: recv_req.routed_experts_start_len=-1 is lower than 0. Please",
        return_routed_experts=True,
        routed_experts_start_len=-1,
    ),
    "return_indexer_topk: of a model without": generate(return_indexer_topk=True),
    "return_sampling_mask: of everything": generate(
        "row 0: return_sampling_mask requires top_k=1 for greedy sampling or",
        return_sampling_mask=True,
        sampling_params={"max_new_tokens": 2, "temperature": 1.0},
    ),
    "sampling_logprobs_mode: alone": generate(
        "row 0: sampling_logprobs_mode can only be set when", sampling_logprobs_mode="selected"
    ),
    "sampling_logprobs_mode: unknown": generate(
        "'type': 'list_type'", return_sampling_mask=True, sampling_logprobs_mode="x"
    ),
    "lora_path: of none": generate(
        "LoRA adapter 'nothing' was requested, but LoRA is not enabled. Please", lora_path="nothing"
    ),
    "lora_path: a number": generate("'type': 'list_type'", lora_path=5),
    "lora_path: too few": generate(
        "lora_path has 1 values for 2 rows; give one for each, or one for all", input_ids=[[5], [6]], lora_path=["a"]
    ),
    "lora_id: of none": generate(
        "lora_id='nothing' is the server's own; name the adapter in lora_path", lora_id="nothing"
    ),
    "session_params: an unknown session": generate(
        "row 0: Invalid request: session id nothing does not exist", session_params={"id": "nothing"}
    ),
    "session_params: id 5": generate("row 0: session_params.id=5: ", session_params={"id": 5}),
    "session_params: an unknown field": generate(
        "row 0: the request cannot be read (Unexpected keyword argument", session_params={"id": "nothing", "nope": 1}
    ),
    "session_params: a text": generate("'type': 'dict_type'", session_params="x"),
    "session_params: an empty turn": generate(
        "row 0: Invalid request: session id nothing does not exist", session_params={"id": "nothing"}, input_ids=[]
    ),
    "session_id: a number": generate("'type': 'string_type'", session_id=5),
    "session_id beside session_params": generate(
        "session_id and session_params cannot both be set", session_id="a", session_params={"id": "b"}
    ),
    "custom_logit_processor: not taken": generate(
        "row 0: The server is not configured to enable custom logit processor",
        custom_logit_processor='{"callable": "00"}',
    ),
    "custom_logit_processor: a number": generate("'type': 'list_type'", custom_logit_processor=5),
    "bootstrap_room: a text": generate("'type': 'list_type'", bootstrap_room="x"),
    "bootstrap_room: 2**70": generate("'type': 'list_type'", bootstrap_room=2**70),
    "bootstrap_port: a text": generate("'type': 'list_type'", bootstrap_host="h", bootstrap_port="x", bootstrap_room=1),
    "bootstrap_room: too few": generate(
        "bootstrap_room has 1 values for 2 rows; give one for each, or one for",
        input_ids=[[5], [6]],
        bootstrap_room=[1],
    ),
    "routed_dp_rank: 5": generate("routed_dp_rank=5 out of range [0, 1)", routed_dp_rank=5),
    "routed_dp_rank: a text": generate("'type': 'int_parsing'", routed_dp_rank="x"),
    "data_parallel_rank: -1": generate("routed_dp_rank=-1 out of range [0, 1)", data_parallel_rank=-1),
    "priority: a text": generate("'type': 'int_parsing'", priority="x"),
    "priority: 2**70": generate("'type': 'int_parsing_size'", priority=2**70),
    "kv_hints: a text": generate("'type': 'list_type'", kv_hints="x"),
    "kv_hints: an object": generate("Malformed kv_hints envelope: Object missing required field", kv_hints={"x": 1}),
    "extra_key: a number": generate("'type': 'string_type'", extra_key=5),
    "cache_salt: too few": generate(
        "The length of cache_salt should be equal to the batch size", input_ids=[[5], [6]], cache_salt=["a"]
    ),
    "routing_key: a number": generate("'type': 'string_type'", routing_key=5),
    "conversation_id: a number": generate("'type': 'string_type'", conversation_id=5),
    "http_worker_ipc: a client's": generate(
        "http_worker_ipc='ipc:///tmp/nowhere' is the server's own; leave it out", http_worker_ipc="ipc:///tmp/nowhere"
    ),
    "max_thinking_tokens: not taken": generate(
        "max_thinking_tokens requires the server to be launched with", max_thinking_tokens=5
    ),
    "multi_item_delimiter_indices: behind the prompt": generate(
        "row 0: multi_item_delimiter_indices has 100; the prompt's positions", multi_item_delimiter_indices=[100]
    ),
    "multi_item_delimiter_indices: negative": generate(
        "row 0: multi_item_delimiter_indices has -5; the prompt's positions",
        multi_item_delimiter_indices=[-5],
        return_logprob=True,
        logprob_start_len=0,
    ),
    "multi_item_delimiter_indices: texts": generate("'type': 'list_type'", multi_item_delimiter_indices=["x"]),
    "token_indices_to_pool: behind the prompt": generate(
        "row 0: token_indices_to_pool has 100; the prompt's positions are 0..2", token_indices_to_pool=[100]
    ),
    "token_indices_to_pool: negative": generate(
        "row 0: token_indices_to_pool has -7; the prompt's positions are 0..2", token_indices_to_pool=[-7]
    ),
    "positional_embed_overrides: a text": generate(
        "row 0: positional_embed_overrides are tensors of the server's own", positional_embed_overrides="x"
    ),
    "positional_embed_overrides: an object": generate(
        "row 0: positional_embed_overrides are tensors of the server's own",
        positional_embed_overrides={"embeds": [[1.0]], "positions": [0]},
    ),
    "encoder_urls: a number": generate("'type': 'list_type'", encoder_urls=5),
    "need_wait_for_mm_inputs": generate(
        "'type': 'enum'", need_wait_for_mm_inputs=True, num_items_assigned={"image": [1]}
    ),
    "a field that nobody knows": generate(nonsense=5),
    "background: a text": generate("'type': 'bool_parsing'", background="x"),
    "received_time: a text": generate("'type': 'float_parsing'", received_time="x"),
}
