"""The command line: ``torchrl-sglang-hidden demo | serve | record | report``."""

from __future__ import annotations

from torchrl_sglang_hidden.cli.commands import app, main

__all__ = ["app", "main"]
