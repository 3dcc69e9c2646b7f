"""The coroutine in which a micro-batch's forward pass runs, as the model code meets it.

Hooks, attention and experts ask the coroutine they run in: "I need unit u", "attend with these q, k, v".
Knows nothing of schedules, rings or pages: subclasses (the sweep's, the tracer's) answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import greenlet
import torch

from flexgen.errors import EngineError
from flexgen.passes.calls import AttentionCall, CacheUpdate
from flexgen.passes.plan import Slice


class ForwardCoroutine(greenlet.greenlet):
    """A forward pass that can be suspended inside the model's own code.

    Attributes:
        position_ids: (1, tokens) of the running forward.
        updates: what its layers have handed to the cache so far.
    """

    position_ids: torch.Tensor

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.updates: list[CacheUpdate] = []

    def slices(self) -> Sequence[Slice]:
        """What the micro-batch is made of, in order."""
        raise NotImplementedError

    def enter_unit(self, unit: int) -> None:
        """Return once the weights of `unit` are bound; units are entered in rising order."""
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Store what the call brings, and attend; returns (1, tokens, heads, value_dim)."""
        raise NotImplementedError

    def input_rows(self, module_name: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n, dim) of the embedding `module_name`, and `token_ids` renumbered to index them."""
        raise NotImplementedError

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Remember what a layer hands to the cache, until its attention call."""
        if self.updates:
            self.updates[-1].let_go()
        self.updates.append(CacheUpdate(layer, key, value))


def current_forward() -> ForwardCoroutine:
    """The coroutine that runs the calling code.

    Raises:
        EngineError: when model code runs outside of a coroutine.
    """
    coroutine = greenlet.getcurrent()
    if not isinstance(coroutine, ForwardCoroutine):
        raise EngineError("model code with flexgen's hooks ran outside of a forward coroutine")
    return coroutine
