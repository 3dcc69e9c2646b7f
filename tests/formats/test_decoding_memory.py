"""What a device needs beside the numbers while it decodes: no more than the planner reserves, whatever the format."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen.devices.sim_tensor import register
from flexgen.formats.gguf import blocks_of
from flexgen.formats.random_numbers import sampled_parts
from flexgen.formats.table import COMMON_CONFIGS
from flexgen.plan.policy import DECODED_AT_ONCE, DECODING_BYTES
from flexgen.profile.decoding import example
from tests.gguf_files import BLOCK_TYPES, random_blocks

ROWS, COLUMNS = 3 * DECODED_AT_ONCE // 2 // 2048, 2048


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(each, torch.Tensor)]
        if not func.is_view and not any(result.alias_info is not None for result in func._schema.returns):
            for tensor in made:
                self.live += tensor.nbytes
                weakref.finalize(tensor, self._freed, tensor.nbytes)
            self.most = max(self.most, self.live)
        return out

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


@pytest.mark.parametrize("name", COMMON_CONFIGS)
def test_formats(name: str) -> None:
    device = register()
    number_format, encoding = example(name, ROWS * COLUMNS)
    parts = [part.to(device) for part in sampled_parts(number_format, encoding)]
    out = encoding.laid_out(torch.empty(math.prod(encoding.shape)).to(device))
    assert out.numel() > DECODED_AT_ONCE
    with Allocated() as allocated:
        encoding.format.decode(parts, 0, out)
    assert DECODED_AT_ONCE <= allocated.most <= DECODING_BYTES * DECODED_AT_ONCE


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_of_gguf(kind: str) -> None:
    device = register()
    raw = torch.frombuffer(bytearray(random_blocks(kind, (ROWS, COLUMNS))[2]), dtype=torch.uint8).to(device)
    out = torch.empty(ROWS, COLUMNS).to(device)
    with Allocated() as allocated:
        blocks_of(kind).decode([raw], 0, out)
    assert DECODED_AT_ONCE <= allocated.most <= DECODING_BYTES * DECODED_AT_ONCE
