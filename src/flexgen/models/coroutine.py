"""The coroutine in which a micro-batch's forward pass runs, as the model code sees it.

Hooks, attention and experts make requests to the coroutine in which they run, such as "enter unit u" or "attend with these q, k, v".
It knows no schedules, rings or pages: its subclasses (the sweep's and the tracer's) answer the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import greenlet
import torch

from flexgen.errors import EngineError
from flexgen.models.scoring import Scorer
from flexgen.passes.calls import AttentionCall, CacheUpdate
from flexgen.passes.plan import Slice


class ForwardCoroutine(greenlet.greenlet):
    """A forward pass that can be suspended inside the model's own code.

    Attributes:
        position_ids: The positions, (1, tokens), of the running forward.
        updates: The updates that its layers have passed to the cache so far.
        scorer: The scorer of the rows whose logits are only scored; None if there are none.
    """

    position_ids: torch.Tensor

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.scorer: Scorer | None = None
        self.updates: list[CacheUpdate] = []

    def slices(self) -> Sequence[Slice]:
        """Return the slices of the micro-batch, in order."""
        raise NotImplementedError

    def enter_unit(self, unit: int) -> None:
        """Return once the weights of `unit` are bound; units are entered in ascending order."""
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Store the call's new keys and values, and return its attention, (1, tokens, heads, value_dim)."""
        raise NotImplementedError

    def input_rows(self, module_name: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (n, dim) of the embedding `module_name`, and `token_ids` renumbered to index them."""
        raise NotImplementedError

    def stage_input(self) -> torch.Tensor:
        """Return the hidden states that the first layer of a pipeline stage is given, once they have arrived."""
        raise NotImplementedError

    def stage_output(self, hidden: torch.Tensor) -> None:
        """Take the hidden states that leave a pipeline stage, whose forward ends then."""
        raise NotImplementedError

    def update(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Remember the keys and values that a layer passes to the cache, until its attention call."""
        if self.updates:
            self.updates[-1].let_go()
        self.updates.append(CacheUpdate(layer, key, value))


def current_forward() -> ForwardCoroutine:
    """Return the coroutine in which the calling code runs.

    Raises:
        EngineError: Model code runs outside of a coroutine.
    """
    coroutine = greenlet.getcurrent()
    if not isinstance(coroutine, ForwardCoroutine):
        raise EngineError("model code with flexgen's hooks ran outside of a forward coroutine")
    return coroutine
