"""Hooks the server half into SGLang, which loads it through the entry point ``sglang.srt.plugins``.

Opt-in: without ``TORCHRL_SGLANG_HIDDEN=1`` in the server's environment `register` does nothing. With it, requests that
ask for nothing are served as before.

SGLang logs and swallows a hook that cannot be put in place. So the status that clients read at connect says whether
every hook is in place.

`_BEFORE`, `_AFTER` and `_AROUND` at the end list every hooked function, and the docstring of each hook says why it is
there. Calls into `Capture`, `StepLogits` and `LayerTaps`, and decides nothing about pooling or logits itself. Knows
nothing of TorchRL or of the client.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from torchrl_sglang_hidden.protocol import CHANNEL, CONSTRAINTS_ENV, PLUGIN_ENV, Status
from torchrl_sglang_hidden.server.capture import Capture
from torchrl_sglang_hidden.server.guards import AFTER_GUARDS, AROUND_GUARDS, BEFORE_GUARDS
from torchrl_sglang_hidden.server.head_steps import AFTER_SCORES
from torchrl_sglang_hidden.server.heads import make_head_hooks
from torchrl_sglang_hidden.server.images import AROUND_IMAGES, forget_embeddings, image_token_of
from torchrl_sglang_hidden.server.kept_weights import after_scheduler_start, after_version
from torchrl_sglang_hidden.server.layer_setup import attach_taps
from torchrl_sglang_hidden.server.next_tokens import plan_logits
from torchrl_sglang_hidden.server.output_stream import MessageGate, make_streamer_class
from torchrl_sglang_hidden.server.prompt_head import take_prompt_logits
from torchrl_sglang_hidden.server.rank_agreement import AFTER_UPDATES
from torchrl_sglang_hidden.server.request_isolation import REQUESTS, IsolatedOutput, isolated, take_in
from torchrl_sglang_hidden.server.settings import read_settings
from torchrl_sglang_hidden.server.start import BEFORE_START
from torchrl_sglang_hidden.server.trainer_group import AROUND_GROUP
from torchrl_sglang_hidden.server.weight_routes import AFTER_WEIGHT_ROUTES
from torchrl_sglang_hidden.spec.constraints import known_constraints

logger = logging.getLogger(__name__)

# Written for the first. `tools/check_sglang.py` says how another version differs.
SGLANG_VERSIONS = ("0.5.23", "0.5.22")

_capture = Capture()
_gate = MessageGate(_capture)
# Slots for means and sums of the last layer that are made before SGLang sizes its KV cache: of 256 requests, and of as
# many that have just finished. Those of more requests, other layers or other kinds are made when they are asked for.
RESERVED_SLOTS = 512
_PLAN = "_torchrl_sglang_hidden_plan"
_STEP_LOGITS = "_torchrl_sglang_hidden_logits"
_STATES = "_torchrl_sglang_hidden_states"


def around_generate(original: Any, scheduler: Any, recv_req: Any, **kwargs: Any) -> None:
    """Read what a request asks of the server half, and abort one that cannot be taken in."""
    take_in(original, scheduler, recv_req, _capture, **kwargs)


def after_load_model(result: None, model_runner: Any) -> None:
    """Put hooks on the layers, and set memory apart before SGLang sizes its KV cache: what graphs record, and slots."""
    if not model_runner.is_draft_worker:
        settings = read_settings()
        attach_taps(_capture.taps, model_runner, settings)
        _capture.ranks = settings.tensor_ranks
        rows = max(2 * settings.decode_graph_rows, RESERVED_SLOTS)
        _capture.reserve(model_runner.model_config.hidden_size, torch.device(model_runner.device), rows)


def around_capture(original: Any, runner: Any, size: int, *args: Any, **kwargs: Any) -> Any:
    """Have a decode graph record layers. A graph of another kind records none."""
    if runner.model_runner.is_draft_worker:
        return original(runner, size, *args, **kwargs)
    _capture.taps.start_recording(size * runner.captured_req_width)
    try:
        return original(runner, size, *args, **kwargs)
    finally:
        _capture.taps.stop_recording()


def around_replay(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Note that a decode graph is replayed: the layers' states are where it wrote them."""
    if not runner.model_runner.is_draft_worker:
        _capture.taps.note_replay()
    return original(runner, *args, **kwargs)


def around_can_prefill(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a prefill without a graph where the step takes layers, or is to check them: its graph records none."""
    if _capture.taps.taking and not runner.model_runner.is_draft_worker:
        return False
    return original(runner, *args, **kwargs)


def after_forward_batch(forward_batch: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Plan the step now: overlap scheduling later changes the batch's lengths to the next step's."""
    if model_runner.is_draft_worker:
        return
    plan = step_logits = None
    # A request is tracked from its prefill on: where none is, a decode step has nothing to plan.
    if _capture.opened or batch.forward_mode.name != "DECODE":
        with isolated(_capture, batch.reqs):
            plan = _capture.plan_step(batch)
            step_logits = plan_logits(batch, _capture.logits, model_runner.model_config.vocab_size)
            if step_logits is not None:
                step_logits.collective = _capture.ranks > 1
    setattr(forward_batch, REQUESTS, tuple(batch.reqs))
    setattr(forward_batch, _PLAN, plan)
    setattr(forward_batch, _STEP_LOGITS, step_logits)
    # With tensor parallelism a layer is read by all ranks together, or by none: their plans must name the same ones.
    _capture.taps.open(() if plan is None else plan.layers)


def around_forward(original: Any, model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the layers' states before another step can overwrite them, and note which step runs."""
    if model_runner.is_draft_worker:
        return original(model_runner, forward_batch, *args, **kwargs)
    # SGLang gives the model a copy of the batch, without the attributes that were set on the batch itself.
    _capture.running = getattr(forward_batch, _STEP_LOGITS, None)
    try:
        output = original(model_runner, forward_batch, *args, **kwargs)
    finally:
        _capture.running = None
    if _capture.taps.taking:
        plan = getattr(forward_batch, _PLAN, None)
        with isolated(_capture, getattr(forward_batch, REQUESTS, ())):
            setattr(forward_batch, _STATES, _capture.taps.take(None if plan is None else plan.num_rows))
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
    """Take logits of prompt tokens: SGLang itself computes the last position's only."""
    if _capture.running is not None and _capture.running.prompts:
        with isolated(_capture, _capture.running.reqs):
            take_prompt_logits(_capture.running, processor, hidden_states, lm_head, logits_metadata)
    return original(processor, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs)


def after_preprocess(result: Any, sampler: Any, logits: Any, sampling_info: Any) -> None:
    """Constrain the logits after all that SGLang does to them but before the temperature."""
    step_logits = getattr(sampling_info, _STEP_LOGITS, None)
    if step_logits is not None:
        with isolated(_capture, step_logits.reqs):
            # SGLang divides no logits by a temperature when every request of the batch is greedy.
            step_logits.constrain(result, None if sampling_info.is_all_greedy else sampling_info.temperatures)


def around_sample(original: Any, runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """Take the step's planned states, and its logits before and after SGLang changes them for sampling."""
    if runner.is_draft_worker:
        return original(runner, logits_output, forward_batch)
    step_logits, requests = getattr(forward_batch, _STEP_LOGITS, None), getattr(forward_batch, REQUESTS, ())
    if step_logits is not None:
        with isolated(_capture, requests):
            step_logits.input_ids = forward_batch.input_ids
            step_logits.take_raw(logits_output.next_token_logits)
    # Set at every step: without overlap scheduling SGLang keeps this object from step to step.
    setattr(forward_batch.sampling_info, _STEP_LOGITS, step_logits)
    setattr(forward_batch.sampling_info, REQUESTS, requests)
    token_ids = original(runner, logits_output, forward_batch)
    if step_logits is not None:
        _append(logits_output, requests, step_logits.taken)
    taken: dict[int, torch.Tensor] = getattr(forward_batch, _STATES, None) or {}
    if not _capture.taps.checked:
        _capture.taps.check(taken, logits_output.hidden_states)
    plan = getattr(forward_batch, _PLAN, None)
    # With token indices SGLang selected some positions: the rows are not one for each position in order.
    if plan is not None and logits_output.hidden_states_token_indices is None:
        # What a graph wrote is read again in the next step: nothing is put into it.
        _append(logits_output, requests, lambda: plan.gather({**taken, -1: logits_output.hidden_states}))
    return token_ids


def _append(logits_output: Any, requests: Sequence[Any], take: Callable[[], Any]) -> None:
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    with isolated(_capture, requests):
        output = take()
        if output is not None:
            outputs = logits_output.auxiliary_device_output
            isolated_output = IsolatedOutput(_capture, requests, output)
            logits_output.auxiliary_device_output = append_auxiliary_output(outputs, isolated_output)


def around_match_prefix(original: Any, req: Any, tree_cache: Any = None, cow_mamba: bool | None = None) -> None:
    """Limit a request's prefix-cache hit: a cached position is not computed, and brings no row to pool or to take.

    For example a request that pools its prompt may hit the cache up to a position where a prefix sum is kept. One with
    images too: the ids that SGLang keeps at their rows differ from image to image.
    """
    tracked = None
    if tree_cache is not None:
        with isolated(_capture, [req]):
            tracked = _capture.open_again(req)
    # Never shorten a streaming session's prefix: SGLang ends when that is tried. The client's count finds missing rows.
    streaming = getattr(req.session, "streaming", False)
    if tracked is None or not tracked.reads_prompt or streaming:
        original(req, tree_cache, cow_mamba)
        return
    tracked.restart()
    _capture.page_size = tree_cache.page_size
    # Each match of a recurrent state takes a slot. Such a request is matched once, with the limit 0.
    once = tree_cache.supports_mamba()
    images = req.multimodal_inputs
    positions = None if images is None else images.mrope_positions
    tracked.limit = _capture.prefix_limit(tracked, 0 if once else len(req.origin_input_ids) + len(req.output_ids))
    original(req, tree_cache, cow_mamba)
    found = req.prefix_len + req.host_hit_length
    # The cache may hold less than the limit allows, so that the hit ends where no prefix sum is kept. Lower the limit.
    while (limit := _capture.prefix_limit(tracked, found)) < found:
        tracked.limit = limit
        if images is not None:
            # SGLang appends positions for the response of a retracted request at each match.
            images.mrope_positions = positions
        original(req, tree_cache, cow_mamba)
        before, found = found, req.prefix_len + req.host_hit_length
        if found >= before:
            break  # a cache that ignores the limit: the client's count finds the missing rows
    tracked.limit = None


def after_max_prefix_len(length: int, req: Any, input_len: int) -> int | None:
    """Apply the limit that `around_match_prefix` set."""
    tracked = _capture.opened.get(req) if _capture.opened else None
    return None if tracked is None or tracked.limit is None else min(length, tracked.limit)


def after_flush_cache(flushed: bool, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Drop the prefix sums and the images' embeddings together with the prefix cache."""
    if flushed:
        _capture.forget_sums()
        forget_embeddings()


def after_weight_version(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Drop the prefix sums and embeddings of the old weights, even where an update keeps the prefix cache."""
    _capture.forget_sums()
    forget_embeddings()
    after_version(*args, **kwargs)


def after_streamer_class(streamer_class: Any, scheduler: Any) -> type:
    """Give the scheduler an output streamer that sends the server half's answers."""
    if scheduler.rust_server is not None or scheduler.server_args.pp_size > 1:
        # SGLang's Rust server does not start with additional fields. Pipeline stages end at an auxiliary output, which
        # nothing carries from one stage to the next.
        _capture.on = False
        return cast("type", streamer_class)

    return make_streamer_class(streamer_class, _capture, _gate)


def around_send(original: Any, sender: Any, output: Any, recv_obj: Any = None) -> None:
    """Send an output, or hold it back until its answers are made in another thread, which then sends it."""
    _gate.send(lambda message: original(sender, message, recv_obj), output)


def after_update_meta_info(result: None, manager: Any, meta_info: dict[str, Any], *args: Any) -> None:
    """Remove the empty answer of a request that asked nothing but finished in one batch with a request that did."""
    if meta_info.get(CHANNEL) == []:
        del meta_info[CHANNEL]


def after_internal_state(output: Any, scheduler: Any, recv_req: Any) -> None:
    """Add the server half's status to SGLang's internal state."""
    config = scheduler.model_config
    taps = _capture.taps
    because = _refusal(scheduler)
    _capture.shared.tidy()
    output.internal_state[CHANNEL] = Status(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        context_length=config.context_len,
        layers=() if because else taps.offered,
        because=because or taps.problem or taps.limit,
        normed=_capture.normed,
        shared=_capture.shared.sign,
        open_pools=len(_capture.opened),
        prefix_bytes=_capture.sums.bytes,
        constraints=known_constraints(),
        raw_log_probs=read_settings().raw_log_probs,
        image_token_id=image_token_of(config),
    ).pack()


def after_states_to_store(
    result: Any, processor: Any, hidden_states: Any, hidden_states_before_norm: Any, *args: Any
) -> None:
    """Note that SGLang captures this model's states before the final norm: layer -1 means the states after it."""
    if hidden_states_before_norm is not None:
        _capture.normed = False


def _in_place() -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return all(target in HookRegistry._patched for target in (*_BEFORE, *_AFTER, *_AROUND))


def _refusal(scheduler: Any) -> str:
    """Return why this server cannot capture one row per position and bring it to the host; empty where it can."""
    settings = read_settings()
    reasons = {
        "a hook of the server half is not in place, see the server's log": not _in_place(),
        "the server was started without --enable-return-hidden-states": not settings.full_states,
        "--enable-return-aux-hidden-states packs other layers' states; start the server without it":
            settings.packed_states,
        "SGLang's Rust server and its pipeline stages (pp_size > 1) do not carry states": not _capture.on,
        "SGLang gives this model's states from before the final norm": not _capture.normed,
        "speculative decoding computes rows of tokens that are then rejected": not scheduler.spec_algorithm.is_none(),
        "prefill and decode are disaggregated": scheduler.disaggregation_mode.value != "null",
        "--enable-pdmux splits the forward pass": scheduler.enable_pdmux,
        "a diffusion language model has no state that produced a token": settings.diffuses,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


_RUNNERS = "sglang.srt.model_executor.runner"
_BEFORE: dict[str, Callable[..., Any]] = {**BEFORE_START, **BEFORE_GUARDS}
_AFTER: dict[str, Callable[..., Any]] = {
    **AFTER_GUARDS,
    **AFTER_UPDATES,
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model": after_load_model,
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": after_forward_batch,
    "sglang.srt.layers.sampler.Sampler._preprocess_logits": after_preprocess,
    "sglang.srt.layers.logits_processor.LogitsProcessor._get_hidden_states_to_store": after_states_to_store,
    "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len": after_max_prefix_len,
    "sglang.srt.managers.scheduler.Scheduler.__init__": after_scheduler_start,
    "sglang.srt.managers.scheduler.Scheduler.flush_cache": after_flush_cache,
    "sglang.srt.managers.scheduler.Scheduler.record_weight_version_change": after_weight_version,
    "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class": after_streamer_class,
    "sglang.srt.managers.scheduler.Scheduler.get_internal_state": after_internal_state,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info": after_update_meta_info,
    **AFTER_WEIGHT_ROUTES,
    **AFTER_SCORES,
}
_AROUND: dict[str, Callable[..., Any]] = {
    **AROUND_IMAGES,
    **AROUND_GUARDS,
    **make_head_hooks(_capture.heads),
    "sglang.srt.managers.scheduler.Scheduler.handle_generate_request": around_generate,
    **AROUND_GROUP,
    "sglang.srt.managers.schedule_batch.Req.init_next_round_input": around_match_prefix,
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": around_forward,
    f"{_RUNNERS}.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape": around_capture,
    f"{_RUNNERS}.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute": around_replay,
    f"{_RUNNERS}.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph": around_can_prefill,
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward": around_logits,
    "sglang.srt.model_executor.model_runner.ModelRunner.sample": around_sample,
    "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output": around_send,
}


def is_served_version() -> bool:
    """Return whether the SGLang of this process is one that the server half is written for."""
    import sglang

    return sglang.__version__ in SGLANG_VERSIONS


def register() -> None:
    """Register the hooks; SGLang calls this in each of its processes."""
    if os.environ.get(PLUGIN_ENV) != "1":
        return
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not is_served_version():
        logger.warning(
            "torchrl_sglang_hidden: the server half is written for SGLang %s, and this is %s; it stays off",
            " and ".join(SGLANG_VERSIONS),
            sglang.__version__,
        )
        return
    for module in filter(None, os.environ.get(CONSTRAINTS_ENV, "").split(",")):
        try:
            importlib.import_module(module)
        except Exception:
            # A user's module may raise anything. The rest works, and the status tells clients which constraints exist.
            logger.exception("torchrl_sglang_hidden: the constraints of %s cannot be imported", module)
    for kind, hooks in ((HookType.BEFORE, _BEFORE), (HookType.AFTER, _AFTER), (HookType.AROUND, _AROUND)):
        for target, hook in hooks.items():
            HookRegistry.register(target, hook, kind)
