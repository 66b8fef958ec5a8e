"""Targets of fuzzing: everything that reads what a server sends.

Each spoils a good answer, reads it, and checks that what comes out has the right types and sizes. An error of this
package is a right answer too; any other is what is looked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import httpx
import torch

from helpers.fake_engine import (
    ALL_SEGMENTS,
    WORDS,
    RecordingEngine,
    make_info,
    model_page,
    server_page,
)
from helpers.fake_images import IMAGE_ID, images_in
from helpers.sample_requests import (
    EVERY,
    MASKED,
    PROMPTS,
    RESOLVED,
    SPANS,
    TOP,
    asks,
    request,
    scores,
    spanned,
)
from helpers.spoiling import Choices, spoil
from torchrl_sglang_hidden import Every, HeadSpec, HiddenSpec, LastTokens
from torchrl_sglang_hidden.engines.http_answers import read_event, read_json
from torchrl_sglang_hidden.engines.samples import generate_samples
from torchrl_sglang_hidden.engines.streams import Stream
from torchrl_sglang_hidden.errors import SGLangHiddenError
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights
from torchrl_sglang_hidden.records import Completion, EngineInfo, Pooled, Request, SamplingRecords, TokenLogits
from torchrl_sglang_hidden.sglang_api.payload import to_payload
from torchrl_sglang_hidden.sglang_api.responses import read_rows
from torchrl_sglang_hidden.sglang_api.server_info import ModelSizes, read_info, warm_up
from torchrl_sglang_hidden.weights.control import drained, finish_update, succeeded

V, INFO = len(WORDS), make_info()
CAT = "data:image/png;base64,Y2F0"
READS_IMAGES = {"takes_images": True, "image_token_id": IMAGE_ID}
FINISHED = {"stop", "length", "head", "abort", "error"}
_ALL = HiddenSpec(ALL_SEGMENTS)
_POOLED = HeadSpec(("d0", "d1"), ("full",), pooling="mean", spans={"each": Every(2), "end": LastTokens(1)})
_RECORDS = SamplingRecords(entropy=True, sampling_mask=True, routed_experts=True)
_ASKED = httpx.Request("POST", "http://fuzz/generate")
# Kinds of requests, and what the engine that answers them says of itself.
_KINDS: tuple[tuple[list[Request], dict[str, Any]], ...] = (
    ([request(), request(prompt_ids=(5, 6))], {}),
    ([request(HiddenSpec(("prompt", "full"), "max", layers=(0, 2, -1), tokens=True))], {}),
    ([request(HiddenSpec(tokens=True, dtype=torch.bfloat16, spans=SPANS), spans=RESOLVED)], {"shares_memory": True}),
    ([spanned(), spanned(pooling="last")], {}),
    ([asks(*MASKED, spec=TOP), asks(spec=EVERY)], {}),
    ([dataclasses.replace(asks(*MASKED, spec=PROMPTS), hidden=_ALL, return_errors=True)], {"shares_memory": True}),
    ([scores(), scores(first=3)], {}),
    ([scores(*MASKED, spec=PROMPTS)], {}),
    ([dataclasses.replace(request(None), records=_RECORDS)], {}),
    ([dataclasses.replace(images_in((7, IMAGE_ID, 8), (CAT,)), hidden=_ALL, score_prompt=True)], READS_IMAGES),
    ([request(_ALL), request(None)], {"pools_in_server": False, "layers": (-1,)}),
    ([spanned(tokens=True)], {"pools_in_server": False, "layers": (-1,)}),
    ([request(max_new_tokens=0)], {}),
    ([dataclasses.replace(request(_ALL), heads=HeadSpec(("d0", "d3"), ("full",), "d0 > 9"))], {}),
    ([dataclasses.replace(request(None), heads=HeadSpec(("d1",)))], {}),
    ([dataclasses.replace(request(None), heads=_POOLED, head_spans=_POOLED.spans)], {}),
)


@functools.cache
def _answers() -> list[tuple[list[Request], EngineInfo, Any]]:
    """Return requests of every kind, the engine, and its answer: through JSON, and as it is in one process."""
    found = []
    for requests, changes in _KINDS:
        for binary in (False, True):
            engine = RecordingEngine(binary=binary, **changes)
            payload = to_payload(requests, engine.info, binary=binary)
            found.append((requests, engine.info, engine.answer(payload, requests)))
    return found


def read_an_answer(choices: Choices) -> None:
    """Read the whole answer to a batch."""
    requests, info, rows = choices.pick(_answers())
    rows = spoil(rows, choices)
    for sent, completion in zip(requests, read_rows(requests, rows, info), strict=True):
        check_completion(sent, completion, info)


def read_a_stream(choices: Choices) -> None:
    """Read a response as it grows."""
    one = choices.pick([case for case in _answers() if len(case[0]) == 1 and not case[0][0].score_prompt])
    (sent,), info, rows = one
    if not info.pools_in_server or sent.reads_only:
        return
    engine = RecordingEngine()
    parts = [engine.so_far(rows[0], count) for count in range(1, len(rows[0]["output_ids"]))] + rows
    spoiled = spoil(parts, choices)

    def sends() -> Generator[Any, None, None]:
        yield None
        yield from spoiled if isinstance(spoiled, list) else [spoiled]

    ids: list[int] = []
    text = ""
    with Stream(sends(), sent, info) as stream:
        for chunk in stream:
            assert isinstance(chunk.text, str)
            check_ids(chunk.ids, info)
            check_floats(chunk.log_probs_T, (len(chunk.ids),), wanted=sent.return_log_probs)
            ids += chunk.ids
            text += chunk.text
        check_completion(sent, stream.completion, info)
        assert stream.completion.error or (ids, text) == (list(stream.completion.response_ids), stream.completion.text)


def read_turns(choices: Choices) -> None:
    """Read two turns of a session. One that went wrong leaves the session as it was."""
    engine = RecordingEngine()
    spoiled_turn = choices.below(2)
    with engine.session() as session:
        for turn in range(2):
            before = session.ids
            engine.fault = functools.partial(_spoil_in_place, choices) if turn == spoiled_turn else None
            sent = Request((5, 6 + turn), hidden=_ALL)
            try:
                completion = session.generate(sent)
            except SGLangHiddenError:
                assert session.ids == before
                continue
            check_completion(dataclasses.replace(sent, prompt_ids=(*before, *sent.prompt_ids)), completion, engine.info)


def _spoil_in_place(choices: Choices, rows: list[Any]) -> None:
    spoiled = spoil(rows, choices)
    rows[:] = spoiled if isinstance(spoiled, list) else [spoiled]


def read_samples(choices: Choices) -> None:
    """Read several samples of one prompt, whose prompt went ahead."""
    sent = choices.pick([requests[0] for requests, changes in _KINDS if not changes and not requests[0].score_prompt])
    engine = RecordingEngine()
    if sent.reads_only:
        return
    spoiled_call, calls = choices.below(2), iter(range(9))

    def fault(rows: list[Any]) -> None:
        if next(calls) == spoiled_call:
            _spoil_in_place(choices, rows)

    engine.fault = fault
    for completion in generate_samples(engine, [sent], 2):
        check_completion(sent, completion, engine.info)


_MODEL, _SERVER = model_page("models/m"), server_page()
_SERVER |= {
    "speculative_algorithm": None, "pp_size": 1, "context_length": 64, "return_hidden_states_mode": "full",
    "limit_mm_data_per_request": {"image": 4}, "sampling_mask_max_tokens": 8, "skip_tokenizer_init": False,
}  # fmt: skip
_BARE = {**_SERVER, "internal_states": [{}]}
_RANKS = {**_SERVER, "internal_states": _SERVER["internal_states"] * 2}


def read_a_description(choices: Choices) -> None:
    """Read what an engine says of itself at connect."""
    pages = spoil([_MODEL, choices.pick((_SERVER, _BARE, _RANKS))], choices)
    model, server = [*pages, {}, {}][:2] if isinstance(pages, list) else (pages, {})
    if not isinstance(model, dict) or not isinstance(server, dict):
        return  # the connection refuses these
    payload = warm_up(server)
    if payload is not None:
        assert all(0 <= token_id < 2**31 for ids in payload["input_ids"] for token_id in ids)
        assert len(payload["input_ids"]) <= 4096
    check_info(read_info(model, server, lambda path: ModelSizes(V, 8, 4, 64)))


def read_http(choices: Choices) -> None:
    """Read the bytes of an answer over HTTP, whole and streamed."""
    requests, info, rows = choices.pick(_answers()[::2])
    text = json.dumps(spoil(rows, choices), default=str)
    data = text.encode("utf-8", "surrogatepass")
    at = choices.below(len(data) + 1)
    odd = choices.pick((b"", b",", b"]}", b"\xff", b"\x00", b"[" * 2000, b"1" * 5000, b"NaN", b'"\\ud800"'))
    data = choices.pick((data, data[:at], data[at:], data[:at] + odd + data[at:], odd + data, odd))
    status = choices.pick((200, 200, 200, 400, 401, 404, 500, 503, 299))
    kind = choices.pick(({}, {"content-type": "application/json; charset=utf-16"}, {"content-type": "text/html"}))
    if choices.below(2):
        found = read_json(httpx.Response(status, content=data, headers=kind, request=_ASKED), "http://fuzz")
        read_rows(requests, found, info)
        return
    line = data.decode("utf-8", "replace").replace("\n", " ")
    read_event(choices.pick(("data: ", "data:", "", "event: ")) + line, "http://fuzz")


def read_control_answers(choices: Choices) -> None:
    """Read the answers of the routes of an update, and the list of the weights that a server takes."""
    good = [
        {"success": True, "message": "ok", "was_paused": False},
        {"success": True, "message": "Weights were updated, but the cache was not flushed"},
        {"tensors": {"a.weight": ["BF16", [4, 8]], "b": ["F32", []]}, "tied": True, "quantization": ""},
    ]
    answers = spoil(good, choices)
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers) or len(answers) < 3:
        return  # a call of a route gives dicts
    drain, update, weights = answers[:3]

    def call(route: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        return dict(drain)

    for read in (
        lambda: succeeded(drain, "x"),
        lambda: finish_update(call, update, "v8", "x"),
        lambda: drained(call).__enter__(),
    ):
        with contextlib.suppress(SGLangHiddenError):
            read()
    served = ServedWeights.unpack(weights)
    assert isinstance(served.tied, bool)
    for name, (dtype, shape) in served.tensors.items():
        assert all(isinstance(text, str) for text in (name, dtype))
        assert all(type(size) is int and size >= 0 for size in shape)


# --- what must come out -----------------------------------------------------------------------------------------------


def check_completion(sent: Request, found: Completion, info: EngineInfo) -> None:
    """Check every field of a completion, and each against the number of tokens."""
    assert found.prompt_ids == sent.prompt_ids
    assert isinstance(found.text, str)
    assert isinstance(found.finish_reason, str)
    assert found.finish_reason in FINISHED
    assert isinstance(found.weight_version, str)
    assert isinstance(found.error, SGLangHiddenError | None)
    check_ids(found.response_ids, info)
    num_prompt, num_response = len(found.prompt_ids), len(found.response_ids)
    assert (num_response == 0) if sent.reads_only else (num_response >= 1 or found.error is not None)
    for version, count in found.versions:
        assert isinstance(version, str)
        assert type(count) is int
        assert 0 <= count <= num_response
    check_floats(found.log_probs_T, (num_response,), wanted=sent.return_log_probs)
    if found.error is not None and not num_response:
        return
    spec = sent.hidden
    num_layers, size = (1, info.hidden_size) if spec is None else (len(spec.layer_ids), info.hidden_size)
    shape = (num_layers, size) if spec is not None and isinstance(spec.layers, tuple) else (size,)
    for pooled in [*found.hidden.values(), *found.spans.values()]:
        assert isinstance(pooled, Pooled)
        assert type(pooled.count) is int
        assert 1 <= pooled.count <= num_prompt + max(num_response, 1)
        check_floats(pooled.vector, shape)
        assert not pooled.vector.isnan().any()
    if found.token_rows is not None:
        assert 0 <= found.token_rows.first < num_prompt
        rows_ND = found.token_rows.rows_ND
        assert rows_ND.dtype == (torch.bfloat16 if spec is not None and spec.dtype is torch.bfloat16 else torch.float32)
        assert rows_ND.shape[1:] == shape
        assert not rows_ND.isnan().any()
    for logits in (found.logits, found.prompt_logits):
        _check_logits(logits, info)
    check_floats(found.entropy_T, (num_response,), wanted=None)
    assert list(found.scores) == ([] if sent.heads is None else list(sent.heads.heads))
    for scored in found.scores.values():
        assert isinstance(scored.version, str)
        check_floats(scored.prompt_P, (num_prompt,), wanted=None)
        check_floats(scored.response_T, (num_response,), wanted=None)
        for pooled in scored.pooled.values():
            check_floats(pooled.vector, (), wanted=None)
        for pooled in scored.spans.values():
            check_floats(pooled.vector, () if pooled.places is None else (pooled.count,), wanted=None)
    if found.routed_experts is not None:
        assert found.routed_experts.dtype == torch.int32
    if found.sampling_mask is not None:
        check_floats(found.sampling_mask.log_probs_T, (num_response,))
        assert found.sampling_mask.token_ids_TS.shape[1] <= info.max_sampling_mask
        assert bool(((found.sampling_mask.token_ids_TS >= -1) & (found.sampling_mask.token_ids_TS < V)).all())


def _check_logits(logits: TokenLogits | None, info: EngineInfo) -> None:
    if logits is None:
        return
    assert logits.values_NC.dtype in (torch.float32, torch.bfloat16)
    assert not logits.values_NC.isnan().any()
    if logits.token_ids_NC is not None:
        assert logits.token_ids_NC.dtype == torch.int64
        assert bool(((logits.token_ids_NC >= 0) & (logits.token_ids_NC < info.vocab_size)).all())


def check_ids(ids: Sequence[int], info: EngineInfo) -> None:
    assert all(type(token_id) is int and 0 <= token_id < info.vocab_size for token_id in ids), ids


def check_floats(values: torch.Tensor | None, shape: tuple[int, ...], *, wanted: bool | None = True) -> None:
    """Check a float32 tensor; ``wanted=None`` takes none too."""
    if wanted is None and values is None:
        return
    assert (values is not None) is (wanted is not False), "asked for, or not"
    if values is not None:
        assert values.dtype == torch.float32
        assert tuple(values.shape) == shape


def check_info(info: EngineInfo) -> None:
    """Check the types of all fields, and the sizes."""
    for name in ("model_path", "tokenizer_path", "weight_version", "no_states_because"):
        assert isinstance(getattr(info, name), str), name
    for name in ("vocab_size", "hidden_size", "num_layers", "context_length"):
        assert type(getattr(info, name)) is int, name
        assert 1 <= getattr(info, name) < 2**31, name
    assert type(info.max_prompt_tokens) is int
    assert type(info.max_sampling_mask) is int
    assert info.max_sampling_mask >= 0
    for name in ("pools_in_server", "returns_hidden_states", "honours_seeds", "shares_memory", "takes_images"):
        assert isinstance(getattr(info, name), bool), name
    assert all(type(layer) is int and -1 <= layer < info.num_layers for layer in info.layers)
    assert all(isinstance(name, str) for name in info.constraints)
    for value in (info.max_images, info.image_token_id):
        assert value is None or (type(value) is int and value >= 0)


ANSWERS: dict[str, Callable[[Choices], None]] = {
    "answer": read_an_answer,
    "stream": read_a_stream,
    "session": read_turns,
    "samples": read_samples,
    "description": read_a_description,
    "http": read_http,
    "control": read_control_answers,
}
