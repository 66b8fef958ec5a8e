"""`make_llm_actor_critic`: the language model chooses among allowed actions, and a critic reads its hidden states.

Knows nothing of observations beside the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.modules import MLP, ActorValueOperator, MaskedCategorical, ProbabilisticActor

from torchrl_sglang_hidden.errors import InputError, InputTypeError
from torchrl_sglang_hidden.policy.candidate_ids import is_candidate
from torchrl_sglang_hidden.policy.candidates import CandidateActor
from torchrl_sglang_hidden.policy.wrapper import SGLangHiddenWrapper
from torchrl_sglang_hidden.rl.state_source import StateInput, StateSource, check_cells, find_states
from torchrl_sglang_hidden.rl.value_head import make_value_head
from torchrl_sglang_hidden.spec.hidden import HiddenSpec
from torchrl_sglang_hidden.spec.logits import LogitsSpec

__all__ = ["CorrectedLogits", "make_llm_actor_critic"]

# Options of a request that say which model answers and when, and not what is sampled.
_KEPT_OPTIONS = ("lora_path", "priority")
_TOKEN_LOGITS = "llm_logits"  # of single tokens, [*batch, A]


class CorrectedLogits(nn.Module):
    """Adds to the language model's logits of A actions what a small network makes of the hidden vector.

    The network's last layer begins at zero: at first the policy is the language model's.

    Args:
        source: the hidden vectors.
        num_actions: A.
        num_cells: sizes of the hidden layers.
        norm: see `make_value_head`.
        device: of the parameters.
    """

    def __init__(
        self,
        source: StateSource,
        num_actions: int,
        num_cells: list[int],
        norm: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.states = StateInput(source, norm)
        self.net = MLP(in_features=source.shape.numel(), out_features=num_actions, num_cells=num_cells, device=device)
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return logits ``[*batch, A]``; an action that the language model cannot take keeps -inf.

        Raises:
            InputError: logits of another number of actions, or vectors of another shape.
        """
        correction: torch.Tensor = self.net(self.states(states))
        if logits.shape[-1] != correction.shape[-1]:
            raise InputError(
                f"logits of {logits.shape[-1]} actions; expected {correction.shape[-1]}: make the actor for them"
            )
        return logits.to(correction) + correction


def make_llm_actor_critic(
    actor: CandidateActor | SGLangHiddenWrapper,
    *,
    encoder: SGLangHiddenWrapper | None = None,
    actor_cells: Sequence[int] = (),
    critic_cells: Sequence[int] = (),
    norm: bool = True,
    action_key: NestedKey = "action",
    device: torch.device | str | None = None,
) -> ActorValueOperator:
    """Make an actor that begins as the language model, with its action mask, and a critic on the same prompt's states.

    The actor's logits are the language model's for A actions, plus a correction that a small network learns from the
    pooled prompt state: zero at first. The mask is the environment's. Neither reaches the language model's weights, and
    losses made of ``get_policy_head()`` and ``get_value_head()`` read what the rollout recorded: they call no engine.

    Args:
        actor: what chooses. A `CandidateActor`: sentences, A of them, the same for every row, with its
            ``action_mask_key``. Or a policy with ``action_mask_key`` and A ``action_token_ids``: single tokens, whose
            logits come with the prompt's state in one request; action a is token a, and the rows' masks are bool
            ``[*batch, A]``.
        encoder: pools the prompts for a `CandidateActor`; by default its own policy, which reads the prompt alone.
            Scoring finds that prompt in the prefix cache.
        actor_cells: sizes of the correction's hidden layers; none is linear.
        critic_cells: sizes of the critic's hidden layers.
        norm: see `make_value_head`.
        action_key: where the action is written, int64 ``[*batch]``, with its log-prob beside it.
        device: of the parameters.

    Returns:
        An operator: its common part calls the engine and writes the hidden states and the language model's logits;
        ``get_policy_operator()`` collects.

    Raises:
        InputError: candidates that differ from row to row, a policy without ``action_token_ids``, sizes below 1.
        InputTypeError: an argument of another type.

    Example:
        >>> both = make_llm_actor_critic(CandidateActor(policy, ["go north", "wait"], action_mask_key="action_mask"))
        >>> rollout = env.rollout(100, both.get_policy_operator())
        >>> GAE(gamma=0.99, lmbda=0.95, value_network=both.get_value_head(), shifted=True)(rollout)
        >>> loss = ClipPPOLoss(both.get_policy_head(), both.get_value_head())
    """
    cells = check_cells("actor_cells", actor_cells)
    if isinstance(actor, CandidateActor):
        parts = _of_candidates(actor, encoder)
    elif isinstance(actor, SGLangHiddenWrapper):
        if encoder is not None:
            raise InputError("encoder, beside a policy of single tokens, which pools its own prompts: leave it out")
        parts = _of_tokens(actor)
    else:
        raise InputTypeError(
            f"actor={actor!r:.80} is a {type(actor).__name__}; expected a CandidateActor, or a SGLangHiddenWrapper "
            "with action_token_ids"
        )
    source = find_states(parts.reader, None)
    head = ProbabilisticActor(
        TensorDictModule(
            CorrectedLogits(source, parts.num_actions, cells, norm, device),
            in_keys=[source.key, parts.logits_key],
            out_keys=["policy_logits"],
        ),
        in_keys={"logits": "policy_logits", "mask": parts.mask_key},
        out_keys=[action_key],
        distribution_class=MaskedCategorical,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
    critic = make_value_head(parts.reader, num_cells=critic_cells, norm=norm, device=device)
    return ActorValueOperator(parts.common, head, critic)


class _Parts(NamedTuple):
    """What calls the language model, and where it writes the logits and masks of A actions."""

    common: TensorDictModuleBase
    reader: SGLangHiddenWrapper
    num_actions: int
    logits_key: NestedKey
    mask_key: NestedKey


def _of_candidates(actor: CandidateActor, encoder: SGLangHiddenWrapper | None) -> _Parts:
    """Return the parts of an actor that chooses among sentences."""
    scores = actor[0]
    if not all(is_candidate(candidate) for candidate in scores.candidates):
        raise InputError(
            f"candidates={scores.candidates!r:.80} differ from row to row; expected one list for all rows: mask what a "
            "row does not allow, with action_mask_key"
        )
    if encoder is None and isinstance(scores.policy, SGLangHiddenWrapper):
        encoder = _reader_of(scores.policy)
    if not isinstance(encoder, SGLangHiddenWrapper):
        raise InputTypeError(
            f"encoder={encoder!r:.80} is a {type(encoder).__name__}; expected a SGLangHiddenWrapper that pools prompts"
        )
    return _Parts(TensorDictSequential(encoder, scores), encoder, len(scores.candidates), *scores.out_keys)


def _of_tokens(policy: SGLangHiddenWrapper) -> _Parts:
    """Return the parts of a policy whose actions are single tokens: one request has their logits and the state."""
    config = policy.config
    if config.action_token_ids is None or config.action_mask_key is None:
        raise InputError(
            "a policy without action_token_ids: its actions are texts of any length; use get_new_version("
            "action_mask_key=..., action_token_ids=...), or a CandidateActor for sentences"
        )
    logits_key = config.keys.logits_key or "logits"
    reader = policy.get_new_version(
        hidden=_prompt_spec(policy),
        logits=LogitsSpec(token_ids=config.action_token_ids),
        logits_key=logits_key,
        generate_kwargs={**config.generate_kwargs, "max_new_tokens": 1},
        inplace=True,
    )
    first = TensorDictModule(_first_row, in_keys=[unravel_key((logits_key, "response"))], out_keys=[_TOKEN_LOGITS])
    num_actions = len(config.action_token_ids)
    return _Parts(TensorDictSequential(reader, first), reader, num_actions, _TOKEN_LOGITS, config.action_mask_key)


def _first_row(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of the first token, ``[*batch, A]``, of ``[*batch, T, A]``."""
    return logits[..., 0, :]


def _reader_of(policy: SGLangHiddenWrapper) -> SGLangHiddenWrapper:
    """Return a version of a policy that pools the same prompts and writes nothing else."""
    options = policy.config.generate_kwargs
    names = ("text_key", "history_key", "tokens_key", "masks_key", "log_probs_key", "action_mask_key")
    return policy.get_new_version(
        hidden=_prompt_spec(policy),
        logits=None,
        heads=None,
        constraints=(),
        action_token_ids=None,
        generate_kwargs={**{name: options[name] for name in _KEPT_OPTIONS if name in options}, "max_new_tokens": 0},
        inplace=True,
        **dict.fromkeys(names),
    )


def _prompt_spec(policy: SGLangHiddenWrapper) -> HiddenSpec:
    """Return a policy's way to pool, of the prompt alone."""
    hidden = policy.config.hidden
    if hidden is None or hidden.pooling is None:
        return HiddenSpec(segments=("prompt",))
    return replace(hidden, segments=("prompt",), spans={}, tokens=False)
