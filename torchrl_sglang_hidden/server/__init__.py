"""Holds what runs inside SGLang's processes: the opt-in plugin, the capture of states, and the CPU engine's set-up.

Knows nothing of TorchRL, nor of the client. What client and server say to each other is in `protocol`.
"""
