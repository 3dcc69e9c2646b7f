"""Adapters by which evaluation harnesses run their tasks on flexgen."""
