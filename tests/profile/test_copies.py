"""The rates of the links to a device and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.base.quantities import MIB
from flexgen.profile import copies
from flexgen.profile.copies import copy_rates
from tests.devices.fake_cudart import FakeRuntime


@pytest.mark.parametrize("limit", [1 << 40, 0], ids=["pinned", "cannot be pinned"])
def test_links_are_measured_from_memory_as_the_engine_has_it(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned for as long as it is measured; where that fails, the rates are those of ordinary memory."""
    runtime, really = FakeRuntime(limit), torch.empty
    monkeypatch.setattr(copies, "cuda_runtime", lambda: runtime)

    def on_the_host(*args: Any, device: str = "cpu", **how: Any) -> torch.Tensor:
        return really(*args, **how)

    monkeypatch.setattr(torch, "empty", on_the_host)
    rates = copy_rates("cuda", 4 * MIB, 0.01)
    assert all(rate is not None and rate.typical > 0 for rate in rates)
    assert runtime.num_registered == (limit > 0)
    assert not runtime.registered
    assert runtime.last_error == 0
