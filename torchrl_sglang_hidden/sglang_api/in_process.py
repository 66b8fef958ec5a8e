"""Translates what SGLang's own objects raise in this process, as `engines.offline` and the vector service call them.

Knows nothing of what is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchrl_sglang_hidden.errors import RequestAbortedError, RequestRejectedError

__all__ = ["translated"]


@contextmanager
def translated() -> Iterator[None]:
    """Turn SGLang's exceptions into this package's.

    Raises:
        RequestRejectedError: SGLang refused the requests.
        RequestAbortedError: it gave up on them.
    """
    from starlette.exceptions import HTTPException  # what SGLang raises for an abort, in-process too

    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestRejectedError(f"the engine refused the batch: {error}; change the requests") from error
    except HTTPException as error:
        raise RequestAbortedError(
            f"the engine aborted the batch: {error.detail}; generate again, or read SGLang's output"
        ) from error
