"""Decoding of stored numbers: on a CPU by compiled loops, on other devices by plain torch operations."""
