"""What turns hidden states into agents: a transform, recordings, heads of actors and critics.

Uses the policy as any program would, and knows nothing of engines or requests.
"""

from __future__ import annotations

from torchrl_sglang_hidden.rl.actor_critic import make_actor_critic
from torchrl_sglang_hidden.rl.llm_actor_critic import make_llm_actor_critic
from torchrl_sglang_hidden.rl.next_states import add_next_states
from torchrl_sglang_hidden.rl.record import record_hidden_states
from torchrl_sglang_hidden.rl.recording import Recording, load_recording
from torchrl_sglang_hidden.rl.transform import HiddenStateTransform
from torchrl_sglang_hidden.rl.value_head import make_value_head

__all__ = [
    "HiddenStateTransform",
    "Recording",
    "add_next_states",
    "load_recording",
    "make_actor_critic",
    "make_llm_actor_critic",
    "make_value_head",
    "record_hidden_states",
]
