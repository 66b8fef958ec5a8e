"""New weights before they reach an engine: what is taken, what is refused, in which order SGLang is called."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_engine import Handler, RecordingEngine, RecordingServer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from torchrl_sglang_hidden import (
    CapabilityError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    InputError,
    InputTypeError,
    SGLangHiddenWeightSyncScheme,
    SGLangServer,
    WeightsError,
)
from torchrl_sglang_hidden.protocol import CHANNEL
from torchrl_sglang_hidden.protocol.served_weights import (
    DRAIN,
    PUSHED_PREFIX,
    WAS_PAUSED,
    ServedWeights,
    served_weights,
)
from torchrl_sglang_hidden.server import start, weight_routes
from torchrl_sglang_hidden.weights import disk
from torchrl_sglang_hidden.weights.control import paused
from torchrl_sglang_hidden.weights.disk import checkpoint, load_from_disk
from torchrl_sglang_hidden.weights.validation import check_weights, new_version, next_version, open_weights

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 24, "head_dim": 4,
}  # fmt: skip


def tiny(*, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def saved(model: PreTrainedModel, directory: Path, **options: Any) -> ServedWeights:
    model.save_pretrained(directory, **options)
    return served_weights(str(directory))


# --- versions and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "after"),
    [
        ("default", "1"),
        ("1", "2"),
        ("9", "10"),
        ("step-9", "step-10"),
        ("v1.9", "v1.10"),
        ("best", "best-1"),
        # A mixture of weights has a name of its own; those that come after it are whole.
        ("7-incomplete", "8"),
        ("best-incomplete", "best-1"),
    ],
)
def test_versions_count_on(current: str, after: str) -> None:
    assert next_version(current) == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version=3"),
        ({"version": " "}, "version=' '"),
        ({"version": "7-incomplete"}, "version='7-incomplete': .* leave it out"),
        ({"transport": "pigeon"}, "transport='pigeon': expected one of"),
        ({"bucket_bytes": 0}, "bucket_bytes=0: expected at least 1"),
        ({"bucket_bytes": 1e9}, "bucket_bytes=1000000000.0: expected a whole number"),
        ({"running": "abort"}, "running='abort': expected one of"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str, server: RecordingServer) -> None:
    with SGLangServer(server.url) as engine, pytest.raises(InputError, match=message):
        engine.update_weights({}, **options)
    assert not server.payloads


# --- what they are --------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, lambda model: dict(model.named_parameters())])
def test_a_model_is_its_own_checkpoint(wrap: Callable[[nn.Module], Any], tied: bool, tmp_path: Path) -> None:
    model = tiny(tied=tied)
    served = saved(model, tmp_path)
    found = check_weights(open_weights(wrap(model)), served)
    assert served.tied == tied
    assert found.keys() == served.tensors.keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


def test_a_model_whose_checkpoint_has_other_names(tmp_path: Path) -> None:
    """transformers 5 fuses the experts of a mixture when it loads them."""
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config)
    served = saved(model, tmp_path)
    assert set(model.state_dict()) - set(served.tensors)
    assert check_weights(open_weights(model), served).keys() == served.tensors.keys()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1KB"}])
def test_a_directory(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(tied=False)
    served = saved(model, tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not options
    found = check_weights(open_weights(str(tmp_path)), served)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"has no \*.safetensors; .*Pickled"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(WeightsError, match="is no safetensors file"):
        open_weights(tmp_path)


@pytest.mark.parametrize("weights", [3, None, ["a"], {"a": 1}, {"a": {"b": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_what_are_no_weights(weights: Any) -> None:
    with pytest.raises(InputTypeError, match=r"expected a checkpoint directory|is no tensor under a name"):
        open_weights(weights)


# --- whether they fit -----------------------------------------------------------------------------------------------

SERVED = ServedWeights({"a": ("BF16", (2, 3)), "embed_tokens.weight": ("F32", (4, 2))}, tied=True)
FITTING = {"a": torch.ones(2, 3), "embed_tokens.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": None}, r"1 \(a\) missing, 0 unknown, of 2"),
        ({"b": torch.zeros(1)}, r"0 missing, 1 \(b\) unknown"),
        ({f"b{i}": torch.zeros(1) for i in range(5)}, r"5 \(b0, b1, b2, …\) unknown"),
        ({"a": torch.zeros(3, 2)}, r"a has shape \(3, 2\), and \(2, 3\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.int8)}, "a is torch.int8 on cpu, and BF16"),
        ({"a": torch.zeros(2, 3, device="meta")}, "a is torch.float32 on meta"),
        *(
            ({"a": torch.full((2, 3), value, dtype=dtype)}, f"a has values from {value}")
            for value in (float("nan"), float("inf"), float("-inf"))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
        ({"lm_head.weight": torch.zeros(4, 2)}, "lm_head.weight differs from the embedding"),
        ({"lm_head.weight": torch.ones(3, 2)}, "lm_head.weight differs from the embedding"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    tensors = {name: value for name, value in {**FITTING, **changes}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        check_weights(tensors, SERVED)


@pytest.mark.parametrize("in_served", [True, False])
@pytest.mark.parametrize("in_given", [True, False])
def test_a_tied_head_may_be_named_or_not(in_served: bool, in_given: bool) -> None:
    head = {"lm_head.weight": ("F32", (4, 2))} if in_served else {}
    given = {**FITTING, "lm_head.weight": FITTING["embed_tokens.weight"]} if in_given else FITTING
    assert set(check_weights(given, ServedWeights({**SERVED.tensors, **head}, tied=True))) == set(FITTING)


def test_an_untied_head_must_be_there() -> None:
    served = ServedWeights({**SERVED.tensors, "lm_head.weight": ("F32", (4, 2))}, tied=False)
    with pytest.raises(WeightsError, match=r"1 \(lm_head.weight\) missing"):
        check_weights(FITTING, served)


def test_dtypes_and_the_constants_of_old_checkpoints_do_not_matter() -> None:
    served = ServedWeights({**SERVED.tensors, "layers.0.rotary_emb.inv_freq": ("F32", (2,))}, tied=True)
    given = {name: value.double() for name, value in FITTING.items()}
    # TensorDict.from_module takes buffers that no checkpoint has.
    given["rotary_emb.original_inv_freq"] = torch.ones(2)
    assert set(check_weights(given, served)) == set(FITTING)


def test_served_weights_travel_as_json() -> None:
    assert ServedWeights.unpack(json.loads(json.dumps(SERVED.pack()))) == SERVED


# --- how they get there ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_and_gone_afterwards() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "same": base,
        "view": base[1],
        "turned": base.T,
        "grad": nn.Parameter(base),
        "x": torch.ones(0),
    }
    with checkpoint(tensors) as path:
        found = load_file(path / "model.safetensors")
        assert path.name.startswith(PUSHED_PREFIX)
        assert path.stat().st_mode & 0o077 == 0, "others may not read the weights"
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert not path.exists()


@pytest.mark.parametrize(("bucket_bytes", "files"), [(1, 3), (9, 2), (100, 1)])
def test_a_large_checkpoint_is_written_in_buckets(bucket_bytes: int, files: int) -> None:
    base = torch.arange(2.0)
    tensors = {"a": base, "b": base, "c": torch.ones(2)}
    with checkpoint(tensors, bucket_bytes) as path:
        assert len(list(path.glob("*.safetensors"))) == files
        found = dict(open_weights(path))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_checkpoint_is_gone_after_an_error() -> None:
    with pytest.raises(KeyError), checkpoint(FITTING) as path:
        raise KeyError
    assert not path.exists()


def test_a_checkpoint_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(disk, "_free_bytes", lambda place: 1000 if place == tmp_path else 10)
    with checkpoint(FITTING) as path:
        assert path.parent == tmp_path
    monkeypatch.setattr(disk, "_free_bytes", lambda place: 10)
    with pytest.raises(EngineError, match=r"take 56 bytes, and 10 in .* are free; "), checkpoint(FITTING):
        pass


class Calls:
    """SGLang's control routes: records the calls, and answers as told, or with success."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.seen = answers, []

    def __call__(self, route: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.seen.append((route, payload))
        answer = self.answers.get(route, {"success": True, "message": ""})
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def routes(self) -> list[str]:
        return [route for route, _ in self.seen]


LOAD = "update_weights_from_disk"
PAUSE, CONTINUE = "pause_generation", "continue_generation"
UNFLUSHED = {"success": False, "message": "Weights were updated, but the cache was not flushed because requests are …"}


@pytest.mark.parametrize(("running", "routes"), [("finish", [LOAD]), ("continue", [PAUSE, LOAD, CONTINUE])])
def test_the_order_of_the_calls(running: Any, routes: list[str]) -> None:
    calls = Calls()
    load_from_disk(calls, Path("/w"), "7", running)
    assert calls.routes == routes
    payload = {"model_path": "/w", "weight_version": "7", "load_format": "safetensors"}
    assert (LOAD, payload) in calls.seen
    assert calls.seen[0] in [(LOAD, calls.seen[0][1]), (PAUSE, {"mode": "retract"})]


def test_generation_goes_on_whatever_happened() -> None:
    calls = Calls(update_weights_from_disk=EngineUnreachableError("away"))
    with pytest.raises(EngineUnreachableError):
        load_from_disk(calls, Path("/w"), "7", "continue")
    assert calls.routes == [PAUSE, LOAD, CONTINUE]
    refused = Calls(update_weights_from_disk={"success": False, "message": "no such file"})
    with pytest.raises(EngineError, match=r"SGLang refused to load /w.*no such file"):
        load_from_disk(refused, Path("/w"), "7", "continue")
    assert refused.routes[-1] == CONTINUE


def test_a_cache_that_was_not_flushed_is_flushed() -> None:
    calls = Calls(update_weights_from_disk=UNFLUSHED)
    load_from_disk(calls, Path("/w"), "7", "finish")
    assert calls.routes == [LOAD, PAUSE, "flush_cache", "update_weight_version", CONTINUE]
    assert calls.seen[3][1] == {"new_version": "7", "abort_all_requests": False}
    stuck = Calls(update_weights_from_disk=UNFLUSHED, flush_cache={"success": False, "message": "busy"})
    with pytest.raises(EngineError, match=r"flush its cache after an update: busy"):
        load_from_disk(stuck, Path("/w"), "7", "finish")
    assert stuck.routes[-1] == CONTINUE


# --- over HTTP ------------------------------------------------------------------------------------------------------


def serve(model_dir: Path, answer: dict[str, Any] | None = None) -> RecordingServer:
    """Serve as a server with the server half does, as far as weights are concerned."""
    server = RecordingServer(model_path=str(model_dir))

    def respond(handler: Handler, payload: dict[str, Any]) -> None:
        if payload.get("name") == CHANNEL:
            return handler.say((200, served_weights(str(model_dir)).pack()))
        if handler.path == f"/{LOAD}":
            server.loaded = load_file(Path(payload["model_path"]) / "model.safetensors")  # type: ignore[attr-defined]
            return handler.say((200 if answer is None else 400, answer or {"success": True, "message": ""}))
        return handler.say((404, "Not Found"))

    server.respond = respond
    return server


@pytest.fixture
def server() -> Any:
    server = RecordingServer()
    yield server
    server.stop()


def test_all_servers_get_them_and_the_version_moves(tmp_path: Path) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path)
    servers = [serve(tmp_path) for _ in range(2)]
    with SGLangServer([server.url for server in servers]) as engine:
        assert engine.update_weights(model) == "v8"  # the fake engine serves "v7"
        assert engine.info.weight_version == "v8"
    for server in servers:
        server.stop()
        assert torch.equal(server.loaded["model.norm.weight"], model.model.norm.weight)  # type: ignore[attr-defined]


def test_a_server_that_refuses_is_named(tmp_path: Path) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path)
    good, bad = serve(tmp_path), serve(tmp_path, {"success": False, "message": "no room"})
    with SGLangServer([good.url, bad.url]) as engine:
        with pytest.raises(EngineError, match=f"1 of 2 servers took version 'x', and not {bad.url}: .*no room"):
            engine.update_weights(model, version="x")
        assert [endpoint.info.weight_version for endpoint in engine._endpoints] == ["x", "v7"]
    good.stop()
    bad.stop()


def test_weights_that_do_not_fit_are_not_sent(tmp_path: Path) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path)
    server = serve(tmp_path)
    with SGLangServer(server.url) as engine:
        with pytest.raises(WeightsError):
            engine.update_weights({"a": torch.ones(1)})
        with pytest.raises(InputError, match="'v7' is that of the weights already served"):
            engine.update_weights(model, version="v7")
        assert engine.info.weight_version == "v7"
    server.stop()
    assert [path for path, _ in server.seen if path == f"/{LOAD}"] == []


def test_the_way_is_disk_on_this_machine_alone(tmp_path: Path) -> None:
    near, elsewhere = serve(tmp_path), serve(tmp_path / "not-here")
    for server, way in ((near, "disk"), (elsewhere, "network")):
        with SGLangServer(server.url) as engine:
            (endpoint,) = engine._endpoints
            assert endpoint.choose_transport("auto", {}) == way
            assert endpoint.choose_transport("network", {}) == "network"
            # Stock SGLang would go on naming a checkpoint that is deleted; a directory of the user's stays.
            ours, endpoint.info = endpoint.info, dataclasses.replace(endpoint.info, pools_in_server=False)
            assert endpoint.choose_transport("auto", {}) == "network"
            assert endpoint.choose_transport("disk", tmp_path) == "disk"
            with pytest.raises(CapabilityError, match=r"transport='disk' for a dict: .*pass a directory"):
                endpoint.choose_transport("disk", {})
            endpoint.info, endpoint._host = ours, "10.0.0.1"
            assert endpoint.choose_transport("auto", {}) == "network"
            assert endpoint.choose_transport("disk", {}) == "disk"
        server.stop()


def test_a_version_is_new_to_every_server() -> None:
    assert new_version(["5"]) == "6"
    assert new_version(["5", "6", "7"]) == "8"


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TMPFS", tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = (f"{gone.pid}-x", "no-pid", f"{os.getpid()}-x")
    left, others, alive = (tmp_path / f"{PUSHED_PREFIX}{name}" for name in names)
    for directory in (left, others, alive):
        directory.mkdir()
    with checkpoint({"a": torch.ones(2)}) as path:
        assert path.parent == tmp_path
        assert path.name.startswith(f"{PUSHED_PREFIX}{os.getpid()}-")
    assert sorted(tmp_path.iterdir()) == sorted([others, alive])


def test_a_server_is_let_go_on_although_its_pause_went_unanswered() -> None:
    calls: list[str] = []

    def call(route: str, payload: dict[str, Any]) -> dict[str, Any]:
        calls.append(route)
        if route == "pause_generation":
            raise EngineTimeoutError("no answer")
        return {"success": True}

    with pytest.raises(EngineTimeoutError), paused(call):
        calls.append("updated")
    assert calls == ["pause_generation", "continue_generation"]


# --- the server half ------------------------------------------------------------------------------------------------


def test_the_server_goes_on_naming_its_own_model() -> None:
    started_with = SimpleNamespace(model_path="/models/own", served_model_name="own")
    for pushed, expected in ((f"/dev/shm/{PUSHED_PREFIX}x1", ("/models/own", "own")), ("/models/new", ("new", "new"))):
        manager = SimpleNamespace(server_args=started_with, model_path="new", served_model_name="new")
        weight_routes.after_model_path(None, manager, pushed, "auto")
        assert (manager.model_path, manager.served_model_name) == expected


def manager_of(model_dir: Path, **config: Any) -> SimpleNamespace:
    """Return SGLang's tokenizer manager, as far as names of weights are concerned."""
    settings = {"hf_config": AutoConfig.from_pretrained(model_dir), "quantization": None, **config}
    started_with = SimpleNamespace(model_path=str(model_dir))
    return SimpleNamespace(server_args=started_with, model_path="gone", model_config=SimpleNamespace(**settings))


def listed(manager: SimpleNamespace) -> ServedWeights:
    async def own_answer() -> None: ...

    answer = weight_routes.after_get_weights(own_answer(), manager, SimpleNamespace(name=CHANNEL))
    return ServedWeights.unpack(json.loads(json.dumps(asyncio.run(answer))))


def test_the_names_are_of_the_checkpoint_that_the_server_was_started_from(tmp_path: Path) -> None:
    served = saved(tiny(tied=True), tmp_path)
    assert listed(manager_of(tmp_path)) == served


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3MoeConfig])
def test_without_a_checkpoint_the_names_are_those_of_the_model(kind: Any, tied: bool, tmp_path: Path) -> None:
    more = {"moe_intermediate_size": 8, "num_experts": 2} if kind is Qwen3MoeConfig else {}
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **more, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    whole = served_weights(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    served = listed(manager_of(tmp_path))
    head = {"lm_head.weight"} if tied else set()
    assert served.tensors.keys() == whole.tensors.keys() | head
    assert all(served.tensors[name][1] == shape for name, (_, shape) in whole.tensors.items())
    assert check_weights(open_weights(model), served).keys() == whole.tensors.keys()


def test_the_running_model_is_named_where_its_config_was_changed(tmp_path: Path) -> None:
    tiny(tied=True).config.save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2)
    changed.architectures = ["LlamaForCausalLM"]
    names = listed(manager_of(tmp_path, hf_config=changed)).tensors
    assert "model.layers.1.mlp.up_proj.weight" in names


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    config = tiny(tied=True).config
    config.architectures = ["Unheard"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no \*.safetensors, and transformers knows no Unheard"):
        listed(manager_of(tmp_path))


@pytest.mark.parametrize(
    ("of_server", "of_checkpoint", "named"),
    [
        ("fp8", None, "fp8"),
        (None, {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("w8a8_int8", {"quant_method": "x"}, "w8a8_int8"),
    ],
)
def test_weights_of_a_quantised_server_are_refused_by_name(
    of_server: Any, of_checkpoint: Any, named: str, tmp_path: Path
) -> None:
    model = tiny(tied=True)
    model.save_pretrained(tmp_path)
    if of_checkpoint is not None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": of_checkpoint}))
    served = listed(manager_of(tmp_path, quantization=of_server))
    with pytest.raises(CapabilityError, match=rf"quantises its weights \({named}\).*start it without --quantization"):
        check_weights(open_weights(model), served)


def test_requests_are_held_back_until_those_under_way_have_ended() -> None:
    """With SGLang's own lock, of which a request under way holds the reader's side."""
    from sglang.srt.utils.aio_rwlock import RWLock

    async def own_answer() -> None: ...

    async def run(*, paused: bool) -> tuple[list[bool], bool]:
        manager = SimpleNamespace(is_pause=paused, is_pause_cond=asyncio.Condition(), model_update_lock=RWLock())
        async with manager.model_update_lock.reader_lock:
            answer = weight_routes.after_get_weights(own_answer(), manager, SimpleNamespace(name=DRAIN))
            waiting = asyncio.ensure_future(answer)
            for _ in range(10):
                await asyncio.sleep(0)
            seen = [manager.is_pause, waiting.done()]
        answered = await waiting
        assert answered["success"]
        return seen, answered[WAS_PAUSED]

    assert asyncio.run(run(paused=False)) == ([True, False], False)
    # What is under way in an engine that is paused already does not end.
    assert asyncio.run(run(paused=True)) == ([True, True], True)


def test_a_dummy_started_server_reads_adapters() -> None:
    from sglang.srt.configs.load_config import LoadConfig

    for started, reads in (("dummy", "auto"), ("safetensors", "safetensors")):
        config = LoadConfig(load_format=started)
        _, found = start.before_lora("manager", load_config=config, dtype=1)
        assert (found["load_config"].load_format, found["dtype"]) == (reads, 1)
        assert config.load_format == started, "the model's own configuration was changed"


# --- TorchRL's interface --------------------------------------------------------------------------------------------


class Collector:
    version = 0

    def increment_version(self) -> None:
        self.version += 1


def test_the_sender() -> None:
    engine, collector, model = RecordingEngine(), Collector(), tiny(tied=True)
    scheme = SGLangHiddenWeightSyncScheme(engine, transport="disk", running="continue")
    assert scheme.create_receiver("anything") is None
    sender = scheme.create_sender()
    with pytest.raises(InputError, match="register_model"):
        sender.update_weights()
    sender.register_model(model)
    sender.register_collector(collector)
    sender.init_all_workers_group({})
    assert sender.update_weights() == "v8"
    sender.update_weights({"a": torch.ones(1)})
    assert [update[1:] for update in engine.updates] == [("disk", "continue")] * 2
    assert engine.updates[0][0] is model
    assert collector.version == 2
    assert sender.flush_cache()
    sender.shutdown()
    with pytest.raises(InputError):
        sender.update_weights()


def test_the_scheme_in_a_collector_that_takes_schemes() -> None:
    from torchrl.collectors import Collector as TorchRLCollector
    from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv

    engine, model = RecordingEngine(), tiny(tied=True)
    scheme = SGLangHiddenWeightSyncScheme(engine)
    collector = TorchRLCollector(
        ContinuousActionVecMockEnv(), frames_per_batch=2, total_frames=2, weight_sync_schemes={"policy": scheme}
    )
    collector.update_policy_weights_(model)
    with pytest.raises(InputError, match="pass the trainer's model"):
        collector.update_policy_weights_()
    collector.shutdown()
    assert [update[0] for update in engine.updates] == [model]


def test_the_scheme_pickles_as_its_engine(tmp_path: Path) -> None:
    server = serve(tmp_path)
    scheme = SGLangHiddenWeightSyncScheme(server.url, running="continue")
    copy = pickle.loads(pickle.dumps(scheme))
    assert (copy.engine.url, copy.transport, copy.running) == (server.url, "auto", "continue")
    server.stop()
