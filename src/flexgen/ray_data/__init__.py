"""FlexGenActor, which answers the rows of a dataset of Ray Data, batch by batch (docs/ray.md).

The actor (actor.py) is an `LLM` with the question of `LLM.map`.  Its budgets are what Ray has assigned to it (assigned.py), and its
threads run on processors of its own (processors.py).
"""

from __future__ import annotations

from flexgen.ray_data.actor import FlexGenActor

__all__ = ["FlexGenActor"]
