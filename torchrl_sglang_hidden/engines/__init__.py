"""The ways to an SGLang: over HTTP, in this process, or launched; with batching, samples, streams and sessions.

`as_engine` makes an `Engine` of whatever a user has. Knows `Request`s and `Completion`s, nothing of TensorDicts or
policies.
"""

from __future__ import annotations

from typing import Any

from torchrl_sglang_hidden.engines.base import Engine
from torchrl_sglang_hidden.engines.batching import BatchingEngine, check_batching
from torchrl_sglang_hidden.engines.resuming import join_completions, rest_of
from torchrl_sglang_hidden.engines.row_errors import generate_rows, refused_rows
from torchrl_sglang_hidden.engines.samples import generate_ahead, generate_samples
from torchrl_sglang_hidden.errors import InputTypeError
from torchrl_sglang_hidden.weights.validation import check_options

__all__ = [
    "BatchingEngine",
    "Engine",
    "as_engine",
    "check_batching",
    "check_options",
    "generate_ahead",
    "generate_rows",
    "generate_samples",
    "join_completions",
    "refused_rows",
    "rest_of",
]


def as_engine(model: Any) -> Engine:
    """Return an engine for a model argument.

    Args:
        model: an `Engine`, returned as it is; a URL or a sequence of URLs; an ``sglang.Engine``; or torchrl's
            ``AsyncSGLang``, whose server is used directly.

    Raises:
        InputTypeError: ``model`` is none of these.
        EngineError: the engine could not be reached.
    """
    if isinstance(model, Engine):
        return model
    if isinstance(model, str) or (isinstance(model, (list, tuple)) and all(isinstance(url, str) for url in model)):
        from torchrl_sglang_hidden.engines.http import SGLangServer

        return SGLangServer(model)
    if hasattr(model, "async_generate") and hasattr(model, "tokenizer_manager"):
        from torchrl_sglang_hidden.engines.offline import SGLangOffline

        return SGLangOffline(model)
    if isinstance(getattr(model, "server_url", None), str):
        from torchrl_sglang_hidden.engines.http import SGLangServer

        return SGLangServer(model.server_url)
    raise InputTypeError(
        f"model={model!r:.80}: expected a URL, an SGLangServer, an SGLangOffline, an sglang.Engine or torchrl's "
        "AsyncSGLang"
    )
