"""Train an agent online on a language model's hidden states: PPO, many environments at once, one request per step.

    python tutorials/online_rl.py                                # 128 environments, the demo model on this machine
    python tutorials/online_rl.py --skip-n 25 --layer 15 --tokens 1 --url http://127.0.0.1:30000
    python tutorials/online_rl.py --ablate zero                  # the control: the same agent without the words
    python tutorials/online_rl.py --steps 131072 --resume online_rl/none/checkpoint.pt
    tensorboard --logdir online_rl

The task is `instructions.py`. Every episode's instruction is a prompt, its pooled state stands beside the observation,
and actor and critic read both. The program ends with the mean reward per episode under wordings that it never saw.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from instructions import InstructionEnv, read_instruction
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import Compose, ExplorationType, RewardSum, TransformedEnv, VecNormV2, set_exploration_type
from torchrl.modules import ActorValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.record.loggers import TensorboardLogger

from torchrl_sglang_hidden import (
    Engine,
    HiddenSpec,
    HiddenStateTransform,
    SGLangHiddenWrapper,
    connect,
    demo_model,
    launch,
)
from torchrl_sglang_hidden.rl import make_actor_critic

EVALUATION_ENVS, EVALUATION_STEPS = 64, 64


class Ablation(StrEnum):
    """What stands in the place of the vectors; see `HiddenStateTransform`."""

    NONE = "none"
    ZERO = "zero"
    SHUFFLE = "shuffle"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is; see the command line's help."""

    envs: int = 128
    steps: int = 65_536
    skip_n: int = 25
    layer: int = -1
    tokens: int = 0
    ablate: str | None = None
    seed: int = 0
    project: int = 64
    steps_per_batch: int = 16
    epochs: int = 8
    minibatch: int = 256
    learning_rate: float = 3e-3


class Trainer:
    """Environments, agent and optimizer of one run.

    Args:
        engine: encodes the instructions.
        options: what the run is.
    """

    def __init__(self, engine: Engine, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options, self.frames = options, 0
        policy = SGLangHiddenWrapper(
            engine,
            input_mode="text",
            hidden=HiddenSpec(segments=("response" if options.tokens else "prompt",), layers=options.layer),
            generate_kwargs={"max_new_tokens": options.tokens, "temperature": 0.0},
        )
        self.encode = HiddenStateTransform(
            policy,
            read_instruction,
            in_keys=["instruction"],
            every=options.skip_n,
            cache_size=1024,
            # Beside all 576 dimensions the four of the thing are hard to see.
            project=options.project,
            ablate=options.ablate,
        )
        # Some dimensions of pooled states are a hundred times as wide as others.
        self.norm = VecNormV2(in_keys=["hidden_state"], out_keys=["hidden_state_norm"], reduce_batch_dims=True)
        self.env = TransformedEnv(
            InstructionEnv(options.envs, seed=options.seed),
            Compose(self.encode, self.norm, RewardSum(in_keys=["reward"], out_keys=["episode_reward"])),
        )
        self.agent: ActorValueOperator = make_actor_critic(
            self.encode,
            self.env.action_spec,
            state_key="hidden_state_norm",
            observation_spec=self.env.observation_spec,
            observation_keys=["thing"],
            num_cells=(128, 128),
            norm=False,
        )
        value = self.agent.get_value_operator()
        self.advantage = GAE(gamma=0.95, lmbda=0.95, value_network=value, average_gae=True)
        self.loss = ClipPPOLoss(self.agent.get_policy_operator(), value, entropy_coeff=0.01)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=options.learning_rate)

    def train(self, batch: TensorDictBase) -> dict[str, float]:
        """Update the agent on what was collected, and return what there is to plot."""
        with torch.no_grad():
            self.advantage(batch)
        rows = batch.reshape(-1)
        for _ in range(self.options.epochs):
            for places in torch.randperm(len(rows)).split(self.options.minibatch):
                losses = self.loss(rows[places])
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                self.optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
                self.optimizer.step()
        self.frames += len(rows)
        ended = rows["next", "done"][:, 0]
        return {
            "reward": float(rows["next", "episode_reward"][ended].mean()),
            "entropy": float(losses["entropy"].detach().mean()),
            "loss_critic": float(losses["loss_critic"].detach()),
        }

    def collect(self) -> Collector:
        """Return the collector of the steps that are left."""
        per_batch = self.options.envs * self.options.steps_per_batch
        return Collector(
            self.env,
            self.agent.get_policy_operator(),
            frames_per_batch=per_batch,
            total_frames=max(self.options.steps - self.frames, 0),
            auto_register_policy_transforms=False,  # the policy has no state of its own between steps
        )

    def evaluate(self, *, held_out: bool = True) -> float:
        """Return the mean reward of whole episodes, each action the likeliest one; statistics stay as they are."""
        env = TransformedEnv(
            InstructionEnv(EVALUATION_ENVS, held_out=held_out, seed=1234),
            Compose(
                self.encode.clone(),
                self.norm.clone().freeze(),
                RewardSum(in_keys=["reward"], out_keys=["episode_reward"]),
            ),
        )
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            found = env.rollout(EVALUATION_STEPS, self.agent.get_policy_operator(), break_when_any_done=False)
        return float(found["next", "episode_reward"][found["next", "done"]].mean())

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is there is replaced when the new one is whole."""
        state = {
            "options": asdict(self.options),
            "frames": self.frames,
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "norm": dict(self.norm.state_dict()),
            "random": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Its environments are not in it: they begin new episodes."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        free = {"steps"}
        other = {
            name: (value, was)
            for name, value in asdict(self.options).items()
            if name not in free and (was := state["options"].get(name)) != value
        }
        if other:
            raise typer.BadParameter(f"{path} is of other options, {other} (now, then); give the same, or begin anew")
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.norm.load_state_dict(state["norm"])
        torch.set_rng_state(state["random"])
        self.frames = state["frames"]


def run(engine: Engine, options: Options, directory: Path, *, resume: Path | None = None, every: int = 8) -> float:
    """Train, log and save; return the mean reward per episode under the held-out wordings.

    Args:
        engine: encodes the instructions.
        options: what the run is.
        directory: for logs and checkpoints, in one named for the ablation.
        resume: a checkpoint to go on from.
        every: batches between two checkpoints.
    """
    directory = directory / (options.ablate or "none")
    directory.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(engine, options)
    if resume is not None:
        trainer.load(resume)
    logger = TensorboardLogger(exp_name=directory.name, log_dir=str(directory.parent))
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    began, first = time.monotonic(), trainer.frames
    with Progress(*columns) as progress:
        task = progress.add_task("", total=options.steps, completed=trainer.frames)
        for number, batch in enumerate(trainer.collect()):
            found = trainer.train(batch)
            cache = trainer.encode.cache_info
            found["steps_per_s"] = (trainer.frames - first) / (time.monotonic() - began)
            found["cache_hit_rate"] = cache.hit_rate
            for name, value in found.items():
                logger.log_scalar(name, value, step=trainer.frames)
            progress.update(
                task,
                completed=trainer.frames,
                description=f"reward {found['reward']:+.2f}, {found['steps_per_s']:.0f} steps/s, "
                f"{cache.misses} prompts asked, {cache.hit_rate:.0%} of the others from the cache",
            )
            if number % every == every - 1:
                trainer.save(directory / "checkpoint.pt")
    trainer.save(directory / "checkpoint.pt")
    reward = trainer.evaluate()
    logger.log_scalar("held_out_reward", reward, step=trainer.frames)
    logger.experiment.close()
    return reward


def main(
    envs: Annotated[int, typer.Option(min=1, help="Environments side by side.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of all environments together.")] = 65_536,
    skip_n: Annotated[int, typer.Option(min=1, help="Encode an environment's reset and each n-th step after it.")] = 25,
    layer: Annotated[int, typer.Option(help="The layer whose states are read; -1 is the last, after the norm.")] = -1,
    tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to generate, whose states are read; 0 reads the prompt's.")
    ] = 0,
    project: Annotated[int, typer.Option(min=1, help="Dimensions that a fixed random projection leaves.")] = 64,
    ablate: Annotated[Ablation, typer.Option(help="A control in the place of the hidden states.")] = Ablation.NONE,
    seed: Annotated[int, typer.Option(help="Of the environments and the agent.")] = 0,
    url: Annotated[str | None, typer.Option(help="A running server; by default the demo model is started.")] = None,
    directory: Annotated[Path, typer.Option(help="For TensorBoard's logs and checkpoints.")] = Path("online_rl"),
    resume: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A checkpoint to go on from.")
    ] = None,
) -> None:
    """Train an agent on an instruction that it can only read in words."""
    options = Options(
        envs, steps, skip_n, layer, tokens, None if ablate is Ablation.NONE else ablate.value, seed, project
    )
    with ExitStack() as stack:
        engine = stack.enter_context(launch(demo_model(), sleep_on_idle=True) if url is None else connect(url))
        reward = run(engine, options, directory, resume=resume)
    typer.echo(
        f"Mean reward per episode under wordings that were never trained on: {reward:+.2f} (an agent that reads "
        "no words: at most 0, a perfect one: 1)"
    )


if __name__ == "__main__":
    typer.run(main)
