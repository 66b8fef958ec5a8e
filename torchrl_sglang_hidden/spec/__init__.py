"""What the user writes: hidden states, logits, spans and constraints, each checked when it is made.

Knows nothing of engines, TensorDicts or SGLang.
"""
