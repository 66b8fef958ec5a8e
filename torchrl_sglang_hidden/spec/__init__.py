"""Defines what the user writes: hidden states, logits, spans and constraints, each checked when it is made.

Knows nothing of engines, TensorDicts or SGLang. Axes, here and in every name of the package:

    B  rows of a batch             T  response tokens
    P  prompt tokens               D  hidden size
    N  any run of positions        K  layers
    V  vocabulary                  C  the columns of the logits that were asked for

    name_BD is a tensor of shape [B, D]; a name without axes is a scalar or a record.
"""
