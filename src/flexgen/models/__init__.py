"""What is computed: transformers' models without weights, and where their parameters come from."""
