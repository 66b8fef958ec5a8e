"""Examines a server for ``torchrl-sglang-hidden doctor``: what it can do, what it lacks, and how to start it right.

Reads what any server says of itself, also one that is too old, stock, or no SGLang at all, where `connect` raises.
Sends one prompt of a few tokens where the server half has not checked its layers yet, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from torchrl_sglang_hidden._version import __version__
from torchrl_sglang_hidden.counters import ServerCounters
from torchrl_sglang_hidden.engines.address import LOOPBACK, split_url
from torchrl_sglang_hidden.engines.api_key import ApiKey
from torchrl_sglang_hidden.engines.endpoint import Endpoint
from torchrl_sglang_hidden.engines.http_answers import read_json, translated
from torchrl_sglang_hidden.engines.retries import Retries
from torchrl_sglang_hidden.errors import AuthenticationError, EngineError, ProtocolError, SGLangHiddenError
from torchrl_sglang_hidden.protocol import CHANNEL, PLUGIN_ENV, PROTOCOL
from torchrl_sglang_hidden.records import EngineInfo
from torchrl_sglang_hidden.server.metrics import COUNTERS

__all__ = ["Examination", "Finding", "examine"]

Mark = Literal["yes", "no", "warn", ""]

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 30.0
START = "torchrl-sglang-hidden serve MODEL"


@dataclass(frozen=True, slots=True)
class Finding:
    """Holds one line of an examination.

    Args:
        name: what was looked at.
        mark: whether it is there: "yes", "no", "warn" for something to know, "" for a plain fact.
        says: in words.
    """

    name: str
    mark: Mark
    says: str


@dataclass(slots=True)
class Examination:
    """Holds what was found of one server.

    Args:
        url: its address.
        findings: the lines, in order.
        remedies: what to do about what is missing, the most important first.
        healthy: whether it gives hidden states through the server half of this version.
    """

    url: str
    findings: list[Finding] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    healthy: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON carries it."""
        return {"client": __version__, **asdict(self)}

    def note(self, name: str, mark: Mark, says: object, remedy: str = "") -> None:
        """Add a finding, and what to do about it."""
        self.findings.append(Finding(name, mark, str(says)))
        if remedy:
            self.remedies.append(remedy)

    def can(self, name: str, able: bool, says: str, lacks: str, remedy: str = "") -> None:
        """Add a finding about something that the server can do, or cannot."""
        self.note(name, "yes" if able else "no", says if able else lacks, "" if able else remedy)


def examine(url: str, api_key: str | None = None) -> Examination:
    """Ask a server what it can do.

    Args:
        url: its address.
        api_key: the key that it wants, or None.

    Raises:
        InputError: the address or the key cannot be used.
    """
    host = str(split_url(url).hostname)
    found = Examination(url.rstrip("/"))
    key = None if api_key is None else ApiKey(api_key)
    try:
        model_info, server_info = _read_pages(url, key, CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
    except AuthenticationError as error:
        found.note("answers", "no", error, "pass the server's key: --api-key, or TORCHRL_SGLANG_HIDDEN_API_KEY")
        return found
    except EngineError as error:
        found.note("answers", "no", error, f"start a server, and ask at its address: {START}")
        return found
    if "model_path" not in model_info or "internal_states" not in server_info:
        lacks = "it answers, and is no SGLang: /server_info has no internal_states, or /model_info no model_path"
        found.note("SGLang", "no", lacks, f"ask at an SGLang's own address, not at a router's; {START}")
        return found
    version = server_info.get("version", "of an unknown version")
    found.note("SGLang", "yes", f"{version}, model {model_info['model_path']}")
    _examine_access(found, host, key, server_info)
    speaks = _examine_protocol(found, server_info)
    try:
        with closing(Endpoint(url, key, CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Retries(0))) as endpoint:
            info, server_info = endpoint.info, {**server_info, "internal_states": endpoint.internal_states()}
    # Whatever it says may be of the wrong type, and this is the command to find that out with.
    except (SGLangHiddenError, AttributeError, TypeError) as error:
        found.note("a client", "no", error, "" if found.remedies else f"start it as this version does: {START}")
        return found
    _examine_states(found, info)
    _examine_features(found, info, server_info)
    _examine_limits(found, info, server_info)
    found.healthy = speaks and info.pools_in_server
    return found


def _read_pages(
    url: str, api_key: ApiKey | None, connect_timeout_s: float, read_timeout_s: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a server answers at ``/model_info`` and ``/server_info``, whatever server it is."""
    timeout = httpx.Timeout(read_timeout_s, connect=connect_timeout_s)
    trust_env = split_url(url).hostname not in LOOPBACK
    pages: list[dict[str, Any]] = []
    with translated(url), httpx.Client(base_url=url, auth=api_key, timeout=timeout, trust_env=trust_env) as client:
        for path in ("/model_info", "/server_info"):
            page = read_json(client.get(path), url)
            if not isinstance(page, dict):
                raise ProtocolError(f"{url}{path} answered {str(page)[:80]!r}; is that an SGLang server?")
            pages.append(page)
    return pages[0], pages[1]


def _examine_access(found: Examination, host: str, key: ApiKey | None, server_info: Mapping[str, Any]) -> None:
    wants_key = bool(server_info.get("api_key"))
    open_host = server_info.get("host") not in LOOPBACK
    says = "wanted, and the one that was given is right" if wants_key else "none wanted"
    if not wants_key and key is not None:
        says = "none wanted; the one that was given is ignored"
    remedy = "give it a key, for others can reach it: TORCHRL_SGLANG_HIDDEN_API_KEY=… " + START
    unsafe = open_host and not wants_key
    found.note("API key", "warn" if unsafe else "", says, remedy if unsafe else "")
    if host not in LOOPBACK and key is not None and found.url.startswith("http://"):
        found.note("encryption", "warn", "none: the key travels in plain text", "ask through https, or ssh -L")


def _examine_protocol(found: Examination, server_info: Mapping[str, Any]) -> bool:
    states = server_info["internal_states"]
    states = [state for state in states if isinstance(state, Mapping)] if isinstance(states, list) else []
    spoken = [state[CHANNEL].get("protocol") for state in states if isinstance(state.get(CHANNEL), Mapping)]
    speaks = 0 < len(spoken) == len(states) and all(number == PROTOCOL for number in spoken)
    lacks = f"speaks protocol {spoken[0]}, and this client {PROTOCOL}" if spoken else "not there: a stock SGLang"
    remedy = f"install torchrl-sglang-hidden {__version__} beside the server, as here, and start it again"
    if not spoken:
        remedy = f"start it with the server half: {START}, or {PLUGIN_ENV}=1 python -m sglang.launch_server …"
    found.can("server half", speaks, f"protocol {PROTOCOL}", lacks, remedy)
    return speaks


def _examine_states(found: Examination, info: EngineInfo) -> None:
    because = f": {info.no_states_because}" if info.no_states_because else ""
    if info.pools_in_server:
        found.note("hidden states", "yes", f"pooled in the server, layers {_ranges(info.layers)}{because}")
        if because:
            found.remedies.append(f"for the other layers: {info.no_states_because}")
    elif info.returns_hidden_states:
        found.note("hidden states", "warn", "SGLang's own, as JSON: the same numbers, much slower")
    else:
        remedy = "" if found.remedies else f"start it with --enable-return-hidden-states: {START}"
        found.note("hidden states", "no", f"none{because}", remedy)
    lacks = "through the server half only"
    found.can("logits, constraints", info.pools_in_server, ", ".join(info.constraints) or "yes", lacks)
    found.can("candidates", True, "log-probs of given sentences", "")
    elsewhere = "over HTTP: the server is elsewhere" if info.pools_in_server else "over HTTP: no server half"
    says = "in this machine's memory" if info.shares_memory else elsewhere
    found.note("big answers", "", says)


def _examine_features(found: Examination, info: EngineInfo, server_info: Mapping[str, Any]) -> None:
    flags = {
        "images": (info.takes_images, f"up to {info.max_images or 'any number'} a prompt", "none: a text model"),
        "LoRA adapters": (bool(server_info.get("enable_lora")), "on", "off: start it with --enable-lora"),
        "seeds": (info.honours_seeds, "deterministic", "ignored: start it with --enable-deterministic-inference"),
        "priorities": (info.honours_priorities, "on", "ignored: start it with --enable-priority-scheduling"),
        "metrics": (bool(server_info.get("enable_metrics")), "/metrics", "off: start it with --enable-metrics"),
        "prefix cache": (not server_info.get("disable_radix_cache"), "on", "off: --disable-radix-cache"),
        "overlapping": (not server_info.get("disable_overlap_schedule"), "on", "off: --disable-overlap-schedule"),
        "streams": (not server_info.get("incremental_streaming_output"), "with states at their end", "without states: "
                    "start it without --incremental-streaming-output"),
    }  # fmt: skip
    for name, (able, says, lacks) in flags.items():
        found.note(name, "yes" if able else "", says if able else lacks)
    found.note("sessions", "yes", "the server keeps what was said")
    quantized = server_info.get("quantization")
    says = f"none while quantised ({quantized})" if quantized else f"serving version {info.weight_version!r}"
    found.note("new weights", "no" if quantized else "yes", says)
    if info.takes_processors:
        says = "SGLang unpickles logit processors of clients: whoever has the key runs code"
        found.note("trust", "warn", says, "start it without --enable-custom-logit-processor")


def _examine_limits(found: Examination, info: EngineInfo, server_info: Mapping[str, Any]) -> None:
    ranks = [(name, server_info.get(f"{name}_size")) for name in ("tp", "dp", "pp")]
    shape = ", ".join(f"{name} {size}" for name, size in ranks if isinstance(size, int) and size > 1)
    found.note("device", "", f"{server_info.get('device', 'unknown')}{', ' + shape if shape else ''}")
    found.note("model", "", f"V {info.vocab_size}, D {info.hidden_size}, {info.num_layers} layers")
    says = f"context {info.context_length}, prompts up to {info.max_prompt_tokens} tokens"
    running = server_info.get("max_running_requests")
    found.note("limits", "", f"{says}, {running} requests at a time" if running else says)
    states = server_info["internal_states"] or ()
    counted = [state.get(COUNTERS) for state in states if isinstance(state, Mapping)]
    if any(isinstance(one, Mapping) for one in counted):
        total = ServerCounters.of(counted)
        per_step = 1e6 * total.step_seconds / max(total.steps, 1)
        says = f"{total.requests} requests, {total.rows} rows, {total.refusals} refused, {per_step:.0f} µs a step"
        found.note("so far", "", says)


def _ranges(layers: Sequence[int]) -> str:
    """Write layer ids in short: ``(-1, 0, 1, 2, 5)`` → ``"-1, 0…2, 5"``. The last, -1, is no neighbour of the first."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1 and layer:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}…{part[-1]}" for part in parts)
