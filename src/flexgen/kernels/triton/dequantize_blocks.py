"""How the decoding of GGUF's blocks is launched: the layouts of all types, for one program."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from flexgen.base.quantities import power_of_two
from flexgen.hub.gguf_file import BY_NAME
from flexgen.kernels.triton.grids import on_grid
from flexgen.kernels.triton.programs.dequantize_blocks import decode_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where the parts of a block are, in bytes from its beginning (ggml-common.h).

    Attributes:
        low: The lowest bits of the codes.
        low_bits: Their number.
        low_run: The bytes whose lowest bits are those of as many numbers, before the bits above are those of the next.
        high: The bits of the codes above these.
        high_bits: Their number; 0 if there are none.
        high_run: As low_run.
        numbers: What codes stand for: "unsigned" or "signed" integers, or "e2m1" for twice the numbers of E2M1.
        less: What is subtracted from them.
        groups: The groups of numbers that have a scale of their own.
        scales: How these are stored beside that of the block; "block" if they are not, and "power" for an exponent in the first byte.
        scale: The scale of the block, a float16; -1 if there is none.
        least: The offset of the block, a float16; -1 if there is none.
        added: Whether the offset is added; otherwise it is subtracted.
    """

    low: int
    low_bits: int = 4
    low_run: int = 16
    high: int = 0
    high_bits: int = 0
    high_run: int = 1
    numbers: str = "unsigned"
    less: int = 0
    groups: int = 1
    scales: str = "block"
    scale: int = 0
    least: int = -1
    added: bool = False

    def constants(self) -> dict[str, Any]:
        """Return the arguments of the program."""
        return {name.upper(): value for name, value in asdict(self).items()}


LAYOUTS = {
    "Q4_0": BlockLayout(low=2, less=8),
    "Q4_1": BlockLayout(low=4, least=2, added=True),
    "Q5_0": BlockLayout(low=6, high=2, high_bits=1, less=16),
    "Q5_1": BlockLayout(low=8, high=4, high_bits=1, least=2, added=True),
    "Q8_0": BlockLayout(low=2, low_bits=8, low_run=32, numbers="signed"),
    "MXFP4": BlockLayout(low=1, numbers="e2m1", scales="power", scale=-1),
    "Q2_K": BlockLayout(low=16, low_bits=2, low_run=32, groups=16, scales="nibbles", scale=80, least=82),
    "Q3_K": BlockLayout(low=32, low_bits=2, low_run=32, high_bits=1, high_run=32, less=4, groups=16, scales="six bits", scale=108),
    "Q4_K": BlockLayout(low=16, low_run=32, groups=8, scales="split", least=2),
    "Q5_K": BlockLayout(low=48, low_run=32, high=16, high_bits=1, high_run=32, groups=8, scales="split", least=2),
    "Q6_K": BlockLayout(low=0, low_run=64, high=128, high_bits=2, high_run=32, less=32, groups=16, scales="bytes", scale=208),
}


def run_blocks(name: str, raw: Tensor, out: Tensor, tile: int, options: dict[str, Any]) -> bool:
    """Launch the decoding of blocks of a type, programs of `tile` numbers; return whether there is a layout of it."""
    if name not in LAYOUTS:
        return False
    block, block_bytes = BY_NAME[name].block, BY_NAME[name].block_bytes
    num_blocks = raw.numel() // block_bytes
    if not num_blocks:
        return True
    blocks = min(power_of_two(num_blocks), tile // block)
    on_grid(decode_blocks, (-(-num_blocks // blocks),), out.device)(
        raw, out, num_blocks, BLOCK=block, BLOCK_BYTES=block_bytes, BLOCKS=blocks, **LAYOUTS[name].constants(), **options
    )
    return True
