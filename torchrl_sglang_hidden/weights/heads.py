"""Pushes small heads to running engines, and drops them.

Knows the control route that the server half listens at, and not how it is called: the engines pass that in. A head's
file travels in the call itself, to a server on any machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace

from torchrl_sglang_hidden.errors import CapabilityError, EngineError, InputTypeError, WeightsError
from torchrl_sglang_hidden.protocol.head_call import HeadCall
from torchrl_sglang_hidden.records import EngineInfo
from torchrl_sglang_hidden.spec.heads import Head, check_head_name
from torchrl_sglang_hidden.spec.hidden import canonical_layer
from torchrl_sglang_hidden.weights.control import ControlCall, succeeded

__all__ = ["HeadSource", "drop", "push"]

HeadSource = str | os.PathLike[str] | Head


def push(calls: Sequence[ControlCall], info: EngineInfo, name: str, source: HeadSource, version: str | None) -> str:
    """Push a head to every server; see `Engine.push_head`.

    Args:
        calls: calls a control route, of each server.
        info: the engine's.
        name: the head's.
        source: the head, or its file.
        version: its version; None names it by its content.

    Returns:
        The version.
    """
    check_head_name(name)
    if version is not None and not (isinstance(version, str) and version.strip()):
        raise InputTypeError(f"version={version!r:.80}: expected a name such as '2', or None")
    _check_server_half(info)
    if isinstance(source, Head):
        head = source
    elif isinstance(source, (str, os.PathLike)):
        head = Head.load(source)
    else:
        raise InputTypeError(f"head={source!r:.80}: expected a Head, or the path of a file that Head.save wrote")
    if head.width != info.hidden_size:
        raise WeightsError(
            f"head {name!r} reads states of {head.width} numbers, and the model's have {info.hidden_size}; train it "
            "on this model's states"
        )
    layer = canonical_layer(head.layer, info.num_layers)
    if layer not in info.layers:
        raise CapabilityError(
            f"head {name!r} reads layer {head.layer}, and the server gives the states of {list(info.layers)}; start "
            f"it for that layer, as with launch(layers=({layer},)), or use another"
        )
    if layer != head.layer:
        head = replace(head, layer=layer)
    data = head.to_bytes()
    version = hashlib.sha256(data).hexdigest()[:12] if version is None else version
    _call(calls, HeadCall(name, version, data), f"take head {name!r}")
    return version


def drop(calls: Sequence[ControlCall], info: EngineInfo, name: str) -> None:
    """Drop a head from every server that has it; see `Engine.drop_head`.

    One that does not, such as one that was started again, keeps none of the others from it.
    """
    _check_server_half(info)
    call, refused = HeadCall(check_head_name(name)), []
    for one in calls:
        try:
            _call([one], call, f"drop head {name!r}")
        except EngineError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _check_server_half(info: EngineInfo) -> None:
    if not info.pools_in_server:
        because = f" ({info.no_states_because})" if info.no_states_because else ""
        raise CapabilityError(
            f"heads run in the server half, which this server does not have{because}; start it with "
            "torchrl_sglang_hidden.launch or `torchrl-sglang-hidden serve`"
        )


def _call(calls: Sequence[ControlCall], call: HeadCall, what: str) -> None:
    packed = call.pack()
    for one in calls:
        succeeded(one("get_weights_by_name", {"name": packed}), what)
