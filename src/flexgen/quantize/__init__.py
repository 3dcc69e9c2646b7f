"""Weights in 8 and 4 bits, made from a checkpoint: rounding, which tensors it is for, the folder that is written, the cache."""
