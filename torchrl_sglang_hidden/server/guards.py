"""Lists the hooks that protect SGLang's server from what any client sends it, in the order that a request meets them.

`request_guard` refuses in the tokenizer manager; `request_isolation`, `stop_patterns` and `control_guard` in the
scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl_sglang_hidden.server.control_guard import AFTER_CONTROL, AROUND_CONTROL
from torchrl_sglang_hidden.server.request_guard import AFTER_GUARD, AROUND_GUARD, BEFORE_GUARD
from torchrl_sglang_hidden.server.request_isolation import AROUND_ISOLATION
from torchrl_sglang_hidden.server.stop_patterns import AROUND_STOPS

__all__ = ["AFTER_GUARDS", "AROUND_GUARDS", "BEFORE_GUARDS"]

BEFORE_GUARDS: dict[str, Callable[..., Any]] = BEFORE_GUARD
AFTER_GUARDS: dict[str, Callable[..., Any]] = {**AFTER_GUARD, **AFTER_CONTROL}
AROUND_GUARDS: dict[str, Callable[..., Any]] = {**AROUND_GUARD, **AROUND_ISOLATION, **AROUND_STOPS, **AROUND_CONTROL}
