"""What `record_hidden_states` refuses: arguments, data, and recordings of something else; what is there stays whole."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fake_engine
from helpers.fake_engine import RecordingEngine
from helpers.policy_batches import make
from helpers.recordings import PROMPT, SEGMENTS, TOKENIZER, assert_same, data_rows
from tensordict import TensorDict

from torchrl_sglang_hidden import (
    HeadSpec,
    HiddenSpec,
    InputError,
    InputTypeError,
    MissingKeyError,
    RecordingError,
    TokenIdError,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.rl import record

ROWS = data_rows(4)


def recorded(path: Path, data: Any = None, **options: Any) -> Any:
    policy = make("text", **{"hidden": HiddenSpec(SEGMENTS), **options.pop("policy", {})})[0]
    options = {"prompt": PROMPT, "batch_size": 2, "progress": False, **options}
    return record_hidden_states(policy, ROWS if data is None else data, path, **options)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batch_size": 0}, InputError, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 2.0}, InputTypeError, "batch_size=2.0: expected"),
        ({"every": 0}, InputError, "every=0: expected an integer of at least 1"),
        ({"every": True}, InputTypeError, "every=True: expected"),
        ({"dtype": "float16"}, InputTypeError, "dtype='float16': expected one of"),
        ({"dtype": torch.int8}, InputTypeError, "dtype=torch.int8: expected one of"),
        ({"tokens": 1}, InputTypeError, "tokens=1"),
        (
            {"prompt": "hi"},
            MissingKeyError,
            r"has the fields \[\]; expected one or more of the rows' keys: name some of",
        ),
        ({"prompt": "{nobody}"}, MissingKeyError, r"fields \['nobody'\].*name some of \['done', 'number', 'obs'"),
        ({"prompt": "{words"}, InputError, "write a brace that belongs to the text twice"),
        ({"prompt": 3}, InputTypeError, "prompt=3 is a int; expected a format string"),
        ({"policy": {"hidden": None}}, InputError, "a policy with hidden=None returns no states; use"),
        ({"policy": {"generate": False}}, InputError, "scores sequences; use get_new_version"),
        ({"policy": {"num_samples": 2}}, InputError, "several vectors for each prompt; use"),
        ({"data": 3}, InputTypeError, "data=3 is a int; expected a TensorDict, an iterable of rows"),
        ({"data": {"a": [1, 2]}}, InputTypeError, "make a TensorDict of a mapping of arrays"),
        ({"data": TensorDict(a=torch.zeros(2))}, InputError, r"batch size \(\); expected at least one dimension"),
        ({"data": []}, InputError, "data with 0 rows.*expected"),
        ({"data": iter(())}, InputError, "data with fewer than 1 rows, and 0 are recorded"),
        ({"data": [1]}, InputTypeError, "row 0: 1 is a int; expected a mapping"),
        ({"data": [{"words": object(), "number": 1}]}, InputTypeError, "'words': <object .*cannot be recorded"),
        ({"data": [{"words": b"w1", "number": 1}]}, InputTypeError, "'words': b'w1' cannot be recorded"),
        ({"data": [{**ROWS[0], "hidden_states": 1}]}, InputError, r"the data has \['hidden_states'\].*; rename"),
        ({"data": [{**ROWS[0], "text_generated": "a"}]}, InputError, r"the data has \['text_generated'\]"),
        ({"data": [{**ROWS[0], "hidden_states/full": 1}]}, InputError, r"the data has \['hidden_states'\]"),
        ({"data": [{**ROWS[0], "a": {"b": 1}, "a/b": 1}]}, InputError, "one name twice with '/' between.*; use others"),
        (
            {"data": [{**ROWS[0], "a\ud83d": 1}]},
            InputError,
            r"row 0: the name 'a\\ud83d' cannot be that of a file; exp",
        ),
        ({"data": [{**ROWS[0], "a": {"b\0": 1}}]}, InputError, r"the name 'b\\x00' cannot be that of a file"),
        ({"data": [{**ROWS[0], "ä" * 121: 1}]}, InputError, "at most 240 bytes: rename it"),
        (
            {"data": [{**ROWS[0], "a": torch.zeros(1).to(torch.float8_e5m2)}]},
            InputTypeError,
            r"row 0, 'a': float8_e5m2; expected one of \['bfloat16', .*: convert it",
        ),
        ({"data": "nowhere.npz"}, InputError, "nowhere.npz is no data set that can be read; expected an .npz or"),
    ],
)
def test_arguments(tmp_path: Path, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        recorded(tmp_path / "r", **options)


def test_a_policy_of_another_class(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="is a Linear; expected a SGLangHiddenWrapper"):
        record_hidden_states(torch.nn.Linear(1, 1), ROWS, tmp_path, prompt=PROMPT)  # type: ignore[arg-type]


# --- rows that are not like the others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"words": None}, MissingKeyError, r"row 3: no \['words'\], which the rows before have; add"),
        ({"more": 1}, InputError, r"row 3: \['more'\], which the rows before do not have; leave"),
        (
            {"number": 1.5},
            InputTypeError,
            r"row 3, 'number': float32 \[\], and the rows before have int64 \[\]",
        ),
        ({"obs": np.zeros((2, 4), np.float32)}, InputTypeError, r"row 3, 'obs': float32 \[\*, 4\].*float32 \[\*, 3\]"),
        ({"words": 1}, InputTypeError, r"row 3, 'words': int64 \[\], and the rows before have json"),
    ],
)
def test_a_row_that_is_not_like_the_others(
    tmp_path: Path, row: dict[str, Any], kind: type[Exception], words: str
) -> None:
    bad = {name: value for name, value in {**ROWS[3], **row}.items() if value is not None}
    with pytest.raises(kind, match=words):
        recorded(tmp_path / "r", [*ROWS[:3], bad])


def test_an_id_that_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(TokenIdError, match=r"999.*\(row 0 is row 2"):
        recorded(tmp_path / "r", [{"ids": [7]}, {"ids": [8]}, {"ids": [999]}], prompt=lambda row: row["ids"])


def test_a_prompt_function_that_returns_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match=r"row 0: the prompt function returned 1\.5"):
        recorded(tmp_path / "r", prompt=lambda row: 1.5)


def test_prompts_of_several_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="tokens for row 0 and text for row 1; expected one kind"):
        recorded(tmp_path / "r", prompt=lambda row: [7] if row["number"] == 0 else "w1")


def test_a_state_that_float16_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states_ND = fake_engine.states_ND
    monkeypatch.setattr(fake_engine, "states_ND", lambda *ids: 1e5 * states_ND(*ids))
    with pytest.raises(InputError, match=r"row 0, 'token_hidden_states/prompt': .* over 65504, .*; use dtype=torch.bf"):
        recorded(tmp_path / "r", tokens=True)
    recorded(tmp_path / "other", tokens=True, dtype=torch.bfloat16)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"obs": np.zeros(3), "reward": np.zeros(4)}, r"the arrays have \{'obs': 3, 'reward': 4\} rows; expected one"),
        ({"obs": np.zeros(3), "gamma": np.array(0.9)}, r"'gamma': None\} rows; expected one number for all"),
        (
            {"obs": np.array([{"a": 1}], dtype=object)},
            r"obs.npy: an array of object; expected numbers or strings",
        ),
    ],
)
def test_npz_files_that_are_no_data_set(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=words):
        recorded(tmp_path / "r", tmp_path / "data.npz", prompt="{obs}")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("no zip")
    with pytest.raises(InputError, match=r"not a zip file; expected what numpy\.savez writes"):
        recorded(tmp_path / "r", tmp_path / "data.npz")
    (tmp_path / "data.jsonl").write_text(json.dumps({"number": 1, "words": "w"}) + "\nno json\n")
    with pytest.raises(InputError, match=r"data.jsonl, line 2: .*; expected one JSON object on each line"):
        recorded(tmp_path / "r", tmp_path / "data.jsonl")


@pytest.mark.parametrize("line", [b'{"number": 1, "words": "\xff"}', b"[" * 100_000])
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"number": 1, "words": "w"}\n' + line)
    with pytest.raises(InputError, match=r"data.jsonl, line 2: .*; expected one JSON object on each line"):
        recorded(tmp_path / "r", tmp_path / "data.jsonl")


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"number": 1, "words": "w1"}\n', encoding="utf-8-sig")
    assert recorded(tmp_path / "r", tmp_path / "data.jsonl").tensordict["words"] == ["w1"]


def test_an_npz_that_was_damaged(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", number=np.arange(4), obs=np.zeros((4, 4096)))
    data = bytearray((tmp_path / "data.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "data.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"data.npz: Bad CRC-32 .*; copy it again"):
        recorded(tmp_path / "r", tmp_path / "data.npz", prompt="w{number}")


# --- a recording of something else ------------------------------------------------------------------------------------


def other_model() -> dict[str, Any]:
    return {"policy": {"engine": RecordingEngine(tokenizer=TOKENIZER, model_path="another")}}


def other_weights() -> dict[str, Any]:
    return {"policy": {"engine": RecordingEngine(tokenizer=TOKENIZER, weight_version="v8")}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_model, r"another model.path \(model.path 'recorder', now 'another'\)"),
        (other_weights, "another weight_version"),
        (lambda: {"policy": {"hidden": HiddenSpec(("prompt",))}}, "another segments"),
        (lambda: {"policy": {"hidden": HiddenSpec(SEGMENTS, layers=0)}}, r"another layers \(layers -1, now 0\)"),
        (lambda: {"policy": {"hidden": HiddenSpec(SEGMENTS, pooling="last")}}, "another pooling"),
        (lambda: {"policy": {"heads": HeadSpec(("d0",), stop_when="d0 > 9")}}, r"another heads \(heads None, now "),
        (lambda: {"policy": {"chat_template": "{{ messages }}"}}, "another chat_template.text"),
        (lambda: {"policy": {"generate_kwargs": {"max_new_tokens": 2}}}, "another generate_kwargs.max_new_tokens"),
        (lambda: {"prompt": "w1 {words}"}, "another prompt"),
        (lambda: {"tokens": True}, r"another tokens \(tokens None, now 'torch.float16'\)"),
        (lambda: {"every": 2}, "another every"),
        (lambda: {"data": [{"number": 1, "words": "w1"}] * 4}, "another fields.done, fields.obs"),
    ],
)
def test_going_on_with_something_else(tmp_path: Path, change: Callable[[], dict[str, Any]], words: str) -> None:
    before = recorded(tmp_path / "r").tensordict
    with pytest.raises(RecordingError, match=rf"was recorded with {words}.*it was recorded with, or use another path$"):
        recorded(tmp_path / "r", **change())
    assert_same(load_recording(tmp_path / "r").tensordict, before)


def test_going_on_with_another_version_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path / "r")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    with pytest.raises(RecordingError, match=r"another versions\."):
        recorded(tmp_path / "r")


def test_going_on_with_another_prompt_function(tmp_path: Path) -> None:
    recorded(tmp_path / "r", prompt=lambda row: "w1")
    with pytest.raises(RecordingError, match=r"another prompt\.source"):
        recorded(tmp_path / "r", prompt=lambda row: "w2")


def say(word: str, row: Any, *, end: str = "w3") -> str:
    return f"{word} {end}"


def around(word: str) -> Callable[[Any], str]:
    def prompt(row: Any, before: str = "w4") -> str:
        return f"{before} {word}"

    return prompt


def with_default(word: str) -> Callable[[Any], str]:
    def prompt(row: Any, word: str = word) -> str:
        return word

    return prompt


@pytest.mark.parametrize(
    ("make_prompt", "named"),
    [
        (lambda word: functools.partial(say, word), "argument 0"),
        (lambda word: functools.partial(say, "w3", end=word), "end"),
        (around, "word"),
        (with_default, "default 0"),
    ],
)
def test_going_on_with_a_prompt_function_that_holds_other_values(
    tmp_path: Path, make_prompt: Callable[[str], Callable[[Any], str]], named: str
) -> None:
    recorded(tmp_path / "r", prompt=make_prompt("w1"))
    with pytest.raises(RecordingError, match=rf"another prompt\.values\.{named} \(.*w1.*w2"):
        recorded(tmp_path / "r", prompt=make_prompt("w2"))
    assert len(recorded(tmp_path / "r", data_rows(6), prompt=make_prompt("w1"))) == 6


def test_a_prompt_function_may_keep_a_list_of_its_own(tmp_path: Path) -> None:
    seen: list[Any] = []

    def prompt(row: Any) -> str:
        seen.append(row)
        return "w1"

    recorded(tmp_path / "r", prompt=prompt)
    assert len(recorded(tmp_path / "r", data_rows(6), prompt=prompt)) == 6
    assert len(seen) == 6


def test_going_on_with_other_data(tmp_path: Path) -> None:
    recorded(tmp_path / "r")
    other = [*ROWS[:3], {**ROWS[3], "number": 50}, *ROWS]
    with pytest.raises(
        RecordingError, match=r"row 3 of the data is not the one that was recorded; go on with the same .*path$"
    ):
        recorded(tmp_path / "r", other)
    with pytest.raises(InputError, match="data with 2 rows, and 4 are recorded; expected all of those"):
        recorded(tmp_path / "r", ROWS[:2])
    with pytest.raises(InputError, match="data with fewer than 4 rows, and 4 are recorded"):
        recorded(tmp_path / "r", iter(ROWS[:2]))
    grown = recorded(tmp_path / "r", data_rows(6))
    assert_same(grown.tensordict, recorded(tmp_path / "expected", data_rows(6)).tensordict)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("changed", range(5))
def test_a_row_that_changed_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int, old_format: bool
) -> None:
    """Also one that no prompt reads, and in a recording of before its manifest had the rows' digests."""
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)
    rows = data_rows(5)
    recorded(tmp_path / "r", rows, batch_size=2)
    if old_format:
        manifest = tmp_path / "r" / "manifest.json"
        content = json.loads(manifest.read_bytes())
        assert [len(shard.pop("rows_sha256")) for shard in content["shards"]] == [64, 64, 64]
        manifest.write_text(json.dumps(content))
    other = data_rows(7)
    other[changed]["obs"][1, 2] += 1
    with pytest.raises(RecordingError, match=f"row {changed} of the data is not the one that was recorded; go on"):
        recorded(tmp_path / "r", other)
    assert len(recorded(tmp_path / "r", data_rows(7), batch_size=2)) == 7


def test_going_on_reads_no_shard_where_the_rows_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every token's states a shard is a thousand times as large as what the data has of it."""
    recorded(tmp_path / "r", data_rows(5))
    read: list[Any] = []
    monkeypatch.setattr(record, "read_rows", lambda path, shard: read.append(shard))
    assert len(recorded(tmp_path / "r", data_rows(9))) == 9
    assert read == []


def test_weights_that_are_updated_meanwhile(tmp_path: Path) -> None:
    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))

    def update(rows: Any) -> None:
        for row in rows:
            row["meta_info"]["weight_version"] = "v8"

    engine.fault = update
    with pytest.raises(RecordingError, match="row 0: weights of version 'v8', and the policy connected to 'v7'; co"):
        record_hidden_states(policy, ROWS, tmp_path / "r", prompt=PROMPT, progress=False)
    assert len(load_recording(tmp_path / "r")) == 0
