"""Attention on a CUDA device, in Triton.  Modules other than this one import it, so they are imported only where it computes."""
