"""The bytes of the units: their layout, the rings, and the store that brings them to where computing happens."""
