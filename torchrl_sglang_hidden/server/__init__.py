"""What runs inside SGLang's processes: the opt-in plugin, the capture of states, and the CPU engine's set-up."""
