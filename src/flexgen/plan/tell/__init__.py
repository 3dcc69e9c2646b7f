"""Explains a plan: its forecast, the changes that would help, and the price of finishing sooner."""
