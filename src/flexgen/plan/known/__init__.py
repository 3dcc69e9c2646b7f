"""Machines and models that ship with the package."""
