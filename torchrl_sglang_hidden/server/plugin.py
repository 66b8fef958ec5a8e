"""The server half: hooks SGLang 0.5.23 loads through its entry point ``sglang.srt.plugins``.

Opt-in: without ``TORCHRL_SGLANG_HIDDEN=1`` in the server's environment `register` does nothing. With it, requests that
ask for nothing are served as before.

SGLang logs and swallows a hook that cannot be put in place, so the status that clients read at connect says whether all
of them are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Coroutine
from pathlib import PurePath
from typing import Any, cast

from torchrl_sglang_hidden.channel import CHANNEL, PLUGIN_ENV, pack_status
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.checkpoint import PUSHED_PREFIX, served_weights

logger = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.23"

_capture = Capture()
_PLAN = "_torchrl_sglang_hidden_plan"


def after_forward_batch(forward_batch: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Plans the step while the batch's lengths are those of this step; overlap scheduling moves them on later."""
    if not model_runner.is_draft_worker:
        setattr(forward_batch, _PLAN, _capture.plan_step(batch))


def after_sample(token_ids: Any, runner: Any, logits_output: Any, forward_batch: Any) -> None:
    """Takes the planned rows once the step has run."""
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    plan = getattr(forward_batch, _PLAN, None)
    # With token indices the rows are a choice of positions, not all of them in order.
    if plan is not None and logits_output.hidden_states_token_indices is None:
        rows = plan.gather(logits_output.hidden_states)
        logits_output.auxiliary_device_output = append_auxiliary_output(logits_output.auxiliary_device_output, rows)


def after_max_prefix_len(length: int, req: Any, input_len: int) -> int | None:
    """Keeps a request that pools its whole prompt from hitting the prefix cache, whose rows are not computed again."""
    return 0 if _capture.needs_uncached_prompt(req) else None


def after_streamer_class(streamer_class: Any, scheduler: Any) -> type:
    """Gives the scheduler an output streamer that hands out the answers."""
    if scheduler.rust_server is not None or scheduler.server_args.pp_size > 1:
        # SGLang's Rust server takes no additional fields, and nothing carries auxiliary outputs between pipeline
        # stages: the one does not start with them, the other ends where it meets one.
        _capture.on = False
        return cast("type", streamer_class)

    class PooledOutputStreamer(streamer_class):  # type: ignore[misc]
        has_additional_customized_info = True

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == CHANNEL or super().is_request_level_customized_info_key(key)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            info: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
            answers = [_capture.answer(req) for req in reqs]
            return {**info, CHANNEL: answers} if any(answers) else info

    return PooledOutputStreamer


def after_update_meta_info(result: None, manager: Any, meta_info: dict[str, Any], *args: Any) -> None:
    """Takes the empty answers off requests that did not ask and finished beside one that did."""
    if meta_info.get(CHANNEL) == []:
        del meta_info[CHANNEL]


def after_model_path(result: None, manager: Any, model_path: str, load_format: str) -> None:
    """Keeps the server's name for its model where the weights came from a directory that is deleted right after.

    Clients that connect later read the model's configuration, tokenizer and tensor names from there.
    """
    if PurePath(model_path).name.startswith(PUSHED_PREFIX):
        manager.model_path = manager.server_args.model_path
        manager.served_model_name = manager.server_args.served_model_name or manager.model_path


def after_get_weights(result: Coroutine[Any, Any, Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Answers, in the place of a weight, which weights a client may send; see `ServedWeights`."""
    if obj.name != CHANNEL:
        return None
    result.close()

    async def answer() -> dict[str, Any]:
        # What the server was started from: a directory that an update came from may be gone, and has the same shapes.
        return served_weights(manager.server_args.model_path).pack()

    return answer()


def after_internal_state(output: Any, scheduler: Any, recv_req: Any) -> None:
    """Adds the server half's status."""
    config = scheduler.model_config
    output.internal_state[CHANNEL] = pack_status(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        context_length=config.context_len,
        captures=_in_place() and _supported(scheduler),
        normed=_capture.normed,
        open_pools=len(_capture.pools),
    )


def after_states_to_store(
    result: Any, processor: Any, hidden_states: Any, hidden_states_before_norm: Any, *args: Any
) -> None:
    """Notes a model whose captured states are those before the final norm, against this package's layer -1."""
    if hidden_states_before_norm is not None:
        _capture.normed = False


def _in_place() -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return all(target in HookRegistry._patched for target in _HOOKS)


def _supported(scheduler: Any) -> bool:
    """Whether this server captures one row per position, and SGLang brings it to the host."""
    return (
        bool(scheduler.server_args.enable_return_hidden_states)
        and _capture.on
        and _capture.normed
        and scheduler.spec_algorithm.is_none()
        and scheduler.disaggregation_mode.value == "null"
        and not scheduler.enable_pdmux
    )


_HOOKS = {
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": after_forward_batch,
    "sglang.srt.model_executor.model_runner.ModelRunner.sample": after_sample,
    "sglang.srt.layers.logits_processor.LogitsProcessor._get_hidden_states_to_store": after_states_to_store,
    "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len": after_max_prefix_len,
    "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class": after_streamer_class,
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": after_internal_state,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info": after_update_meta_info,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._update_model_path_info": after_model_path,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.get_weights_by_name": after_get_weights,
}


def register() -> None:
    """Registers the hooks; SGLang calls this in each of its processes."""
    if os.environ.get(PLUGIN_ENV) != "1":
        return
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if sglang.__version__ != SGLANG_VERSION:
        logger.warning(
            "torchrl_sglang_hidden: the server half is written for SGLang %s and this is %s; it stays off",
            SGLANG_VERSION,
            sglang.__version__,
        )
        return
    for target, hook in _HOOKS.items():
        HookRegistry.register(target, hook, HookType.AFTER)
