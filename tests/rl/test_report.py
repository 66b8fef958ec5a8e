"""`write_report`: one page with its pictures inside, of the right rows, and nothing of it comes from elsewhere."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.policy_batches import make
from typer.testing import CliRunner

from torchrl_sglang_hidden import (
    HiddenSpec,
    InputError,
    InputTypeError,
    MissingKeyError,
    Recording,
    RecordingError,
    record_hidden_states,
)
from torchrl_sglang_hidden.cli import app
from torchrl_sglang_hidden.rl import effective_rank, linear_probe, report, state_drift, state_variance, write_report
from torchrl_sglang_hidden.rl.prompts import Field

PROMPT = "w{number} w1 {words}"


def rows(count: int = 80, **more: Any) -> list[dict[str, Any]]:
    """Return rows of four prompts in episodes of ten; action and reward follow from the prompt, the luck does not."""
    luck = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {
            "number": index % 4,
            "words": f"w{5 + index % 4}",
            "action": index % 2,
            "reward": float(index % 4),
            "luck": luck[index],
            "kind": "even" if index % 2 == 0 else "odd",
            "done": index % 10 == 9,
            **more,
        }
        for index in range(count)
    ]


def record(path: Path, data: Any = None, hidden: HiddenSpec | None = None, **options: Any) -> Recording:
    policy, _ = make("text", hidden=hidden or HiddenSpec(("prompt",)), generate_kwargs={"max_new_tokens": 0})
    options = {"prompt": PROMPT, "progress": False, **options}
    return record_hidden_states(policy, rows() if data is None else data, path, **options)


class Page(HTMLParser):
    """A page: its headings, the cells of each row of its tables, the sources of its pictures, and all attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes += attrs
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self._inside in ("h1", "h2"):
            self.headings[-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found


def page_of(recording: Recording, path: Path, **options: Any) -> Page:
    assert write_report(recording, path, **options) == path
    return Page(path)


# --- what is on it ----------------------------------------------------------------------------------------------------


def walked(row: Any) -> str:
    return f"w{int(row['action'])} w1"


@pytest.mark.parametrize(
    ("prompt", "shown"), [(Field("kind"), "Field(name='kind')"), (walked, f"{walked.__module__}.walked")]
)
def test_a_prompt_that_is_no_format_string(prompt: Any, shown: str, tmp_path: Path) -> None:
    recording = record(tmp_path / "walks", prompt=prompt)
    assert page_of(recording, tmp_path / "report.html").row("prompt") == [shown]


def test_the_numbers_are_the_measures_of_the_states(tmp_path: Path) -> None:
    recording = record(tmp_path / "walks")
    page = page_of(recording, tmp_path / "report.html")
    states = recording.tensordict["hidden_states", "prompt"]
    variance = state_variance(states)
    assert page.headings == [
        "Hidden states of walks",
        "What the states hold: prompt",
        "What a linear map reads: prompt",
        "Rows that failed",
    ]
    assert page.row("prompt") == [PROMPT]
    assert page.row("hash") == [recording.metadata["hash"]]
    assert page.row("total variance") == [f"{variance.total:.4g}"]
    assert page.row("active dimensions") == [f"{variance.num_active} of 8"]
    assert page.row("effective rank") == [f"{effective_rank(states):.1f} of at most 8"]
    assert page.row("reward")[:1] == ["R² 1.000"]
    assert page.row("action")[:2] == ["accuracy 1.000", page.row("action")[1]]
    groups = torch.arange(80) // 10
    found = linear_probe(states, recording.tensordict["action"], groups=groups)
    assert page.row("action")[1:] == [
        f"{found.zero_score:.3f}",
        f"{sum(found.shuffle_scores) / 20:.3f}",
        f"{found.p_value:.2g}",
        "20",
    ]
    assert "every episode is on one side" in page.text


def test_every_picture_is_inside_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(record(tmp_path / "walks"), tmp_path / "report.html")
    assert len(page.pictures) == 4 + 2
    for source in page.pictures:
        kind, content = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    linked = {name for name, _ in page.attributes if name in ("src", "href", "srcset", "action")}
    assert linked == {"src"}
    assert not re.search(r"https?:|@import|url\(", (tmp_path / "report.html").read_text())
    assert len(set(page.pictures)) == len(page.pictures)


def test_targets_by_name(tmp_path: Path) -> None:
    page = page_of(record(tmp_path / "walks"), tmp_path / "report.html", targets=["kind", "luck"])
    assert page.row("kind")[0] == "accuracy 1.000"
    assert float(page.row("luck")[0].removeprefix("R² ")) < 0.3
    assert float(page.row("luck")[3]) > 0.05


def test_what_cannot_be_probed_says_why(tmp_path: Path) -> None:
    page = page_of(record(tmp_path / "a", rows(same=3)), tmp_path / "report.html", targets=["same"])
    assert page.row("same")[0].startswith("not probed: targets: all are 3; give at least 2 classes")


def test_fields_of_every_kind_are_probed_or_say_why(tmp_path: Path) -> None:
    more = [
        {
            "one_hot": np.eye(2, dtype=np.int64)[row["number"] % 2],
            "picture": np.full((2, 2, 3), row["number"], np.uint8),
            "ragged": [1.0] * (1 + row["number"]),
            "text": f"w{row['number']}",
            "none": None,
            "done": [row["done"]] * (1 + row["number"]),
        }
        for row in rows()
    ]
    data = [{**row, **others} for row, others in zip(rows(), more, strict=True)]
    recording = record(tmp_path / "walks", data)
    targets = ["one_hot", "picture", "ragged", "text", "none"]
    page = page_of(recording, tmp_path / "report.html", targets=targets)
    assert page.row("one_hot")[0] == page.row("text")[0] == "accuracy 1.000"
    for name in ("picture", "ragged", "none"):
        assert page.row(name)[0].startswith("not probed: ")
    data = [{**row, "done": "no"} for row in rows()]
    assert page_of(record(tmp_path / "other", data), tmp_path / "other.html").headings


def test_without_targets_and_episodes(tmp_path: Path) -> None:
    data = [{"number": index % 4, "words": "w5"} for index in range(20)]
    page = page_of(record(tmp_path / "a", data), tmp_path / "report.html")
    assert "What a linear map reads: prompt" not in page.headings
    data = [{"number": index % 4, "words": "w5", "action": index % 2} for index in range(40)]
    page = page_of(record(tmp_path / "b", data), tmp_path / "other.html")
    assert "one of 20 blocks of neighbouring rows is on one side" in page.text


def test_rows_that_failed_are_left_out_and_listed(tmp_path: Path) -> None:
    data = rows()
    data[3]["words"] = "w1 " * 80  # over the context
    with pytest.warns(UserWarning, match="1 of 80 rows have no label"):
        recording = record(tmp_path / "walks", data)
    page = page_of(recording, tmp_path / "report.html")
    states = recording.tensordict["hidden_states", "prompt"]
    assert page.row("rows, dimensions") == ["79, 8"]
    assert page.row("total variance") == [f"{state_variance(states[states.isfinite().all(-1)]).total:.4g}"]
    assert page.row("3") == [recording.failures[0].reason]
    assert "1 of 80. Their states are NaN." in page.text


def test_of_rows_that_share_a_label_one_is_taken(tmp_path: Path) -> None:
    recording = record(tmp_path / "walks", every=5)
    page = page_of(recording, tmp_path / "report.html")
    states = recording.tensordict["hidden_states", "prompt"]
    assert page.row("rows, dimensions") == ["16, 8"]
    assert page.row("total variance") == [f"{state_variance(states[::5]).total:.4g}"]


def test_the_map_has_the_rows_places_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    plot_map = report.plot_map

    def plot(states: torch.Tensor, values: torch.Tensor, **options: Any) -> Any:
        drawn.append(values.tolist())
        return plot_map(states, values, **options)

    monkeypatch.setattr(report, "plot_map", plot)
    write_report(record(tmp_path / "walks", rows(12), every=5), tmp_path / "report.html")
    assert drawn == [[0, 5, 10]]


def test_layers_and_segments(tmp_path: Path) -> None:
    policy, _ = make("text", hidden=HiddenSpec(("prompt", "response"), layers=(0, 2, -1)))
    recording = record_hidden_states(policy, rows(), tmp_path / "walks", prompt=PROMPT, progress=False)
    page = page_of(recording, tmp_path / "report.html", targets=["action"])
    names = [heading for heading in page.headings if "prompt" in heading or "response" in heading]
    assert names == [
        f"{kind}: {segment}"
        for segment in ("prompt", "response")
        for kind, segment in (
            ("Layers", segment),
            ("What the states hold", f"{segment}, layer -1"),
            ("What a linear map reads", f"{segment}, layer -1"),
        )
    ]
    states = recording.tensordict["hidden_states", "prompt"]
    assert page.rows.count(["layer", "variance", "active dimensions", "effective rank", "mean cosine"]) == 2
    first = next(row for row in page.rows if row[0] == "0")
    assert first[1] == f"{state_variance(states[:, 0]).total:.4g}"
    totals = [row[1] for row in page.rows if row[0] == "total variance"]
    assert totals[0] == f"{state_variance(states[:, -1]).total:.4g}"
    assert len(page.pictures) == 2 * (1 + 4 + 1)


def test_drift_of_another_recording(tmp_path: Path) -> None:
    reference = record(tmp_path / "reference")
    live = record(tmp_path / "live", [{**row, "number": 9 + row["number"]} for row in rows(40)])
    page = page_of(reference, tmp_path / "report.html", against=live)
    key = ("hidden_states", "prompt")
    drift = state_drift(reference.tensordict[key], live.tensordict[key])
    assert "Drift of live: prompt" in page.headings
    assert page.row("mean shift") == [f"{drift.mean_shift:.3f}"]
    assert page.row("Fréchet distance") == [f"{drift.frechet:.4g}"]
    assert page.row("discrepancy") == [f"{drift.mmd:.3g}, p = {drift.p_value:.2g}, of 80 and 40 rows"]


def test_what_was_recorded_is_text_and_no_markup(tmp_path: Path) -> None:
    prompt = "w{number} <script>alert(1)</script> & {words}"
    page = page_of(record(tmp_path / "<b>", prompt=prompt), tmp_path / "report.html")
    assert page.row("prompt") == [prompt]
    assert page.headings[0] == "Hidden states of <b>"
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_a_page_that_is_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    page = page_of(record(tmp_path / "walks"), path)
    assert page.headings
    assert sorted(found.name for found in tmp_path.iterdir()) == ["report.html", "walks"]


def test_a_recording_from_inside_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "walks")
    monkeypatch.chdir(tmp_path / "walks")
    assert write_report(".") == tmp_path / "walks.html"
    assert Page(tmp_path / "walks.html").headings[0] == "Hidden states of walks"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    recording = record(tmp_path / "walks")
    # The page is written beside its place first, and a directory cannot be replaced with it.
    (tmp_path / "page.html").mkdir()
    with pytest.raises(InputError, match=r"page\.html: .*; choose a file in a directory that can be written"):
        write_report(recording, tmp_path / "page.html")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["page.html", "walks"]


def test_refuses(tmp_path: Path) -> None:
    recording = record(tmp_path / "walks")
    with pytest.raises(
        MissingKeyError, match=r"targets \['wins'\]: the recording has \[.*'reward'.*; name one of these"
    ):
        write_report(recording, tmp_path / "x.html", targets=["wins"])
    with pytest.raises(InputTypeError, match=r"targets='reward' is a str; expected a list of keys"):
        write_report(recording, tmp_path / "x.html", targets="reward")
    with pytest.raises(InputError, match=r"x\.html: .*; choose a file in a directory that can be written"):
        write_report(recording, tmp_path / "no" / "x.html")
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match=r"directory: .*; choose a file"):
        write_report(recording, tmp_path / "directory")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "walks"]
    one = record(tmp_path / "one", rows(1))
    with pytest.raises(InputError, match="has 1 rows with states of their own; expected at least 2: record more"):
        write_report(one, tmp_path / "x.html")
    other = record(tmp_path / "other", hidden=HiddenSpec(("prompt",), layers=(0, -1)))
    policy, _ = make("text", hidden=HiddenSpec(("response",)))
    responses = record_hidden_states(policy, rows(), tmp_path / "responses", prompt=PROMPT, progress=False)
    with pytest.raises(InputError, match=r"responses has no \('hidden_states', 'prompt'\); expected the same states"):
        write_report(recording, tmp_path / "x.html", against=responses)
    with pytest.raises(InputError, match=r"layers \[0, -1\], and the recording -1; expected the same"):
        write_report(recording, tmp_path / "x.html", against=other)
    assert not (tmp_path / "x.html").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_writes_beside_the_recording(tmp_path: Path) -> None:
    record(tmp_path / "walks")
    result = run(f"{tmp_path / 'walks'}{os.sep}")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "walks.html") in result.stdout.replace("\n", "")
    assert Page(tmp_path / "walks.html").row("reward")


def test_the_commands_options(tmp_path: Path) -> None:
    record(tmp_path / "walks")
    record(tmp_path / "live", rows(40))
    out = tmp_path / "page.html"
    options = ["--target", "luck", "--target", "next.done", "--against", str(tmp_path / "live"), "--out", str(out)]
    missing = run(str(tmp_path / "walks"), *options)
    assert missing.exit_code == 1
    assert "('next', 'done')" in missing.stderr
    del options[2:4]
    assert run(str(tmp_path / "walks"), *options).exit_code == 0
    page = Page(out)
    assert page.row("luck")
    assert "Drift of live: prompt" in page.headings


def test_the_command_refuses_what_is_no_recording(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "has no recording" in result.stderr
    with pytest.raises(RecordingError):
        raise CliRunner().invoke(app, ["--debug", "report", str(tmp_path)]).exception or AssertionError
