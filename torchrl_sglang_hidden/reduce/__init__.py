"""Pure torch, the same code inside the server and on the client: pooling, what is done to logits and kept of them.

Knows nothing of SGLang, of how anything travels, or of TensorDicts.
"""
