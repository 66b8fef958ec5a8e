"""The README's speed table is the table of the record that is kept beside the programs, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hugging_face
import pytest
import report
from rounds import DifferentAnswersError

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_record() -> None:
    record = json.loads(report.RECORD.read_text(encoding="utf-8"))
    table = report.to_markdown(record)
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == table
    assert (report.RESULTS / "speed_table.md").read_text(encoding="utf-8").strip() == table


def test_the_record_says_where_it_was_made() -> None:
    record = json.loads(report.RECORD.read_text(encoding="utf-8"))
    lines = report.lines_of(record)
    assert len(lines) == len({(line.what, line.against) for line in lines}) > 0
    assert {"torch", "sglang", "torchrl", "transformers", "torchrl-sglang-hidden"} <= record["versions"].keys()
    assert {"cpu", "cores", "memory_gib"} <= record["machine"].keys()


def test_a_part_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    here: dict[str, Any] = {"versions": {"torch": "2"}, "machine": {"cores": 2}}
    old = {"parts": {"b": {"seconds": 1}, "a": {"seconds": 2}}, "scaling": {"rows": []}, **here}
    new = {"parts": {"a": {"seconds": 3}}, "scaling": {}, **here}
    merged = report.merge(new, old, ["a", "b", "c"])
    assert list(merged["parts"].items()) == [("a", {"seconds": 3}), ("b", {"seconds": 1})]
    assert merged["scaling"] == {"rows": []}
    with pytest.raises(SystemExit, match=r"machine were .* the parts \['b'\]"):
        report.merge({**new, "machine": {"cores": 4}}, old, ["a", "b"])
    assert report.merge({**new, "machine": {"cores": 4}}, None, ["a"])["parts"] == {"a": {"seconds": 3}}


def test_a_missed_aim_is_said() -> None:
    assert report.Line("a", "b", 0.94, 0.98).cells() == ("a", "b", "0.94× (missed)", "≥ 0.98×")
    assert report.Line("a", "b", 0.98, 0.98).cells()[2] == "0.98×"
    assert report.Line("a", "b", 0.51, 0.5, "≤", " ms").cells() == ("a", "b", "0.51 ms (missed)", "≤ 0.5 ms")
    assert report.Line("a", "b", 3456.7, 3000, unit="× fewer").cells()[2:] == ("3,457× fewer", "≥ 3,000× fewer")


def test_rows_may_part_from_hugging_faces_where_two_tokens_are_equally_good_and_nowhere_else() -> None:
    assert not hugging_face._part([5, 6, 7], [5, 6, 7], [0.0, 0.0, 0.0])
    assert hugging_face._part([5, 6, 7], [5, 9, 8], [2.0, 1e-5, 2.0])
    with pytest.raises(DifferentAnswersError, match=r"best token's log-prob is 2\.0e\+00 over the next"):
        hugging_face._part([5, 6, 7], [5, 9, 7], [1e-5, 2.0, 1e-5])
