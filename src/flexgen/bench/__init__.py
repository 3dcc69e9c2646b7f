"""Benchmarks that a user runs."""
