"""Attention kernels for the host's processor, compiled by Numba."""

from flexgen.kernels.cpu.sparse_kernels import CpuKernels

__all__ = ["CpuKernels"]
