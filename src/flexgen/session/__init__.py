"""From files and options to an open engine, and when another must take its place."""
