"""What turns hidden states into agents: `HiddenStateTransform`, an environment transform; `record_hidden_states`.

Uses the policy as any program would, and knows nothing of engines or requests.
"""

from __future__ import annotations

from torchrl_sglang_hidden.rl.record import record_hidden_states
from torchrl_sglang_hidden.rl.recording import Recording, load_recording
from torchrl_sglang_hidden.rl.transform import HiddenStateTransform

__all__ = ["HiddenStateTransform", "Recording", "load_recording", "record_hidden_states"]
