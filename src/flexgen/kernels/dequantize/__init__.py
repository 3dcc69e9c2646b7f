"""Decoding of stored codes: tables of their values, compiled kernels for the host, and torch operations for every other device."""
