"""Plays a job under a policy: which sequences are admitted when, and the work of each pass."""
