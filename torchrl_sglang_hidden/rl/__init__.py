"""What turns hidden states into agents: `HiddenStateTransform`, an environment transform.

Uses the policy as any program would, and knows nothing of engines or requests.
"""

from __future__ import annotations

from torchrl_sglang_hidden.rl.transform import HiddenStateTransform

__all__ = ["HiddenStateTransform"]
