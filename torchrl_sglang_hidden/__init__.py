"""A TorchRL policy over SGLang that returns text, tokens, log-probs and mean-pooled hidden states.

Everything public is here, and is loaded when it is first used: importing the package loads neither SGLang nor TorchRL,
for SGLang's own processes import it too.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from torchrl_sglang_hidden._version import __version__

# A library says nothing unless its user's program asks logging to: without this, Python would print warnings.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from torchrl_sglang_hidden.demo.model import demo_model as demo_model
    from torchrl_sglang_hidden.demo.vision_model import demo_vision_model as demo_vision_model
    from torchrl_sglang_hidden.engines.base import Engine as Engine
    from torchrl_sglang_hidden.engines.http import SGLangServer as SGLangServer
    from torchrl_sglang_hidden.engines.http import connect as connect
    from torchrl_sglang_hidden.engines.launch import launch as launch
    from torchrl_sglang_hidden.engines.offline import SGLangOffline as SGLangOffline
    from torchrl_sglang_hidden.engines.restarting import Restart as Restart
    from torchrl_sglang_hidden.engines.sessions import Session as Session
    from torchrl_sglang_hidden.engines.streams import AsyncStream as AsyncStream
    from torchrl_sglang_hidden.engines.streams import Stream as Stream
    from torchrl_sglang_hidden.engines.streams import StreamChunk as StreamChunk
    from torchrl_sglang_hidden.errors import AlignmentError as AlignmentError
    from torchrl_sglang_hidden.errors import AuthenticationError as AuthenticationError
    from torchrl_sglang_hidden.errors import BatchCancelledError as BatchCancelledError
    from torchrl_sglang_hidden.errors import CapabilityError as CapabilityError
    from torchrl_sglang_hidden.errors import ChatTemplateError as ChatTemplateError
    from torchrl_sglang_hidden.errors import ConstraintError as ConstraintError
    from torchrl_sglang_hidden.errors import DemoModelError as DemoModelError
    from torchrl_sglang_hidden.errors import EngineError as EngineError
    from torchrl_sglang_hidden.errors import EngineTimeoutError as EngineTimeoutError
    from torchrl_sglang_hidden.errors import EngineUnreachableError as EngineUnreachableError
    from torchrl_sglang_hidden.errors import ImageError as ImageError
    from torchrl_sglang_hidden.errors import IncompleteWeightsError as IncompleteWeightsError
    from torchrl_sglang_hidden.errors import InputError as InputError
    from torchrl_sglang_hidden.errors import InputTypeError as InputTypeError
    from torchrl_sglang_hidden.errors import LaunchError as LaunchError
    from torchrl_sglang_hidden.errors import MissingKeyError as MissingKeyError
    from torchrl_sglang_hidden.errors import PromptLengthError as PromptLengthError
    from torchrl_sglang_hidden.errors import ProtocolError as ProtocolError
    from torchrl_sglang_hidden.errors import RecordingError as RecordingError
    from torchrl_sglang_hidden.errors import RequestAbortedError as RequestAbortedError
    from torchrl_sglang_hidden.errors import RequestRejectedError as RequestRejectedError
    from torchrl_sglang_hidden.errors import RestartError as RestartError
    from torchrl_sglang_hidden.errors import ServerRestartingError as ServerRestartingError
    from torchrl_sglang_hidden.errors import SGLangHiddenError as SGLangHiddenError
    from torchrl_sglang_hidden.errors import SpanError as SpanError
    from torchrl_sglang_hidden.errors import TokenIdError as TokenIdError
    from torchrl_sglang_hidden.errors import UnknownOptionError as UnknownOptionError
    from torchrl_sglang_hidden.errors import WeightsError as WeightsError
    from torchrl_sglang_hidden.policy.candidates import CandidateActor as CandidateActor
    from torchrl_sglang_hidden.policy.config import PolicyConfig as PolicyConfig
    from torchrl_sglang_hidden.policy.logits_from_hidden import logits_from_hidden as logits_from_hidden
    from torchrl_sglang_hidden.policy.outputs import HeadScores as HeadScores
    from torchrl_sglang_hidden.policy.outputs import HiddenStates as HiddenStates
    from torchrl_sglang_hidden.policy.outputs import Logits as Logits
    from torchrl_sglang_hidden.policy.outputs import RoutedExperts as RoutedExperts
    from torchrl_sglang_hidden.policy.outputs import Sampling as Sampling
    from torchrl_sglang_hidden.policy.outputs import TokenHiddenStates as TokenHiddenStates
    from torchrl_sglang_hidden.policy.ragged import ragged as ragged
    from torchrl_sglang_hidden.policy.weight_sync import SGLangHiddenWeightSyncScheme as SGLangHiddenWeightSyncScheme
    from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper as SGLangHiddenWrapper
    from torchrl_sglang_hidden.records import Completion as Completion
    from torchrl_sglang_hidden.records import EngineInfo as EngineInfo
    from torchrl_sglang_hidden.records import Pooled as Pooled
    from torchrl_sglang_hidden.records import Request as Request
    from torchrl_sglang_hidden.records import SamplingMask as SamplingMask
    from torchrl_sglang_hidden.records import SamplingRecords as SamplingRecords
    from torchrl_sglang_hidden.records import Scores as Scores
    from torchrl_sglang_hidden.records import TokenLogits as TokenLogits
    from torchrl_sglang_hidden.records import TokenRows as TokenRows
    from torchrl_sglang_hidden.rl.record import record_hidden_states as record_hidden_states
    from torchrl_sglang_hidden.rl.recording import Recording as Recording
    from torchrl_sglang_hidden.rl.recording import load_recording as load_recording
    from torchrl_sglang_hidden.rl.transform import HiddenStateTransform as HiddenStateTransform
    from torchrl_sglang_hidden.spec.constraints.base import ConstraintStep as ConstraintStep
    from torchrl_sglang_hidden.spec.constraints.base import LogitConstraint as LogitConstraint
    from torchrl_sglang_hidden.spec.constraints.base import known_constraints as known_constraints
    from torchrl_sglang_hidden.spec.constraints.masks import ActionMask as ActionMask
    from torchrl_sglang_hidden.spec.constraints.masks import DisallowedTokens as DisallowedTokens
    from torchrl_sglang_hidden.spec.constraints.masks import TokenConstraint as TokenConstraint
    from torchrl_sglang_hidden.spec.constraints.temperature import ExponentialSchedule as ExponentialSchedule
    from torchrl_sglang_hidden.spec.constraints.temperature import LinearSchedule as LinearSchedule
    from torchrl_sglang_hidden.spec.constraints.temperature import TemperatureScale as TemperatureScale
    from torchrl_sglang_hidden.spec.head_scores import HeadSpec as HeadSpec
    from torchrl_sglang_hidden.spec.heads import Head as Head
    from torchrl_sglang_hidden.spec.hidden import HiddenSpec as HiddenSpec
    from torchrl_sglang_hidden.spec.logits import LogitsSpec as LogitsSpec
    from torchrl_sglang_hidden.spec.places import At as At
    from torchrl_sglang_hidden.spec.places import Each as Each
    from torchrl_sglang_hidden.spec.places import Every as Every
    from torchrl_sglang_hidden.spec.places import Window as Window
    from torchrl_sglang_hidden.spec.spans import Between as Between
    from torchrl_sglang_hidden.spec.spans import Image as Image
    from torchrl_sglang_hidden.spec.spans import LastTokens as LastTokens
    from torchrl_sglang_hidden.spec.spans import Role as Role
    from torchrl_sglang_hidden.spec.spans import TokenMask as TokenMask
    from torchrl_sglang_hidden.spec.spans import Turn as Turn

_MODULES = {
    **dict.fromkeys(("AsyncStream", "Stream", "StreamChunk"), "engines.streams"),
    "CandidateActor": "policy.candidates",
    "Engine": "engines.base",
    **dict.fromkeys(
        (
            "Completion",
            "EngineInfo",
            "Pooled",
            "Request",
            "SamplingMask",
            "SamplingRecords",
            "Scores",
            "TokenLogits",
            "TokenRows",
        ),
        "records",
    ),
    "Session": "engines.sessions",
    **dict.fromkeys(("At", "Each", "Every", "Window"), "spec.places"),
    **dict.fromkeys(("Between", "Image", "LastTokens", "Role", "TokenMask", "Turn"), "spec.spans"),
    **dict.fromkeys(("ConstraintStep", "LogitConstraint", "known_constraints"), "spec.constraints.base"),
    **dict.fromkeys(("ActionMask", "DisallowedTokens", "TokenConstraint"), "spec.constraints.masks"),
    **dict.fromkeys(("ExponentialSchedule", "LinearSchedule", "TemperatureScale"), "spec.constraints.temperature"),
    "Head": "spec.heads",
    "HeadSpec": "spec.head_scores",
    "HiddenSpec": "spec.hidden",
    "HiddenStateTransform": "rl.transform",
    "LogitsSpec": "spec.logits",
    **dict.fromkeys(
        ("HeadScores", "HiddenStates", "Logits", "RoutedExperts", "Sampling", "TokenHiddenStates"), "policy.outputs"
    ),
    "SGLangHiddenWeightSyncScheme": "policy.weight_sync",
    "SGLangHiddenWrapper": "policy.wrapper",
    "SGLangOffline": "engines.offline",
    "SGLangServer": "engines.http",
    "connect": "engines.http",
    "demo_model": "demo.model",
    "demo_vision_model": "demo.vision_model",
    "launch": "engines.launch",
    "Restart": "engines.restarting",
    "logits_from_hidden": "policy.logits_from_hidden",
    "PolicyConfig": "policy.config",
    **dict.fromkeys(("Recording", "load_recording"), "rl.recording"),
    "ragged": "policy.ragged",
    "record_hidden_states": "rl.record",
    **dict.fromkeys(
        (
            "AlignmentError", "AuthenticationError", "BatchCancelledError", "CapabilityError", "ChatTemplateError",
            "ConstraintError", "DemoModelError", "EngineError", "EngineTimeoutError", "EngineUnreachableError",
            "ImageError", "IncompleteWeightsError", "InputError", "InputTypeError", "LaunchError", "MissingKeyError",
            "PromptLengthError", "ProtocolError", "RecordingError", "RequestAbortedError", "RequestRejectedError",
            "RestartError", "SGLangHiddenError", "ServerRestartingError", "SpanError", "TokenIdError",
            "UnknownOptionError", "WeightsError",
        ),
        "errors",
    ),
}  # fmt: skip

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
