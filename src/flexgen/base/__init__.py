"""The ground that all rooms stand on: sizes and durations as people write them, safe files, JSON from strangers."""
