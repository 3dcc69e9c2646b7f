"""Sinks in host memory: they never change, so they cross the link once per layer and run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.passes.calls import AttentionCall


class HostSinks:
    """The host's copies of the sinks of each layer.

    The thread that computes asks which ones are missing; the worker, which runs the jobs in the same order, keeps those that arrive.
    """

    def __init__(self) -> None:
        self._sent: dict[int, torch.Tensor] = {}  # layer -> sinks on the device
        self._copies: dict[int, torch.Tensor] = {}

    def missing(self, call: AttentionCall) -> Sequence[torch.Tensor]:
        """Return the sinks of a call if the host does not have them."""
        if call.sinks is None or self._sent.get(call.layer) is call.sinks:
            return ()
        self._sent[call.layer] = call.sinks
        return (call.sinks,)

    def of(self, call: AttentionCall, arrived: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the sinks of a call in host memory; `arrived` are copies of what was missing."""
        if call.sinks is None:
            return None
        if arrived:
            self._copies[call.layer] = arrived[0].clone()
        return self._copies[call.layer]
