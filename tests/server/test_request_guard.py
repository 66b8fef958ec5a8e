"""The guard in SGLang's tokenizer manager, hook by hook, with objects as SGLang makes them."""

from __future__ import annotations

import asyncio
import sys
from array import array
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from torchrl_sglang_hidden.counters import SERVER
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL
from torchrl_sglang_hidden.server import request_guard as guard

VOCAB, HIDDEN = 10, 3


class Params(msgspec.Struct, array_like=True):
    temperature: float = 1.0
    stop_token_ids: set[int] | None = None


class Tokenized(msgspec.Struct, array_like=True):
    """SGLang's request for the scheduler, as much of it as is looked at."""

    sampling_params: Params = msgspec.field(default_factory=Params)
    input_ids: Any = None
    mm_inputs: Any = None
    time_stats: Any = None
    positional_embed_overrides: Any = None
    input_embeds: list[list[float]] | None = None
    token_indices_to_pool: list[int] | None = None
    multi_item_delimiter_indices: list[int] | None = None
    rid: str | None = None
    priority: int | None = None


def row(**fields: Any) -> Any:
    """Return one row's request, as SGLang has it when it tokenizes."""
    plain: dict[str, Any] = {
        "text": None,
        "input_ids": [1, 2],
        "input_embeds": None,
        "sampling_params": {},
        "session_params": None,
    }
    return SimpleNamespace(contains_mm_input=lambda: False, **{**plain, **fields})


def payload(**fields: Any) -> Any:
    """Return a request of several rows, as it came."""
    return row(**{"input_ids": [[1], [2]], "is_single": False, "rid": ["a", "b"], "batch_size": 2, **fields})


@pytest.fixture
def manager() -> Any:
    config = SimpleNamespace(vocab_size=VOCAB, hidden_size=HIDDEN)
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "aaaa": 1})
    return SimpleNamespace(
        model_config=config, mm_processor=None, tokenizer=tokenizer, allow_auto_truncate=False, context_len=5
    )


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = msgspec.msgpack.Decoder(Tokenized)
    module = ModuleType("io_struct")
    module.__dict__.update(
        msgpack_encode=msgspec.msgpack.encode,
        msgpack_decode=decoder.decode,
        enc_hook=None,
        dec_hook=None,
        ext_hook=None,
    )
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["sglang.srt.managers"], "io_struct", module, raising=False)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", module)


PAYLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "no options": ({"sampling_params": "greedy"}, "row 0: sampling_params='greedy'"),
    "options of a row": ({"sampling_params": [{}, 5]}, "row 1: sampling_params=5"),
    "no sample": ({"sampling_params": {"n": 0}}, r"row 0: n=0: .*1\.\.4096"),
    "half a sample": ({"sampling_params": {"n": 1.5}}, r"row 0: n=1\.5"),
    "samples without end": ({"sampling_params": {"n": 10**12}}, "n=1000000000000"),
    "a sample too many": ({"sampling_params": {"n": 4097}}, r"row 0: n=4097: .*1\.\.4096"),
    "many of many": (
        {"sampling_params": {"n": 4096}, "input_ids": [[1]] * 5},
        "5 rows of n=4096 .* 20480 requests, over the limit of 16384",
    ),
    "no rows": ({"input_ids": []}, "0 rows"),
    "no texts": ({"input_ids": None, "text": []}, "0 rows"),
    "text and other ids": ({"text": "one"}, "text has 1 rows and input_ids 2"),
    "a name of the server's own": ({"lora_id": "x"}, "lora_id='x' .*lora_path"),
    "a way of the server's own": ({"http_worker_ipc": "ipc://x"}, "http_worker_ipc='ipc://x'"),
    "several names of one": ({"is_single": True, "rid": ["a"]}, r"rid=\['a'\]"),
    "too few values": ({"top_logprobs_num": [1]}, "top_logprobs_num has 1 values for 2 rows"),
    "too few ids": ({"token_ids_logprob": [[1]]}, "token_ids_logprob has 1 values for 2 rows"),
    "too few adapters": ({"lora_path": ["a"]}, "lora_path has 1 values for 2 rows"),
}


@pytest.mark.parametrize("what", PAYLOADS)
def test_what_cannot_be_split_into_rows(what: str) -> None:
    fields, words = PAYLOADS[what]
    with pytest.raises(ValueError, match=words):
        guard.around_normalize(lambda obj: None, payload(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling_params": [{"n": 3}] * 2},
        {"top_logprobs_num": [1, 2]},
        {"input_ids": [], "is_single": True, "rid": "a", "session_params": {"id": "a"}},
    ],
)
def test_what_can_be_split_is_split_by_sglang(fields: dict[str, Any]) -> None:
    seen: list[Any] = []
    obj = payload(**fields)
    guard.around_normalize(seen.append, obj)
    assert seen == [obj]


def test_what_sglang_cannot_split_is_the_requests_fault() -> None:
    def original(obj: Any) -> None:
        raise TypeError("'>' not supported")

    with pytest.raises(ValueError, match=r"cannot be read \('>' not supported\).*types"):
        guard.around_normalize(original, payload())


TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"input_ids": None, "text": 5}, "row 0: text=5 is a int"),
    "half a character": ({"input_ids": None, "text": "a\ud800"}, r"row 0: .*'\\ud800' at position 1"),
    "half a character of a pair": (
        {"input_ids": None, "text": [["a", "\udfff"]], "is_cross_encoder_request": True},
        "position 0",
    ),
    "no text that fits": ({"input_ids": None, "text": "a" * 41}, "row 0: the text has 41 characters, .* more than 40"),
    "one id": ({"input_ids": 5}, "row 0: input_ids=5"),
    "an image": ({"contains_mm_input": lambda: True}, "row 0: images"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_prompts_that_cannot_be_read(manager: Any, what: str) -> None:
    fields, words = TEXTS[what]

    async def original(manager: Any, obj: Any) -> str:
        return "tokenized"

    obj = row()
    vars(obj).update(fields)
    with pytest.raises(ValueError, match=words):
        asyncio.run(guard.around_tokenize(original, manager, obj))
    assert asyncio.run(guard.around_tokenize(original, manager, row())) == "tokenized"
    rows = [row(), obj]
    with pytest.raises(ValueError, match=words.replace("row 0", "row 1")):
        asyncio.run(guard.around_tokenize_batch(lambda *args: original(*args[1:]), manager, 2, rows))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"sampling_params": {"temperature": True}}, "row 0: temperature=True: expected a finite number"),
    "top_k": ({"sampling_params": {"top_k": 2**31}}, r"row 0: top_k=2147483648: .*1\.\.2147483647"),
    "a grammar": ({"sampling_params": {"json_schema": {}}}, "row 0: json_schema={}"),
    "stop": ({"sampling_params": {"stop": [5]}}, r"row 0: stop=\[5\]"),
    "stop ids": ({"sampling_params": {"stop_token_ids": 5}}, "row 0: stop_token_ids=5: expected a list"),
    "far stop ids": (
        {"sampling_params": {"stop_token_ids": [VOCAB], "min_new_tokens": 1}},
        "row 0: stop_token_ids has id 10, outside the vocabulary of 10",
    ),
    "log-probs": ({"top_logprobs_num": VOCAB + 1}, r"row 0: top_logprobs_num=11: expected an integer in 0\.\.10"),
    "log-probs of ids": ({"token_ids_logprob": [-1]}, "row 0: token_ids_logprob has id -1"),
    "log-probs of bools": ({"token_ids_logprob": [True]}, r"row 0: token_ids_logprob=\[True\]"),
    "log-probs from": ({"logprob_start_len": -2}, "row 0: logprob_start_len=-2"),
    "other options": (
        {"sampling_params": {"custom_params": {CHANNEL: {"protocol": PROTOCOL + 1, "options": "{}"}}}},
        f"row 0: .*protocol={PROTOCOL + 1} .*reads a text of protocol {PROTOCOL}",
    ),
    "options of another kind": ({"sampling_params": {"custom_params": {CHANNEL: 5}}}, "row 0: .*=5: expected"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_outside_their_limits(manager: Any, what: str) -> None:
    fields, words = OPTIONS[what]
    with pytest.raises(ValueError, match=words):
        guard.around_validate(lambda *args: None, manager, row(**fields), [1])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": None, "json_schema": "", "stop_token_ids": [None, VOCAB], "an_unknown_name": 5},
        {"temperature": 0, "stop": "x", "n": 2, "custom_params": {"theirs": [1]}},
    ],
)
def test_options_that_sglang_reads_itself(manager: Any, options: dict[str, Any]) -> None:
    seen: list[Any] = []
    guard.around_validate(lambda *args: seen.append(args), manager, row(sampling_params=options), [1])
    assert len(seen) == 1


def test_a_prompt_without_tokens(manager: Any) -> None:
    with pytest.raises(ValueError, match="row 0: the prompt has 0 tokens; SGLang needs at least 1"):
        guard.around_validate(lambda *args: None, manager, row(), [])
    # A session's history may be the prompt.
    guard.around_validate(lambda *args: None, manager, row(session_params={"id": "a"}), [])
    with pytest.raises(ValueError, match="row 0: the prompt has 0 tokens"):
        guard.around_validate(lambda *args: None, manager, row(session_params={"id": None}), [])


def test_a_row_without_options(manager: Any) -> None:
    """None is SGLang's default."""
    seen: list[Any] = []
    guard.around_validate(lambda *args: seen.append(args), manager, row(sampling_params=None), [1])
    assert len(seen) == 1


TOKENIZED: dict[str, tuple[dict[str, Any], str]] = {
    "the vocabulary's size": ({"input_ids": array("q", [1, VOCAB])}, "token id 10 at position 1 is outside"),
    "a negative id": ({"input_ids": array("q", [1, -1])}, "token id -1 at position 1"),
    "a place behind the prompt": ({"token_indices_to_pool": [2]}, r"token_indices_to_pool has 2; .*0\.\.1"),
    "a place before the prompt": ({"token_indices_to_pool": [-1]}, "token_indices_to_pool has -1"),
    "a place that is none": ({"token_indices_to_pool": [True]}, "token_indices_to_pool has True"),
    "a delimiter behind the prompt": (
        {"multi_item_delimiter_indices": [0, 5]},
        "multi_item_delimiter_indices has 5",
    ),
    "embeddings of a client's": ({"positional_embed_overrides": {}}, "positional_embed_overrides"),
    "a narrow embedding of a token": (
        {"positional_embed_overrides": SimpleNamespace(embeds=torch.zeros(1, 2))},
        "the embeddings that override some tokens' have 2 numbers; expected 3",
    ),
    "a narrow embedding": ({"input_embeds": [[1.0]]}, f"input_embeds has 1 numbers at position 0; expected {HIDDEN}"),
    "an embedding of NaN": (
        {"input_embeds": [[1.0, 1.0, float("nan")]]},
        "input_embeds has NaN or infinity at position 0",
    ),
    "a field of another type": ({"rid": 5}, "rid=5: Expected `str | null`"),
    "an option of another type": ({"sampling_params": Params(temperature="x")}, "temperature='x': Expected `float`"),  # type: ignore[arg-type]
    "a number that does not travel": ({"priority": 2**70}, "priority=1180591620717411303424"),
}


@pytest.mark.parametrize("what", TOKENIZED)
def test_what_the_scheduler_could_not_read(manager: Any, what: str) -> None:
    fields, words = TOKENIZED[what]
    tokenized = Tokenized(**{"input_ids": array("q", [1, 2]), **fields})
    with pytest.raises(ValueError, match=f"row 0: {words}"):
        guard.around_create(lambda *args: tokenized, manager, row())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([5, True], "token id True is a bool"),
        ([False, 5], "token id False is a bool"),
        ([5, 1.0], r"token id 1\.0 is a float"),
        ([5, "6"], "token id '6' is a str"),
        ([5, [6]], r"token id \[6\] is a list"),
        ([5, None], "token id None is a NoneType"),
        ([5, 2**70], f"token id {2**70} at position 1 is outside"),
    ],
)
def test_ids_that_are_none(manager: Any, ids: list[Any], words: str) -> None:
    def original(manager: Any, obj: Any) -> Tokenized:
        return Tokenized(input_ids=array("q", obj.input_ids))

    with pytest.raises(ValueError, match=f"row 0: {words}"):
        guard.around_create(original, manager, row(input_ids=ids))
    assert guard.around_create(original, manager, row(input_ids=[0, 1, 1])).rid is None


def test_what_the_scheduler_can_read(manager: Any) -> None:
    tokenized = Tokenized(input_ids=array("q", [0, VOCAB - 1]), token_indices_to_pool=[0, 1], mm_inputs="stays")
    assert guard.around_create(lambda *args: tokenized, manager, row()) is tokenized
    assert (tokenized.mm_inputs, list(tokenized.input_ids)) == ("stays", [0, VOCAB - 1])


def test_what_is_the_servers_own_is_not_read_back(manager: Any) -> None:
    tokenized = Tokenized(input_ids=array("q", [1]), mm_inputs=object(), time_stats=object())
    assert guard.around_create(lambda *args: tokenized, manager, row()) is tokenized


def test_what_no_field_alone_is_at_fault_for(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes) -> None:
        raise msgspec.ValidationError("two fields that exclude each other")

    monkeypatch.setattr(sys.modules["sglang.srt.managers.io_struct"], "msgpack_decode", decode)
    with pytest.raises(ValueError, match="row 0: two fields that exclude each other"):
        guard.around_create(lambda *args: Tokenized(input_ids=array("q", [1])), manager, row())


def test_embeddings_of_some_tokens(manager: Any) -> None:
    """What stands for a tensor on an accelerator has no shape here."""
    for embeds in (torch.zeros(2, HIDDEN), "a name of a tensor elsewhere"):
        tokenized = Tokenized(input_ids=array("q", [1]), positional_embed_overrides=SimpleNamespace(embeds=embeds))
        assert guard.around_create(lambda *args, made=tokenized: made, manager, row()) is tokenized
        assert tokenized.positional_embed_overrides.embeds is embeds


def test_ids_that_stand_for_embeddings_are_not_looked_up(manager: Any) -> None:
    tokenized = Tokenized(input_ids=array("q", [VOCAB]), input_embeds=[[1.0] * HIDDEN])
    obj = row(input_ids=None, input_embeds=tokenized.input_embeds)
    assert guard.around_create(lambda *args: tokenized, manager, obj) is tokenized


@pytest.mark.parametrize("ids", [None, array("q")])
def test_a_turn_without_ids_of_its_own(manager: Any, ids: Any) -> None:
    """A session's history is the prompt, or what SGLang made of an image is."""
    tokenized = Tokenized(input_ids=ids)
    assert guard.around_create(lambda *args: tokenized, manager, row()) is tokenized


def test_a_text_of_the_first_tokens(manager: Any) -> None:
    """They are bools of nobody: the ids are the tokenizer's."""
    tokenized = Tokenized(input_ids=array("q", [0, 1]))
    assert guard.around_create(lambda *args: tokenized, manager, row(input_ids=None, text="a")) is tokenized


def test_a_text_beside_embeddings_is_not_read(manager: Any) -> None:
    """SGLang takes the embeddings, whatever the text."""

    async def original(manager: Any, obj: Any) -> str:
        return "tokenized"

    obj = row(input_ids=None, text="a" * 99, input_embeds=[[1.0] * HIDDEN])
    assert asyncio.run(guard.around_tokenize(original, manager, obj)) == "tokenized"


def test_rows_of_images_are_the_servers_own(manager: Any) -> None:
    tokenized = Tokenized(input_ids=array("q", [1, -7, -7]), mm_inputs="an image")
    assert guard.around_create(lambda *args: tokenized, manager, row()) is tokenized
    with pytest.raises(ValueError, match="token id -7 at position 0"):
        guard.around_create(lambda *args: tokenized, manager, row(input_ids=[-7]))


class Rows:
    """SGLang's batch, which makes the object of each row once."""

    is_single, batch_size, rid = False, 2, ("a", "b", "a2", "b2")

    def __init__(self) -> None:
        self._made = [row(input_ids=[VOCAB]) for _ in self.rid]

    def __getitem__(self, index: int) -> Any:
        return self._made[index]


def test_errors_name_the_row_of_the_batch(manager: Any) -> None:
    rows = Rows()
    guard.after_init_state(None, manager, rows)
    guard.after_init_state(None, manager, rows[3])  # SGLang does this for each sample
    tokenized = Tokenized(input_ids=array("q", [VOCAB]))
    before = SERVER.read().refusals
    for index, number in enumerate([0, 1, 0, 1]):
        with pytest.raises(ValueError, match=f"row {number}: token id 10"), guard.refusing(None):
            guard.around_create(lambda *args: tokenized, manager, rows[index])
    assert SERVER.read().refusals == before + 4, "each once, however many of SGLang's steps it ends"
    plain, grammar = "no such regex", "Grammar accept_token failed: 0"
    said_of = [
        (400, plain, f"row 1: {plain}"),
        (503, plain, plain),
        (None, plain, plain),
        (500, grammar, f"row 1: {grammar}"),
        (400, f"row 0: {plain}", f"row 0: {plain}"),
    ]
    for status, message, said in said_of:
        reason = {"type": "abort", "message": message, "status_code": status}
        guard.before_abort_reason(
            manager, {"meta_info": {"finish_reason": reason}}, SimpleNamespace(obj=rows[1]), False
        )
        assert reason["message"] == said


def test_sglangs_own_errors_get_the_row(manager: Any) -> None:
    def original(*args: Any) -> None:
        raise ValueError("The input (9 tokens) is longer")

    with pytest.raises(ValueError, match=r"^row 0: The input \(9 tokens\) is longer"):
        guard.around_validate(original, manager, row(), [1])


@pytest.mark.parametrize(
    ("tokenizer", "truncates"), [(None, False), (SimpleNamespace(get_vocab=dict), False), (None, True)]
)
def test_a_long_text_where_nothing_says_what_fits(manager: Any, tokenizer: Any, truncates: bool) -> None:
    async def original(manager: Any, obj: Any) -> str:
        return "tokenized"

    manager.allow_auto_truncate = truncates
    manager.tokenizer = manager.tokenizer if truncates else tokenizer
    obj = row(input_ids=None, text="a" * 99)
    assert asyncio.run(guard.around_tokenize(original, manager, obj)) == "tokenized"


@pytest.mark.parametrize("path", [None, "/generate", "/health_generate/x"])
def test_names_of_the_servers_own_checks_of_its_health(path: str | None) -> None:
    http = None if path is None else SimpleNamespace(url=SimpleNamespace(path=path))
    for name, row_number in (("HEALTH_CHECK_1", 0), (["a", "HEALTH_CHECK"], 1)):
        with pytest.raises(ValueError, match=f"row {row_number}: rid='HEALTH_CHECK.*begins the server's own"):
            guard.before_init_state(None, SimpleNamespace(rid=name), http)
    for good in ("a", "A HEALTH_CHECK", ["a", None], None):
        guard.before_init_state(None, SimpleNamespace(rid=good), http)


def settings(**fields: Any) -> Any:
    return SimpleNamespace(**{"log_requests_level": None, "log_requests_format": None, "log_level": None, **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"log_requests_level": 4}, r"log_requests_level=4: expected an integer in 0\.\.3"),
        ({"log_requests_level": -1}, "log_requests_level=-1"),
        ({"log_requests_format": "xml"}, "log_requests_format='xml': expected 'text' or 'json'"),
        ({"log_level": "loud"}, "log_level='loud': expected the name of a level"),
    ],
)
def test_settings_of_the_log_that_sglang_would_keep(fields: dict[str, Any], words: str) -> None:
    """With an unknown level it answers every later request with status 500."""
    with pytest.raises(ValueError, match=words):
        guard.before_logging(None, settings(**fields))


def test_settings_of_the_log() -> None:
    for level in range(4):
        guard.before_logging(None, settings(log_requests_level=level, log_requests_format="json", log_level="warning"))
    guard.before_logging(None, settings())


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_the_servers_own_checks_of_its_health(path: str) -> None:
    http = SimpleNamespace(url=SimpleNamespace(path=path))
    guard.before_init_state(None, SimpleNamespace(rid="HEALTH_CHECK_1"), http)


@pytest.mark.parametrize("priority", ["x", 1.5, True, [1]])
def test_a_priority_that_sglang_cannot_compare(priority: Any) -> None:
    seen: list[Any] = []
    around = guard.around_priority
    with pytest.raises(ValueError, match=r"priority=.*: expected an integer"):
        around(lambda manager, obj: seen.append(obj), None, SimpleNamespace(priority=priority))
    assert seen == []
    for good in (None, -3, 2**40):
        around(lambda manager, obj: seen.append(obj.priority), None, SimpleNamespace(priority=good))
    assert seen == [None, -3, 2**40]
