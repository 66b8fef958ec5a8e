"""What an operator sees of a real server: counters of both sides, and what `doctor` says.

The counters in SGLang's ``/metrics`` are under test in `test_qwen3_untied.py`, whose server has metrics.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from helpers.command_line import invoke
from helpers.policy_checks import prompt_of

from torchrl_sglang_hidden import HiddenSpec, Request, SGLangServer

pytestmark = pytest.mark.engine


def difference(before: object, after: object) -> dict[str, float]:
    first, second = asdict(before), asdict(after)  # type: ignore[call-overload]
    return {name: second[name] - first[name] for name in first}


def test_both_sides_count_the_same(smol: SGLangServer) -> None:
    prompt = tuple(prompt_of(40, seed=11))
    request = Request(
        prompt, {"max_new_tokens": 4, "temperature": 0.0}, hidden=HiddenSpec(segments=("prompt", "response"))
    )
    client, server = smol.counters(), smol.server_counters()
    smol.generate([request])
    smol.generate([request])
    seen = difference(client, smol.counters())
    assert (seen["requests"], seen["completions"], seen["gaps"], seen["failures"]) == (2, 2, 0, 0)
    assert (seen["prompt_tokens"], seen["response_tokens"], seen["rows"]) == (80, 8, 88)
    assert seen["cached_tokens"] > 0, "the second prompt was in the prefix cache"
    assert 0 < seen["sent_bytes"] < seen["received_bytes"]
    counted = difference(server, smol.server_counters())
    assert (counted["requests"], counted["refusals"]) == (2, 0)
    assert counted["prefix_hits"] == 1
    assert counted["prefix_rows"] == seen["cached_tokens"]
    assert counted["rows"] + counted["prefix_rows"] == 88, "each row was taken, or spared by a prompt that began alike"
    assert counted["steps"] >= 8
    # Two cores at work on a model: the server half has a small part of it.
    assert 0 < counted["step_seconds"] < 2


def test_doctor_finds_nothing_missing(smol: SGLangServer) -> None:
    result = invoke("doctor", smol.url)
    assert result.exit_code == 0, result.output
    found = json.loads(invoke("doctor", smol.url, "--json").stdout)
    says = {finding["name"]: finding for finding in found["findings"]}
    assert found["healthy"]
    assert says["server half"]["mark"] == says["hidden states"]["mark"] == "yes"
    assert says["hidden states"]["says"].startswith("pooled in the server, layers -1, 0…29")
    assert says["device"]["says"] == "cpu" or says["device"]["says"].startswith("cuda")
    assert says["so far"]["says"].split()[1] == "requests,"
