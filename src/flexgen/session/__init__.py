"""Resolving a model and its options, opening the engine that serves them, and replacing that engine when its plan no longer fits."""
