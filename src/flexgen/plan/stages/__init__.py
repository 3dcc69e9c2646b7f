"""Divides a model among pipeline stages."""
