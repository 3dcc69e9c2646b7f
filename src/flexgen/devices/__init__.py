"""Where computing happens besides the host: arenas of memory, and copies in both directions."""
