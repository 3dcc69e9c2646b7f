"""Ranks of one run on one or several machines: who is there, frames between them, and the end of all when one is lost."""
