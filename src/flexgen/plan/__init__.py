"""Predicts what a job takes, in numbers only: models, machines, workloads, policies and their price. No torch."""
