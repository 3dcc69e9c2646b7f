"""The blocks of GGUF files.  Each tensor has a type of its own, a row is a run of blocks, and a block holds all that its numbers need.

The layouts are those of ggml (ggml-common.h), the arithmetic is that of the package gguf, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexgen.base.parallel import Parallel, serially
from flexgen.errors import EngineError
from flexgen.formats.base import NumberFormat
from flexgen.hub.gguf_file import BY_NAME, GGMLType

if TYPE_CHECKING:
    import torch

_PLAIN = ("F32", "F16", "BF16")


class GGUF(NumberFormat):
    """A model in GGUF, whose files state the type of each tensor."""

    name = "gguf"
    runs = True


class GGUFBlocks(NumberFormat):
    """Tensors of one type of blocks.

    Args:
        kind: The type.
    """

    name = "gguf"
    runs = True
    carried_as_stored = True

    def __init__(self, kind: GGMLType) -> None:
        self.kind = kind

    def decode(self, parts: Sequence[torch.Tensor], start: int, out: torch.Tensor, parallel: Parallel = serially) -> None:
        from flexgen.kernels.dequantize.gguf import decode_blocks

        (raw,) = parts
        num_blocks, rest = divmod(raw.numel(), self.kind.block_bytes)
        if rest or num_blocks * self.kind.block != out.numel():
            raise EngineError(f"{raw.numel()} bytes are not {out.numel()} numbers of {self.kind.name}")
        decode_blocks(self.kind.name, raw, out, parallel)


_BLOCKS = {name: GGUFBlocks(kind) for name, kind in BY_NAME.items() if name not in _PLAIN}


def blocks_of(name: str) -> GGUFBlocks:
    """Return the format of a type of blocks."""
    return _BLOCKS[name]
