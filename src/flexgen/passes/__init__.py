"""The plain values of one pass, which the engine, the models and the KV cache exchange."""
