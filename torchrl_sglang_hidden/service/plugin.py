"""Hooks the vector service and the guard of access into SGLang's HTTP server.

SGLang loads it through the entry point ``sglang.srt.plugins``. Opt-in as the server half is, beside which it stands,
and without a part in what that does. Knows where SGLang's HTTP server is, and nothing of requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchrl_sglang_hidden.protocol import PLUGIN_ENV
from torchrl_sglang_hidden.server.__main__ import SECRET_ARGUMENTS
from torchrl_sglang_hidden.server.metrics import AFTER_METRICS, publish_here
from torchrl_sglang_hidden.server.plugin import is_served_version

__all__ = ["HOOKS", "after_manager", "after_resolved_dict", "answer_value_error", "register"]


def after_manager(result: None, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Add the route and the guard to SGLang's HTTP server, where this process is one.

    The tokenizer manager is made before the server answers. `sglang.Engine` makes one too, without a server.
    """
    if "sglang.srt.entrypoints.http_server" not in sys.modules:
        return
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    # Here and not above: SGLang's other processes load this module too, and need no route.
    from torchrl_sglang_hidden.service.access import AccessGuard
    from torchrl_sglang_hidden.service.route import PATH, VectorService
    from torchrl_sglang_hidden.service.route_checks import install_checks

    service = VectorService(
        manager,
        make_input=http_server.GenerateReqInput,
        model_info=http_server.model_info,
        server_info=http_server.server_info,
    )
    http_server.app.add_route(PATH, service.respond, methods=["POST"])
    http_server.app.add_exception_handler(ValueError, answer_value_error)
    install_checks(http_server, OpenAIServingChat)
    server_args = manager.server_args
    publish_here(server_args)
    # Added before SGLang's own, which therefore sees a request first: a key that one overlooks, the other asks for.
    http_server.app.add_middleware(
        AccessGuard,
        host=server_args.host,
        keys=(server_args.api_key, server_args.admin_api_key),
        guarded=(PATH,),
    )


async def answer_value_error(http: Request, error: Exception) -> Response:
    """Answer a request with a value that some route of SGLang's does not take, and does not catch either.

    SGLang's routes for prompts answer a ``ValueError`` so by themselves, and others with status 500 and no reason.
    """
    return JSONResponse({"error": {"message": str(error), "type": type(error).__name__, "code": 400}}, 400)


def after_resolved_dict(result: dict[str, Any], server_args: Any) -> dict[str, Any]:
    """Hide keys and passwords where SGLang shows its arguments: in the log, and in ``/server_info``."""
    return result | {name: "***" for name in SECRET_ARGUMENTS if result.get(name)}


# All of them run after what they hook.
HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__": after_manager,
    "sglang.srt.server_args.ServerArgs.resolved_dict": after_resolved_dict,
    **AFTER_METRICS,
}


def register() -> None:
    """Register the hook; SGLang calls this in each of its processes."""
    if os.environ.get(PLUGIN_ENV) != "1" or not is_served_version():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AFTER)
