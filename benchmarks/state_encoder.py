"""What a language model costs as the state encoder of many environments, and whether memory stays flat.

    prompt only    each observation is read, and nothing generated
    generating     tokens are generated from each first; the same vector comes home, so that the two can be compared

Each environment's prompt is a long system prompt, the same for all, and a short observation of its own. One reset of
all environments is one request, as every step is. Round after round the two sides encode the same observations; before
each the prefix cache is emptied, and the system prompt read once. How many tokens come from that cache is asked for
with a batch of other observations, of the same kind. Vectors of both sides are compared before a ratio is shown.

Then the environments go many steps with short prompts, observations that nobody has seen, and every 25th encoded: what
the processes of client and server hold meanwhile. PSS divides each page by the processes that have it; RSS counts it in
each of them.

    python benchmarks/state_encoder.py --model wide --envs 128 --steps 10000
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import psutil
import torch
from rich.progress import Progress
from rich.table import Table
from rounds import CONSOLE, Call, DifferentAnswersError, Rounds, print_record, read_arguments, take_turns
from serving import client_of, greedy, new_prompts, served, settle
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import step_mdp

from torchrl_sglang_hidden import HiddenSpec, HiddenStateTransform, Request, SGLangHiddenWrapper
from torchrl_sglang_hidden.engines.launch import LaunchedServer
from torchrl_sglang_hidden.sglang_api.payload import to_payload

PROMPT_ONLY, GENERATING = "prompt only", "generating"
SPEC = HiddenSpec(segments=("prompt",))
READING: Mapping[str, Any] = {"max_new_tokens": 0}
STATE_RTOL = 1e-4
EVERY = 25
# Of the system prompt while memory is watched. The number of prompts would make memory grow, not their length; below 64
# tokens none of it comes from the prefix cache.
WATCHED_SYSTEM_TOKENS = 32
MEMORY_POINTS = 20
MEBIBYTE = 2**20


class ObservationEnv(EnvBase):
    """Environments side by side whose observations are token ids that nobody has seen; episodes do not end.

    Args:
        num_envs: how many.
        vocab_size: of the model that reads the observations.
        tokens: of one observation.
        seed: of the observations.
    """

    def __init__(self, num_envs: int, *, vocab_size: int, tokens: int, seed: int = 0) -> None:
        super().__init__(batch_size=[num_envs])
        self.vocab_size, self.tokens = vocab_size, tokens
        self.observation_spec = Composite(
            observation=Categorical(vocab_size, shape=(num_envs, tokens), dtype=torch.int64), shape=self.batch_size
        )
        self.action_spec = Categorical(2, shape=(num_envs,), dtype=torch.int64)
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Binary(1, shape=(num_envs, 1), dtype=torch.bool)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _observe(self) -> TensorDict:
        # The first ids of most vocabularies are special tokens.
        shape = (*self.batch_size, self.tokens)
        observation = torch.randint(16, self.vocab_size, shape, generator=self.random)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict(observation=observation, done=done, terminated=done.clone(), batch_size=self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._observe().set("reward", torch.zeros(*self.batch_size, 1))


def make_env(
    server: LaunchedServer,
    system: Sequence[int],
    *,
    envs: int,
    observation_tokens: int,
    sampling: Mapping[str, Any],
    every: int = 1,
) -> TransformedEnv:
    """Return environments whose observations are encoded, each behind the system prompt."""
    policy = SGLangHiddenWrapper(server, input_mode="tokens", hidden=SPEC, generate_kwargs=dict(sampling))
    encode = HiddenStateTransform(
        policy, lambda row: [*system, *row["observation"].tolist()], in_keys=["observation"], every=every
    )
    return TransformedEnv(ObservationEnv(envs, vocab_size=server.info.vocab_size, tokens=observation_tokens), encode)


def cached_tokens(
    client: httpx.Client, server: LaunchedServer, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]
) -> list[int]:
    """Encode prompts, and return how many tokens of each came from the prefix cache."""
    requests = [Request(tuple(ids), sampling, hidden=SPEC) for ids in prompts]
    answers = client.post("/generate", json=to_payload(requests, server.info, binary=False)).raise_for_status().json()
    return [answer["meta_info"]["cached_tokens"] for answer in answers]


def compare_encoding(
    server: LaunchedServer, *, envs: int, system_tokens: int, observation_tokens: int, new_tokens: int, rounds: int
) -> Rounds:
    """Let reading observations and generating from them take turns; both return the pooled prompts.

    Args:
        server: serves the model.
        envs: environments side by side.
        system_tokens: of the prompt that all of them begin with.
        observation_tokens: of each one's own.
        new_tokens: generated from each.
        rounds: that count.
    """
    (system,) = new_prompts(server.info, 1, system_tokens, seed=1234)
    with client_of(server) as client:

        def side(sampling: Mapping[str, Any]) -> Any:
            env = make_env(server, system, envs=envs, observation_tokens=observation_tokens, sampling=sampling)

            def measure(seed: int) -> Call:
                settle(client)
                cached_tokens(client, server, [system], READING)
                env.set_seed(seed)
                start = time.perf_counter()
                found = env.reset()["hidden_state"]
                seconds = time.perf_counter() - start
                # Nobody has seen these observations either, and they are read with what the timed ones left.
                others = new_prompts(server.info, envs, observation_tokens, seed=1000 + seed)
                hits = cached_tokens(client, server, [[*system, *ids] for ids in others], READING)
                counts = {"encodings_per_s": envs / seconds, "fewest_cached_tokens": min(hits)}
                return Call(seconds, found, counts)

            return measure

        return take_turns(
            f"{envs} × ({system_tokens} + {observation_tokens}) tokens",
            {PROMPT_ONLY: side(READING), GENERATING: side(greedy(new_tokens))},
            lambda number: number,
            rounds=rounds,
            compare=largest_difference,
        )


def largest_difference(calls: Mapping[str, Call]) -> float:
    """Return how far the sides' vectors ``[B, D]`` are apart, relative to their length."""
    expected, found = calls[PROMPT_ONLY].found, calls[GENERATING].found
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not bool((errors < STATE_RTOL).all()):
        raise DifferentAnswersError(
            f"vectors of {GENERATING!r} and {PROMPT_ONLY!r} differ by {float(errors.max()):.1e} relative, over "
            f"{STATE_RTOL:.0e}; no ratio means anything"
        )
    return float(errors.max())


def held_memory(server: LaunchedServer) -> dict[str, float]:
    """Return what the client's process and all of the server's hold, in MiB."""
    root = psutil.Process(server.pid)
    found = {}
    for name, processes in {"client": [psutil.Process()], "server": [root, *root.children(recursive=True)]}.items():
        infos = [process.memory_full_info() for process in processes]
        found[f"{name}_pss_mib"] = sum(info.pss for info in infos) / MEBIBYTE
        found[f"{name}_rss_mib"] = sum(info.rss for info in infos) / MEBIBYTE
    return found


def watch_memory(
    server: LaunchedServer, *, envs: int, observation_tokens: int, steps: int, every: int = EVERY
) -> dict[str, Any]:
    """Step environments with new observations in each step, and note what is held meanwhile.

    Args:
        server: serves the model.
        envs: environments side by side.
        observation_tokens: of each one's own prompt, behind a short system prompt.
        steps: of all environments together.
        every: see `HiddenStateTransform`.

    Returns:
        The points, with the steps before each; how many prompts were encoded, and in which time.
    """
    (system,) = new_prompts(server.info, 1, WATCHED_SYSTEM_TOKENS, seed=4321)
    env = make_env(server, system, envs=envs, observation_tokens=observation_tokens, sampling=READING, every=every)
    due = sorted({round(steps * point / MEMORY_POINTS) for point in range(MEMORY_POINTS + 1)})
    points = []
    start = time.perf_counter()
    with Progress(console=CONSOLE, transient=True) as progress:
        task = progress.add_task("memory", total=steps)
        row = env.reset()
        for step in range(steps + 1):
            if step == due[len(points)]:
                points.append({"step": step, **held_memory(server)})
            if step < steps:
                row = step_mdp(env.step(row.set("action", torch.zeros(envs, dtype=torch.int64))))
            progress.advance(task)
    encoded = env.transform.cache_info.misses
    expected = envs * (1 + steps // every)
    if encoded != expected:
        raise DifferentAnswersError(f"{encoded} prompts were encoded; expected {expected}: no rate means anything")
    return {"every": every, "points": points, "encoded": encoded, "seconds": time.perf_counter() - start}


def memory_table(title: str, found: Mapping[str, Any]) -> Table:
    """Return a table of the first point, the one after a tenth of the steps, that in their middle and the last."""
    points = found["points"]
    last = len(points) - 1
    table = Table(title=title, caption=f"{found['encoded']} prompts encoded in {found['seconds']:.0f} s")
    table.add_column("after step", justify="right")
    names = [name for name in points[0] if name != "step"]
    for name in names:
        who, what, unit = name.split("_")
        table.add_column(f"{who}, {what.upper()} {unit.replace('mib', 'MiB')}", justify="right")
    for index in sorted({0, last // 10, last // 2, last}):
        table.add_row(f"{points[index]['step']:,}", *(f"{points[index][name]:,.1f}" for name in names))
    return table


def main() -> None:
    """Measure the models that the command line names."""
    args = read_arguments(
        __doc__,
        model=("smollm2", "wide"),
        envs=128,
        system_tokens=512,
        observation_tokens=16,
        new_tokens=64,
        rounds=3,
        steps=10_000,
        dtype="float32",
    )
    own = args.observation_tokens + args.new_tokens + 64
    prompt = {name: getattr(args, name) for name in ("envs", "system_tokens", "observation_tokens")}
    models = {}
    for model in args.model:
        room = {"context_length": args.system_tokens + own, "total_tokens": args.system_tokens + args.envs * own}
        with served(model, dtype=args.dtype, **room) as server:
            found = compare_encoding(server, **prompt, new_tokens=args.new_tokens, rounds=args.rounds)
            sizes = {"envs": args.envs, "observation_tokens": args.observation_tokens, "steps": args.steps}
            memory = watch_memory(server, **sizes) if args.steps else None
            hidden_size = server.info.hidden_size
        what = f"{model}, D = {hidden_size}, {args.dtype}: {args.envs} environments, prompts of"
        speed = found.speed(PROMPT_ONLY, GENERATING)
        CONSOLE.print(
            found.table(
                f"{what} {args.system_tokens} + {args.observation_tokens} tokens, then {args.new_tokens} new ones or "
                f"none; medians of {args.rounds} rounds",
                {
                    "encodings/s": lambda side, found=found: f"{found.count(side, 'encodings_per_s'):.1f}",
                    "from the cache": lambda side, found=found: f"{found.count(side, 'fewest_cached_tokens'):.0f}",
                },
                f"prompt only is {speed:.1f} times as fast; vectors differ by at most {found.worst:.0e} relative; "
                "from the cache: tokens of each prompt, at least",
            )
        )
        if memory is not None:
            title = f"{what} {WATCHED_SYSTEM_TOKENS} + {args.observation_tokens}, each {EVERY}th step encoded: memory"
            CONSOLE.print(memory_table(title, memory))
        models[model] = {
            "hidden_size": hidden_size,
            "worst_relative_difference": found.worst,
            "speed_of_generating": speed,
            "sides": found.results(),
            "memory": memory,
        }
    print_record("state_encoder", args, {"models": models})


if __name__ == "__main__":
    main()
