"""What turns hidden states into agents: a transform, recordings, heads of actors and critics, diagnostics.

Uses the policy as any program would, and knows nothing of engines or requests.
"""

from __future__ import annotations

from torchrl_sglang_hidden.rl.actor_critic import make_actor_critic
from torchrl_sglang_hidden.rl.centroid import CentroidReward
from torchrl_sglang_hidden.rl.cross_rollout import CrossRolloutBaseline
from torchrl_sglang_hidden.rl.distillation import VocabularyDistillationLoss
from torchrl_sglang_hidden.rl.drift import Drift, state_drift
from torchrl_sglang_hidden.rl.exploration import ExplorationBonus
from torchrl_sglang_hidden.rl.layer_sweep import LayerMeasures, layer_sweep
from torchrl_sglang_hidden.rl.llm_actor_critic import make_llm_actor_critic
from torchrl_sglang_hidden.rl.measures import (
    Cosines,
    Variance,
    effective_rank,
    pairwise_cosine,
    singular_values,
    state_variance,
)
from torchrl_sglang_hidden.rl.next_states import add_next_states
from torchrl_sglang_hidden.rl.plots import (
    plot_cosines,
    plot_layers,
    plot_map,
    plot_probe,
    plot_spectrum,
    plot_variance,
)
from torchrl_sglang_hidden.rl.probe import ProbeResult, linear_probe
from torchrl_sglang_hidden.rl.rank_transform import EffectiveRank
from torchrl_sglang_hidden.rl.record import record_hidden_states
from torchrl_sglang_hidden.rl.recording import Recording, load_recording
from torchrl_sglang_hidden.rl.report import write_report
from torchrl_sglang_hidden.rl.reward_head import BradleyTerryLoss, make_reward_head
from torchrl_sglang_hidden.rl.teacher_states import RetrieveTeacherStates
from torchrl_sglang_hidden.rl.transform import HiddenStateTransform
from torchrl_sglang_hidden.rl.value_head import make_value_head
from torchrl_sglang_hidden.rl.vocabulary_divergence import vocabulary_divergence

__all__ = [
    "BradleyTerryLoss",
    "CentroidReward",
    "Cosines",
    "CrossRolloutBaseline",
    "Drift",
    "EffectiveRank",
    "ExplorationBonus",
    "HiddenStateTransform",
    "LayerMeasures",
    "ProbeResult",
    "Recording",
    "RetrieveTeacherStates",
    "Variance",
    "VocabularyDistillationLoss",
    "add_next_states",
    "effective_rank",
    "layer_sweep",
    "linear_probe",
    "load_recording",
    "make_actor_critic",
    "make_llm_actor_critic",
    "make_reward_head",
    "make_value_head",
    "pairwise_cosine",
    "plot_cosines",
    "plot_layers",
    "plot_map",
    "plot_probe",
    "plot_spectrum",
    "plot_variance",
    "record_hidden_states",
    "singular_values",
    "state_drift",
    "state_variance",
    "vocabulary_divergence",
    "write_report",
]
