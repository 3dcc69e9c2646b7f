"""The engine: passes over the layers, for all live sequences at once."""
