"""`record_hidden_states` over the fake engine: every label is its row's, from every kind of data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import fake_engine
from helpers.fake_engine import RecordingEngine, RecordingServer, abort_a_row, of_layer, response_of, states_ND
from helpers.policy_batches import make
from helpers.recordings import (
    PROMPT,
    SEGMENTS,
    TOKENIZER,
    assert_same,
    data_rows,
    ids_of,
    leaf_rows,
    vector_of,
)
from rich.console import Console
from tensordict import NonTensorStack, TensorDict, TensorDictBase, lazy_stack

from torchrl_sglang_hidden import (
    At,
    Each,
    HeadSpec,
    HiddenSpec,
    LastTokens,
    MissingKeyError,
    Recording,
    SGLangHiddenWrapper,
    Window,
    load_recording,
    record_hidden_states,
)
from torchrl_sglang_hidden.rl import record
from torchrl_sglang_hidden.rl.prompts import Field, leaf_keys

READS: dict[str, Any] = {"hidden": HiddenSpec(("prompt",)), "generate_kwargs": {"max_new_tokens": 0}}


def labelled(data: Any, path: Path, *, policy: dict[str, Any] | None = None, **options: Any) -> Recording:
    options = {"prompt": PROMPT, "progress": False, **options}
    made = make("text", **{"hidden": HiddenSpec(SEGMENTS), **(policy or {})})[0]
    return record_hidden_states(made, data, path, **options)


def test_every_row_has_its_text_its_vectors_and_its_own_fields(tmp_path: Path) -> None:
    rows = data_rows(11)
    out = labelled(rows, tmp_path / "r", batch_size=4).tensordict
    assert out.batch_size == (11,)
    for row, expected in zip(out.unbind(0), rows, strict=True):
        ids = ids_of(expected)
        for segment in SEGMENTS:
            torch.testing.assert_close(row["hidden_states", segment], vector_of(expected, segment))
            assert row["hidden_states", segment].dtype == torch.float32
        assert row["hidden_states", "prompt_count"] == len(ids)
        assert row["text_generated"] == TOKENIZER.decode(response_of(ids), skip_special_tokens=True)
        assert row["finish_reason"] in ("stop", "length")
        assert row["number"] == expected["number"]
        assert row["words"] == expected["words"]
        assert torch.equal(row["obs"], torch.from_numpy(expected["obs"]))
        assert row["done"].dtype == torch.bool


def test_without_generating_nothing_of_a_response_is_recorded(tmp_path: Path) -> None:
    rows = data_rows(3)
    recording = labelled(rows, tmp_path / "r", policy=READS)
    keys = {"number", "words", "obs", "done", ("hidden_states", "prompt"), ("hidden_states", "prompt_count")}
    assert set(leaf_keys(recording.tensordict)) == keys
    torch.testing.assert_close(recording.tensordict["hidden_states", "prompt"][1], vector_of(rows[1], "prompt"))


def test_layers_and_spans(tmp_path: Path) -> None:
    rows = data_rows(3)
    spec = HiddenSpec(("prompt",), layers=(0, -1), spans={"end": LastTokens(2, "prompt")})
    out = labelled(rows, tmp_path / "r", policy={**READS, "hidden": spec}).tensordict
    states_NKD = torch.stack([of_layer(states_ND(ids_of(rows[2]), [7]), layer) for layer in (0, -1)], 1)
    torch.testing.assert_close(out["hidden_states", "prompt"][2], states_NKD.mean(0))
    torch.testing.assert_close(out["hidden_states", "spans", "end"][2], states_NKD[-2:].mean(0))
    assert out["hidden_states", "span_counts", "end"].tolist() == [2, 2, 2]


def test_spans_that_a_row_may_lack_and_rows_of_several_lengths(tmp_path: Path) -> None:
    rows = data_rows(6)
    spans = {
        "each": Each("w1", segment="prompt"),
        "first": At("w3", segment="prompt"),
        "past": Window(50, 60, "prompt"),
    }
    recording = labelled(rows, tmp_path / "r", policy={**READS, "hidden": HiddenSpec((), spans=spans)}, batch_size=2)
    assert recording.failures == ()
    out = recording.tensordict["hidden_states"]
    for index, row in enumerate(rows):
        ids = ids_of(row)
        states = states_ND(ids, [7])
        words = TOKENIZER.convert_ids_to_tokens(ids)
        places = [place for place, word in enumerate(words) if "w1" in word]
        assert out[index]["span_places", "each"].tolist() == places
        torch.testing.assert_close(out[index]["spans", "each"], states[places])
        first = [place for place, word in enumerate(words) if "w3" in word][:1]
        assert int(out[index]["span_counts", "first"]) == len(first)
        found = out[index]["spans", "first"]
        assert torch.equal(found, states[first[0]]) if first else found.isnan().all()
    assert out["span_counts", "past"].tolist() == [0] * 6
    assert out["spans", "past"].isnan().all()
    assert 0 < int(out["span_counts", "first"].sum()) < 6, "some rows have it, and some lack it"


@pytest.mark.parametrize("pooling", ["max", None])
def test_scores_of_heads(tmp_path: Path, pooling: Any) -> None:
    """Of each token or each segment, and at spans, with the version of each head; and a row that has none."""
    rows = [*data_rows(5), {**data_rows(1)[0], "words": "w1 " * 200}]
    spans = {"each": Each("w1", segment="prompt", pooling=None), "end": LastTokens(1, "response")}
    heads = HeadSpec(("d0", "d3"), SEGMENTS, pooling=pooling, spans=spans)
    with pytest.warns(UserWarning, match="1 of 6 rows have no label; the first is PromptLengthError"):
        recording = labelled(rows, tmp_path / "r", policy={"heads": heads}, batch_size=4)
    *scored, failed = recording.tensordict.get("head_scores").unbind(0)
    for row, expected in zip(scored, rows, strict=False):
        ids = ids_of(expected)
        places = [place for place, word in enumerate(TOKENIZER.convert_ids_to_tokens(ids)) if "w1" in word]
        assert row["span_places", "each"].tolist() == places
        for name in heads.heads:
            scores = states_ND(ids, response_of(ids))[:, int(name[1:])].float()
            for segment, truth in zip(SEGMENTS, (scores[: len(ids)], scores[len(ids) - 1 :]), strict=True):
                torch.testing.assert_close(row[segment, name], truth if pooling is None else truth.max())
            torch.testing.assert_close(row["spans", "each", name], scores[places])
            torch.testing.assert_close(row["spans", "end", name], scores[-1])
            assert row["versions", name] == f"v-{name}"
    assert failed["versions", "d0"] == ""
    assert len(failed["spans", "each", "d0"]) == 0
    assert failed["spans", "end", "d0"].isnan()
    assert bool(failed["prompt", "d0"].isnan().any()) is (pooling is not None)
    recording.to_npz(tmp_path / "r.npz")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tokens_state(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = data_rows(6)
    out = labelled(rows, tmp_path / "r", tokens=True, dtype=dtype, batch_size=2).tensordict
    found = {segment: out.get(("token_hidden_states", segment), as_list=True) for segment in SEGMENTS}
    for index, row in enumerate(rows):
        ids = ids_of(row)
        response = response_of(ids)
        states = states_ND(ids, response)
        assert torch.equal(found["prompt"][index], states[: len(ids)].to(dtype))
        assert torch.equal(found["response"][index], states[len(ids) - 1 :].to(dtype))
        assert out[index]["prompt_ids"].tolist() == ids
        assert out[index]["response_ids"].tolist() == response
        torch.testing.assert_close(out[index]["hidden_states", "prompt"], vector_of(row, "prompt"))
        assert out[index]["hidden_states", "prompt"].dtype == torch.float32


# --- one label for several rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_every_third_asks_for_a_third(tmp_path: Path, tokens: bool) -> None:
    rows = data_rows(10)
    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))
    recording = record_hidden_states(
        policy, rows, tmp_path / "r", prompt=PROMPT, every=3, batch_size=2, tokens=tokens, progress=False
    )
    assert [list(request.prompt_ids) for request in engine.requests] == [ids_of(row) for row in rows[::3]]
    out = recording.tensordict
    assert out["label_row"].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    for index, row in enumerate(out.unbind(0)):
        torch.testing.assert_close(row["hidden_states", "response"], vector_of(rows[index - index % 3], "response"))
        assert row["number"] == rows[index]["number"]


@pytest.mark.parametrize("key", ["done", ("next", "done")])
def test_an_episodes_end_begins_anew(tmp_path: Path, key: Any) -> None:
    data = TensorDict(number=torch.arange(10), done=torch.zeros(10, 1, dtype=torch.bool), batch_size=10)
    ends = torch.zeros(10, 1, dtype=torch.bool)
    ends[[3, 4]] = True
    data.set(key, ends)
    out = labelled(data, tmp_path / "r", prompt="w{number}", every=3).tensordict
    assert out["label_row"].tolist() == [0, 0, 0, 3, 4, 5, 5, 5, 8, 8]


# --- data -------------------------------------------------------------------------------------------------------------


def as_tensordict(rows: list[dict[str, Any]], path: Path) -> Any:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return TensorDict(
        number=torch.tensor(columns["number"]),
        words=NonTensorStack.from_list(columns["words"]),
        obs=torch.from_numpy(np.stack(columns["obs"])),
        done=torch.tensor(columns["done"]),
        batch_size=len(rows),
    )


def as_generator(rows: list[dict[str, Any]], path: Path) -> Iterator[Any]:
    buffer = rows[0]["obs"].copy()
    for row in rows:
        buffer[:] = row["obs"]
        yield {**row, "obs": torch.from_numpy(buffer)}


def as_npz(rows: list[dict[str, Any]], path: Path, save: Callable[..., None] = np.savez) -> Any:
    save(path / "data.npz", **{name: np.array([row[name] for row in rows]) for name in rows[0]})
    return path / "data.npz"


def as_compressed_npz(rows: list[dict[str, Any]], path: Path) -> Any:
    return as_npz(rows, path, np.savez_compressed)


def as_fortran_npz(rows: list[dict[str, Any]], path: Path) -> Any:
    return as_npz(rows, path, lambda file, obs, **rest: np.savez(file, obs=np.asfortranarray(obs), **rest))


def as_jsonl(rows: list[dict[str, Any]], path: Path) -> Any:
    lines = [json.dumps({**row, "obs": [[float(value) for value in line] for line in row["obs"]]}) for row in rows]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(path / "data.jsonl")


def as_hugging_face(rows: list[dict[str, Any]], path: Path) -> Any:
    return datasets.Dataset.from_list(rows).with_format(None)


def as_saved_hugging_face(rows: list[dict[str, Any]], path: Path) -> Any:
    as_hugging_face(rows, path).save_to_disk(path / "data")
    return path / "data"


def as_streamed_hugging_face(rows: list[dict[str, Any]], path: Path) -> Any:
    return as_hugging_face(rows, path).to_iterable_dataset()


def as_memmap(rows: list[dict[str, Any]], path: Path) -> Any:
    as_tensordict(rows, path).save(path / "data")
    return path / "data"


def as_lazy_stack(rows: list[dict[str, Any]], path: Path) -> Any:
    return lazy_stack(list(as_tensordict(rows, path).unbind(0)))


FORMS = (
    as_tensordict, as_generator, as_npz, as_compressed_npz, as_fortran_npz, as_jsonl, as_hugging_face,
    as_saved_hugging_face, as_streamed_hugging_face, as_memmap, as_lazy_stack,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_kind_of_data_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Callable[..., Any]
) -> None:
    """Also where it was stopped after two calls, and goes on in the middle of the data."""
    monkeypatch.setattr(record, "SHARD_SECONDS", 0.0)
    rows = data_rows(9)
    expected = labelled(rows, tmp_path / "expected", batch_size=3).tensordict
    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))
    engine.fault = fail_after(2)
    options: dict[str, Any] = {"prompt": PROMPT, "batch_size": 3, "progress": False}
    with pytest.raises(ConnectionError):
        record_hidden_states(policy, form(rows, tmp_path), tmp_path / "r", **options)
    assert len(load_recording(tmp_path / "r")) == 6
    engine.fault = None
    found = record_hidden_states(policy, form(rows, tmp_path), tmp_path / "r", **options).tensordict
    assert_same(
        found.select("number", "words", "done", "hidden_states", "text_generated"),
        expected.exclude("obs", "finish_reason"),
    )
    assert torch.equal(found["obs"].float(), expected["obs"])


def fail_after(count: int) -> Callable[[Any], None]:
    """Return a fault of an engine that goes away after some calls."""
    calls = iter(range(count))

    def fault(rows: Any) -> None:
        if next(calls, None) is None:
            raise ConnectionError("gone")

    return fault


def test_a_tensordict_of_trajectories_is_gone_through_row_by_row(tmp_path: Path) -> None:
    data = TensorDict(number=torch.arange(6).reshape(2, 3), batch_size=(2, 3))
    out = labelled(data, tmp_path / "r", prompt="w{number}").tensordict
    assert out["number"].tolist() == [0, 1, 2, 3, 4, 5]


def test_nested_fields_lists_chats_and_rows_of_other_lengths(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"w{index}"}] * (index + 1) for index in range(3)]
    rows = [
        {"chat": chats[index], "agent": {"at": [1.5, index]}, "ids": list(range(index + 1)), "note": None}
        for index in range(3)
    ]
    out = labelled(rows, tmp_path / "r", prompt=lambda row: row["chat"]).tensordict
    assert leaf_rows(out, "chat") == chats
    assert out["agent", "at"].tolist() == [[1.5, 0.0], [1.5, 1.0], [1.5, 2.0]]
    assert [ids.tolist() for ids in out.get("ids", as_list=True)] == [[0], [0, 1], [0, 1, 2]]
    assert leaf_rows(out, "note") == [None, None, None]
    torch.testing.assert_close(
        out[1]["hidden_states", "prompt"],
        fake_engine.pooled_D(states_ND(chat_ids(chats[1]), [7]), "prompt", "mean", len(chat_ids(chats[1]))).float(),
    )


def test_texts_with_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    """JSON lines may have one, and Python's JSON reads it; a text with it is no prompt."""
    row = {"number": 1, "text": "a\ud83d", "list": ["\ud83d"]}
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        recording = labelled([row, {**row, "text": "w1"}], tmp_path / "r", prompt="{text}")
    assert [failure.row for failure in recording.failures] == [0]
    found = recording.tensordict[0]
    assert (found["text"], found["list"]) == (row["text"], row["list"])
    assert len(labelled([row, {**row, "text": "w1"}], tmp_path / "r", prompt="{text}")) == 2


def test_fields_that_have_no_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1"}]
    rows = [{"ask": {"chat": asked}} for asked in (chat, [], None, chat)]
    with pytest.warns(UserWarning, match="2 of 4 rows"):
        recording = labelled(rows, tmp_path / "r", prompt=Field("ask.chat"))
    assert [(failure.row, failure.reason.partition(";")[0]) for failure in recording.failures] == [
        (1, "PromptLengthError: row 1: an empty list, 0 messages or token ids"),
        (2, "InputError: row 2: 'ask.chat' is None"),
    ]
    with pytest.raises(MissingKeyError, match=r"row 0: no 'chat'; it has \['ask.chat'\]: name one of them"):
        labelled(rows, tmp_path / "other", prompt=Field("chat"))


def chat_ids(chat: list[dict[str, str]]) -> list[int]:
    return list(TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def test_prompts_of_token_ids(tmp_path: Path) -> None:
    out = labelled([{"ids": [9, 8]}, {"ids": [7, 6, 5]}], tmp_path / "r", prompt=lambda row: row["ids"]).tensordict
    torch.testing.assert_close(
        out[1]["hidden_states", "prompt"], fake_engine.pooled_D(states_ND([7, 6, 5], [7]), "prompt", "mean", 3).float()
    )


# --- rows that fail ---------------------------------------------------------------------------------------------------


def words_of(row: TensorDictBase) -> str:
    """Return a prompt; the rows 2, 4, 6 and 8 have none that can be read."""
    number = int(row["number"])
    if number == 8:
        raise KeyError(number)
    return {2: "", 4: "w1 " * 100}.get(number, f"w{number}")


def test_a_row_that_fails_is_nan_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fake_engine, "states_ND", lambda *ids: states_ND(*ids) / (0 if ids[0] == TOKENIZER("w6")["input_ids"] else 1)
    )
    rows = data_rows(10)
    with pytest.warns(UserWarning, match=r"4 of 10 rows have no label; the first is PromptLengthError: .*row 2"):
        recording = labelled(rows, tmp_path / "r", prompt=words_of, batch_size=3, tokens=True)
    out = recording.tensordict
    assert [failure.row for failure in recording.failures] == [2, 4, 6, 8]
    reasons = [failure.reason for failure in recording.failures]
    for reason, words in zip(
        reasons,
        [
            "PromptLengthError: text, row 2: an empty string",
            "PromptLengthError: row 4: ",
            "EngineError: row 6 (request recorded-0): the states have NaN",
            "InputError: row 8: the prompt cannot be written, KeyError: 8",
        ],
        strict=True,
    ):
        assert reason.startswith(words), reason
    for index, row in enumerate(out.unbind(0)):
        failed = index in (2, 4, 6, 8)
        for segment in SEGMENTS:
            assert bool(row["hidden_states", segment].isnan().all()) is failed
            assert (row["hidden_states", f"{segment}_count"] == 0) == failed
            assert (len(row["token_hidden_states", segment]) == 0) == failed
        assert (row["finish_reason"] == "error") == failed
        assert row["words"] == rows[index]["words"]


def test_an_aborted_row_is_listed(tmp_path: Path) -> None:
    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))
    engine.fault = abort_a_row
    with pytest.warns(UserWarning, match="2 of 4 rows have no label"):
        recording = record_hidden_states(
            policy, data_rows(4), tmp_path / "r", prompt=PROMPT, batch_size=2, every=1, progress=False
        )
    assert [(failure.row, failure.reason[:19]) for failure in recording.failures] == [
        (0, "RequestAbortedError"), (2, "RequestAbortedError")
    ]  # fmt: skip
    assert recording.tensordict["hidden_states", "response"].isnan().any(-1).tolist() == [True, False, True, False]


def test_the_rows_that_share_a_failed_label_are_nan_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 of 6 rows"):
        recording = labelled(data_rows(6), tmp_path / "r", prompt=words_of, every=2, policy=READS)
    assert [failure.row for failure in recording.failures] == [2, 4]
    assert recording.tensordict["hidden_states", "prompt"].isnan().all(-1).tolist() == [False] * 2 + [True] * 4


# --- engines, the bar -------------------------------------------------------------------------------------------------


def test_several_servers_share_the_rows(tmp_path: Path) -> None:
    servers = [RecordingServer(), RecordingServer()]
    try:
        policy = SGLangHiddenWrapper(
            [server.url for server in servers], tokenizer=TOKENIZER, input_mode="text", hidden=HiddenSpec(SEGMENTS)
        )
        rows = data_rows(12)
        out = record_hidden_states(policy, rows, tmp_path / "r", prompt=PROMPT, batch_size=6, progress=False).tensordict
        policy.model.close()
    finally:
        for server in servers:
            server.stop()
    sent = [server.sent_rows for server in servers]
    assert all(sent)
    assert sorted(sent[0] + sent[1]) == sorted(ids_of(row) for row in rows)
    for row, expected in zip(out.unbind(0), rows, strict=True):
        torch.testing.assert_close(row["hidden_states", "prompt"], vector_of(expected, "prompt"))


def test_the_bar_shows_rows_rate_time_left_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        record, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=120, legacy_windows=False)
    )
    with pytest.warns(UserWarning, match="rows have no label"):
        labelled(data_rows(10), tmp_path / "r", prompt=words_of, policy=READS, batch_size=2, progress=True)
    text = shown.getvalue()
    for words in ("Recording", "10/10", "rows/s", "0:00:00", "3 failed"):
        assert words in text, text


def test_the_bar_can_be_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    labelled(data_rows(2), tmp_path / "r")
    assert capfd.readouterr() == ("", "")


def test_memory_holds_one_call_and_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator's rows are read as they are needed, and shards end by their bytes."""
    monkeypatch.setattr(record, "SHARD_BYTES", 1500)
    seen = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for row in data_rows(40):
            seen += 1
            yield row

    policy, engine = make("text", hidden=HiddenSpec(SEGMENTS))
    sent: list[tuple[int, int]] = []
    engine.fault = lambda answer: sent.append((seen, len(engine.requests)))
    recording = record_hidden_states(policy, rows(), tmp_path / "r", prompt=PROMPT, batch_size=4, progress=False)
    assert sent == [(count, count) for count in range(4, 41, 4)]
    sizes = [shard.rows for shard in recording._manifest.shards]
    assert sum(sizes) == 40
    assert max(sizes) < 20


def test_texts_count_for_the_bytes_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SHARD_BYTES", 10_000)
    rows = [{"number": 1, "words": "w1", "note": ["a" * 1000]} for _ in range(40)]
    recording = labelled(rows, tmp_path / "r", batch_size=4)
    assert len(recording._manifest.shards) == 4


@pytest.mark.parametrize("device", [None, "cpu"])
def test_no_row_of_the_output_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    """Moving a TensorDict to where it is took a third of the time of a row."""
    moved: list[Any] = []
    move = TensorDictBase.to
    monkeypatch.setattr(TensorDictBase, "to", lambda td, *args, **options: [moved.append(td), move(td, *args)][1])
    policy, _ = make("text", hidden=HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0}, device=device)
    record_hidden_states(policy, data_rows(8), tmp_path / "r", prompt=PROMPT, progress=False)
    assert moved == []


def test_a_policy_over_any_engine_and_with_keys_of_its_own(tmp_path: Path) -> None:
    """The keys, the mode and the padding of the policy are for its own calls."""
    own = {"text_key": None, "tokens_key": ("my", "ids"), "hidden_states_key": "vectors", "pad_output": True}
    engine = RecordingEngine(tokenizer=TOKENIZER)
    policy, _ = make("history", engine=engine, hidden=HiddenSpec(("prompt",)), **own)
    rows = data_rows(3)
    out = record_hidden_states(policy, rows, tmp_path / "r", prompt=PROMPT, progress=False).tensordict
    torch.testing.assert_close(out["hidden_states", "prompt"][2], vector_of(rows[2], "prompt"))
    assert out[2]["text_generated"] == TOKENIZER.decode(response_of(ids_of(rows[2])), skip_special_tokens=True)
