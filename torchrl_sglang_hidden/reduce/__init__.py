"""Pure torch, the same code inside the server and on the client: pooling; constraining logits and selecting columns.

Knows nothing of SGLang, of how anything travels, or of TensorDicts.
"""
