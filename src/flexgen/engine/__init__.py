"""The engine: passes over the layers of the model, each for all live sequences at once."""
