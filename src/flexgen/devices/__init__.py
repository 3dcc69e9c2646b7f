"""Devices that compute besides the host: arenas of memory, and copies in both directions."""
