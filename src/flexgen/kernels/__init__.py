"""Attention kernels: the reference, and one implementation per kind of device."""
