"""Is the package of models that SGLang is told to look in first, with the one that it serves.

SGLang then leaves the two hundred others alone until one of them is asked for. Its ``entry`` alone imports SGLang.
"""
