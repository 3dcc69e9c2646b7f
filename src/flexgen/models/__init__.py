"""The computation of a model: transformers' models without weights, and where their parameters come from."""
