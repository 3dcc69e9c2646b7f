"""Attention kernels for the host's processor, compiled by Numba."""

from flexgen.kernels.cpu.sealed_kernels import CpuKernels

__all__ = ["CpuKernels"]
