"""Images in prompts, for all who write prompts: read in any form, found in messages, expanded to the ids of their rows.

Knows nothing of TensorDicts, engines or SGLang.
"""
