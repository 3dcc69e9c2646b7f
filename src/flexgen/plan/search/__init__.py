"""Finds the best policy: by a linear program, by playing points near its answers, and by moves between points."""
