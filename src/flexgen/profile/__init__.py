"""Measures this machine: its limits and its best rates."""
