"""The server half: hooks SGLang 0.5.23 loads through its entry point ``sglang.srt.plugins``.

Opt-in: without ``TORCHRL_SGLANG_HIDDEN=1`` in the server's environment `register` does nothing. With it, requests that
ask for nothing are served as before.

SGLang logs and swallows a hook that cannot be put in place, so the status that clients read at connect says whether all
of them are.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import PurePath
from typing import Any, cast

from torchrl_sglang_hidden.protocol import CHANNEL, CONSTRAINTS_ENV, LAYERS_ENV, PLUGIN_ENV, Status
from torchrl_sglang_hidden.protocol.served_weights import PUSHED_PREFIX, served_weights
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.cpu import has_accelerator, ignore_pinning
from torchrl_sglang_hidden.spec.constraints import known_constraints
from torchrl_sglang_hidden.spec.hidden import canonical_layer

logger = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.23"

_capture = Capture()
_PLAN = "_torchrl_sglang_hidden_plan"
_STEP_LOGITS = "_torchrl_sglang_hidden_logits"
_STATES = "_torchrl_sglang_hidden_states"


def before_lora(*args: Any, **kwargs: Any) -> None:
    """SGLang's LoRA pins memory, which torch refuses where there is no accelerator to pin it for."""
    if not has_accelerator():
        ignore_pinning()


def after_load_model(result: None, model_runner: Any) -> None:
    """Puts the hooks on the layers that the server was started for."""
    if model_runner.is_draft_worker:
        return
    asked, num_layers = os.environ.get(LAYERS_ENV, "-1"), model_runner.model_config.num_hidden_layers
    if getattr(model_runner.server_args, "enable_two_batch_overlap", False):
        _capture.taps.problem = "--enable-two-batch-overlap runs the layers in parts"
        return
    try:
        layers = {canonical_layer(int(layer), num_layers) for layer in asked.split(",")}
    except ValueError as error:  # an InputError too
        _capture.taps.problem = f"{LAYERS_ENV}={asked}: {error}"
        return
    args = model_runner.server_args
    max_rows = max(args.chunked_prefill_size or 0, args.max_prefill_tokens or 0, args.max_running_requests or 0)
    _capture.taps.attach(model_runner.model, sorted(layers - {-1}), num_layers, max_rows)


def after_forward_batch(forward_batch: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Plans the step while the batch's lengths are those of this step; overlap scheduling moves them on later."""
    if not model_runner.is_draft_worker:
        plan = _capture.plan_step(batch)
        setattr(forward_batch, _PLAN, plan)
        setattr(forward_batch, _STEP_LOGITS, _capture.plan_logits(batch, model_runner.model_config.vocab_size))
        _capture.taps.open(() if plan is None else plan.layers)


def around_forward(original: Any, model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the layers' states before another step can run, and says which step runs."""
    if model_runner.is_draft_worker:
        return original(model_runner, forward_batch, *args, **kwargs)
    # SGLang gives the model a copy of its batch, without what was noted on this one.
    _capture.running = getattr(forward_batch, _STEP_LOGITS, None)
    try:
        output = original(model_runner, forward_batch, *args, **kwargs)
    finally:
        _capture.running = None
    if _capture.taps.layers:
        setattr(forward_batch, _STATES, _capture.taps.take())
    return output


def around_logits(
    original: Any,
    processor: Any,
    input_ids: Any,
    hidden_states: Any,
    lm_head: Any,
    logits_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Takes logits of prompts, which SGLang computes for the last position only."""
    step_logits = _capture.running
    if step_logits is not None and step_logits.prompts and hasattr(lm_head, "set_lora"):
        # SGLang applies adapters by the places that a whole step's rows have.
        for part in step_logits.prompts:
            part.logits.refused = "the server's LoRA adapters act on the head, which then gives no logits of prompts"
    # Where attention is data-parallel the head is a collective of ranks that do not all have these rows.
    elif step_logits is not None and step_logits.prompts and not processor.do_tensor_parallel_all_gather_dp_attn:
        from sglang.srt.layers.logits_processor import LogitsMetadata

        metadata = LogitsMetadata.from_forward_batch(logits_metadata)

        def head(rows: Any) -> Any:
            return processor._get_logits(rows, lm_head, metadata, use_logits_buffer=False)

        step_logits.take_prompts(hidden_states, head)
    return original(processor, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs)


def after_preprocess(result: Any, sampler: Any, logits: Any, sampling_info: Any) -> None:
    """Constrains the logits behind everything that SGLang does to them before the temperature."""
    step_logits = getattr(sampling_info, _STEP_LOGITS, None)
    if step_logits is not None:
        # A batch of greedy requests alone is not divided by anything.
        step_logits.constrain(result, None if sampling_info.is_all_greedy else sampling_info.temperatures)


def around_sample(original: Any, runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """Takes the planned rows once the step has run, and the logits before and after what SGLang does to them."""
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    if runner.is_draft_worker:
        return original(runner, logits_output, forward_batch)
    step_logits = getattr(forward_batch, _STEP_LOGITS, None)
    if step_logits is not None:
        step_logits.input_ids = forward_batch.input_ids
        step_logits.take_raw(logits_output.next_token_logits)
    # Set at every step: without overlap scheduling SGLang keeps this object from step to step.
    setattr(forward_batch.sampling_info, _STEP_LOGITS, step_logits)
    token_ids = original(runner, logits_output, forward_batch)
    if step_logits is not None:
        outputs = append_auxiliary_output(logits_output.auxiliary_device_output, step_logits.taken())
        logits_output.auxiliary_device_output = outputs
    _take_rows(logits_output, forward_batch)
    return token_ids


def _take_rows(logits_output: Any, forward_batch: Any) -> None:
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    plan = getattr(forward_batch, _PLAN, None)
    states = {**getattr(forward_batch, _STATES, {}), -1: logits_output.hidden_states}
    _capture.taps.check(states, logits_output.hidden_states)
    # With token indices the rows are a choice of positions, not all of them in order.
    if plan is not None and logits_output.hidden_states_token_indices is None:
        rows = plan.gather(states)
        logits_output.auxiliary_device_output = append_auxiliary_output(logits_output.auxiliary_device_output, rows)


def around_match_prefix(original: Any, req: Any, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
    """Lets a request hit the prefix cache as far as its pools can do without the rows that are then not computed."""
    one = None if tree_cache is None else _capture.open_again(req)
    # A streaming session's prefix is not the cache's to shorten: SGLang ends where that is tried. The count then tells.
    streaming = getattr(req.session, "streaming", False)
    if one is None or not one.reads_prompt or streaming:
        original(req, tree_cache, cow_mamba)
        return
    one.restart()
    _capture.page_size = tree_cache.page_size
    # A recurrent state takes a slot at each match, and images move their positions: such requests match nothing, once.
    once = tree_cache.supports_mamba() or req.multimodal_inputs is not None
    one.limit = _capture.prefix_limit(one, 0 if once else len(req.origin_input_ids) + len(req.output_ids))
    original(req, tree_cache, cow_mamba)
    found = req.prefix_len + req.host_hit_length
    # The cache may have forgotten a part of what was asked for, and then ends where no sum is kept.
    while (limit := _capture.prefix_limit(one, found)) < found:
        one.limit = limit
        original(req, tree_cache, cow_mamba)
        before, found = found, req.prefix_len + req.host_hit_length
        if found >= before:
            break  # a cache that heeds no limit: the count will tell
    one.limit = None


def after_max_prefix_len(length: int, req: Any, input_len: int) -> int | None:
    """Sets the limit of `around_match_prefix`."""
    one = _capture.opened.get(req)
    return None if one is None or one.limit is None else min(length, one.limit)


def after_flush_cache(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Forgets the sums together with the prefix cache."""
    if flushed:
        _capture.forget_sums()


def after_weight_version(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Forgets the sums of other weights, also where somebody updates them and keeps the prefix cache."""
    _capture.forget_sums()


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
    taps = _capture.taps
    because = _refusal(scheduler)
    _capture.shared.tidy()
    layers: tuple[int, ...] | None = (-1,)
    if because:
        layers = ()
    elif not taps.checked:
        layers = None
    elif not taps.problem:
        layers = (*taps.layers, -1)
    output.internal_state[CHANNEL] = Status(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        context_length=config.context_len,
        layers=layers,
        because=because or taps.problem,
        normed=_capture.normed,
        shared=_capture.shared.sign,
        open_pools=len(_capture.opened),
        prefix_bytes=_capture.sums.bytes,
        constraints=known_constraints(),
    ).pack()


def after_states_to_store(
    result: Any, processor: Any, hidden_states: Any, hidden_states_before_norm: Any, *args: Any
) -> None:
    """Notes a model whose captured states are those before the final norm, against this package's layer -1."""
    if hidden_states_before_norm is not None:
        _capture.normed = False


def _in_place() -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return all(target in HookRegistry._patched for target in (*_BEFORE, *_AFTER, *_AROUND))


def _refusal(scheduler: Any) -> str:
    """Why this server cannot capture one row per position and bring it to the host; empty where it can."""
    args = scheduler.server_args
    reasons = {
        "a hook of the server half is not in place, see the server's log": not _in_place(),
        "the server was started without --enable-return-hidden-states": not args.enable_return_hidden_states,
        "SGLang's Rust server and its pipeline stages (pp_size > 1) do not carry states": not _capture.on,
        "SGLang gives this model's states from before the final norm": not _capture.normed,
        "speculative decoding computes rows of tokens that are then rejected": not scheduler.spec_algorithm.is_none(),
        "prefill and decode are disaggregated": scheduler.disaggregation_mode.value != "null",
        "--enable-pdmux splits the forward pass": scheduler.enable_pdmux,
        "a diffusion language model has no state that produced a token": args.dllm_algorithm is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


_BEFORE: dict[str, Callable[..., Any]] = {"sglang.srt.lora.lora_manager.LoRAManager.__init__": before_lora}
_AFTER: dict[str, Callable[..., Any]] = {
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model": after_load_model,
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": after_forward_batch,
    "sglang.srt.layers.sampler.Sampler._preprocess_logits": after_preprocess,
    "sglang.srt.layers.logits_processor.LogitsProcessor._get_hidden_states_to_store": after_states_to_store,
    "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len": after_max_prefix_len,
    "sglang.srt.managers.scheduler.Scheduler.flush_cache": after_flush_cache,
    "sglang.srt.managers.scheduler.Scheduler.record_weight_version_change": after_weight_version,
    "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class": after_streamer_class,
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": after_internal_state,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info": after_update_meta_info,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._update_model_path_info": after_model_path,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.get_weights_by_name": after_get_weights,
}
_AROUND: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.schedule_batch.Req.init_next_round_input": around_match_prefix,
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": around_forward,
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward": around_logits,
    "sglang.srt.model_executor.model_runner.ModelRunner.sample": around_sample,
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
    for module in filter(None, os.environ.get(CONSTRAINTS_ENV, "").split(",")):
        try:
            importlib.import_module(module)
        except Exception:
            # It is anybody's code. The rest still works, and clients are told which constraints there are.
            logger.exception("torchrl_sglang_hidden: the constraints of %s cannot be imported", module)
    for kind, hooks in ((HookType.BEFORE, _BEFORE), (HookType.AFTER, _AFTER), (HookType.AROUND, _AROUND)):
        for target, hook in hooks.items():
            HookRegistry.register(target, hook, kind)
