"""The coroutine in which a micro-batch's forward pass runs, as the model code meets it.

Hooks, attention and experts ask the coroutine they run in: "I need unit u", "attend with these q, k, v".
Knows nothing of schedules, rings or pages: subclasses (the sweep's, the tracer's) answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import greenlet

from flexgen.errors import EngineError

if TYPE_CHECKING:
    import torch

    from flexgen.models.attention import AttentionCall


class ForwardCoroutine(greenlet.greenlet):
    """A forward pass that can be suspended inside the model's own code."""

    def enter_module(self, name: str) -> None:
        """The module `name` is about to use its own parameters (asked by the tracer's hooks only)."""

    def enter_unit(self, unit: int) -> None:
        """Return once the weights of `unit` are bound; units are entered in rising order."""
        raise NotImplementedError

    def store_kv(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take the new keys and values (1, heads, tokens, dim) of attention layer `layer`."""
        raise NotImplementedError

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of the packed queries; returns (1, tokens, heads, value_dim)."""
        raise NotImplementedError

    def input_rows(self, module_name: str, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n, dim) of the embedding `module_name`, and `token_ids` renumbered to index them."""
        raise NotImplementedError


def current_forward() -> ForwardCoroutine:
    """The coroutine that runs the calling code.

    Raises:
        EngineError: when model code runs outside of a coroutine.
    """
    coroutine = greenlet.getcurrent()
    if not isinstance(coroutine, ForwardCoroutine):
        raise EngineError("model code with flexgen's hooks ran outside of a forward coroutine")
    return coroutine
