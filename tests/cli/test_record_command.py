"""``record`` over a server of the fake engine: how its options become a recording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import invoke
from helpers.fake_engine import RecordingServer
from helpers.picture_env import PLACE, picture_server, vector_of
from helpers.recordings import TOKENIZER
from helpers.word_processor import WordProcessor, picture

from torchrl_sglang_hidden import SGLangServer, connect, load_recording
from torchrl_sglang_hidden.demo import model as model_module
from torchrl_sglang_hidden.engines import launch as launch_module
from torchrl_sglang_hidden.images import expansion

URL = "http://127.0.0.1:4321"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RecordingServer]:
    TOKENIZER.save_pretrained(tmp_path / "model")
    server = RecordingServer(model_path=str(tmp_path / "model"))
    yield server
    server.stop()


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"number": number, "ask": "w1 w2", "chat": [{"role": "user", "content": "w3"}]} for number in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


def test_reads_prompts_of_a_template(server: RecordingServer, data: str, tmp_path: Path) -> None:
    options = ["--prompt", "w{number} w2", "--every", "2", "--batch-size", "2"]
    result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Recorded 5 rows in {tmp_path / 'r'}; 0 of them have no label.\n"
    out = load_recording(tmp_path / "r")
    assert (out.metadata["segments"], out.metadata["layers"], out.metadata["pooling"]) == (["prompt"], -1, "mean")
    assert [len(payload["input_ids"]) for payload in server.payloads] == [2, 1]
    assert out.tensordict["label_row"].tolist() == [0, 0, 2, 2, 4]
    assert server.payloads[0]["input_ids"][1] == TOKENIZER("w2 w2")["input_ids"]


def test_generates_greedily_from_a_field(server: RecordingServer, data: str, tmp_path: Path) -> None:
    options = ["--prompt-key", "chat", "--max-new-tokens", "3", "--tokens"]
    options += ["--segments", "prompt,response", "--layers", "0,-1", "--pooling", "last"]
    result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, *options)
    assert result.exit_code == 0, result.output
    metadata = load_recording(tmp_path / "r").metadata
    assert (metadata["segments"], metadata["layers"], metadata["pooling"]) == (
        ["prompt", "response"],
        [0, -1],
        "last",
    )
    assert metadata["tokens"] == "torch.float16"
    assert metadata["generate_kwargs"] == {"max_new_tokens": 3, "temperature": 0.0}
    assert metadata["prompt"]["repr"] == "Field(name='chat')"
    (sampling,) = {json.dumps(one) for one in server.payloads[0]["sampling_params"]}
    assert json.loads(sampling)["temperature"] == 0.0


def test_says_what_failed(server: RecordingServer, data: str, tmp_path: Path) -> None:
    Path(data).write_text('{"ask": "w1"}\n{"ask": ""}\n')
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        result = invoke("record", data, str(tmp_path / "r"), "--url", server.url, "--prompt-key", "ask")
    assert result.exit_code == 0
    assert "1 of them have no label" in result.stdout
    assert "    PromptLengthError: text, row 1: an empty string" in result.stdout


def test_records_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of images are named, or those of the folder."""
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "images" / f"{seed}.png")
    monkeypatch.setattr(expansion, "_load", lambda path: WordProcessor(TOKENIZER))
    server = picture_server(str(tmp_path / "model"))
    try:
        for options in ([], ["--image-key", "image"], ["--image-key", "image", "--image-key", "again"]):
            arguments = [str(tmp_path / "images"), str(tmp_path / f"r{len(options)}"), "--url", server.url, *options]
            result = invoke("record", *arguments, "--prompt", f"{PLACE} w1")
            assert (result.exit_code == 0) is (len(options) < 4), result.output
    finally:
        server.stop()
    assert "no 'again'" in str(result.exception) + result.output
    out = load_recording(tmp_path / "r2").tensordict
    for row in out.unbind(0):
        expected = vector_of(f"{PLACE} w1", tmp_path / "images" / row["path"])
        torch.testing.assert_close(row["hidden_states", "prompt"], expected)


def test_serves_a_model_meanwhile(
    server: RecordingServer, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def launch(model: Any, **options: Any) -> SGLangServer:
        started.append((model, options))
        return connect(server.url)

    monkeypatch.setattr(launch_module, "launch", launch)
    monkeypatch.setattr(model_module, "demo_model", lambda: Path("the-demo-model"))
    for model in ("m", "demo"):
        options = ["--model", model, "--prompt", "w{number}", "--layers", "2"]
        assert invoke("record", data, str(tmp_path / model), *options).exit_code == 0
    assert started == [
        ("m", {"layers": (2,), "api_key": None}), (Path("the-demo-model"), {"layers": (2,), "api_key": None})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "{a}"], "--url None --model None: expected one of the two"),
        (["--prompt", "{a}", "--url", URL, "--model", "m"], "expected one of the two"),
        (["--url", URL], "--prompt None --prompt-key None: expected one of the two"),
        (["--url", URL, "--prompt", "{a}", "--prompt-key", "a"], "expected one of the two"),
        (["--url", URL, "--prompt", "{a}", "--layers", "x"], "record --layers x: expected integers"),
        (["--url", URL, "--prompt", "{a}", "--layers", "all"], "record --layers all: expected integers"),
        (["--model", "/no/such/model", "--prompt", "{a}"], "/no/such/model does not exist"),
    ],
)
def test_refuses(options: list[str], words: str, data: str, tmp_path: Path) -> None:
    result = invoke("record", data, str(tmp_path / "r"), *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not (tmp_path / "r").exists()
