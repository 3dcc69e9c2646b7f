"""The blocks of GGUF: decoded bit for bit as gguf's own NumPy code does, by compiled loops and by torch, to every dtype of computing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf_files import BLOCK_TYPES, SIZES, random_blocks

from flexgen.base.parallel import serially
from flexgen.errors import EngineError
from flexgen.formats.gguf import blocks_of
from flexgen.kernels.dequantize import gguf as compiled
from flexgen.kernels.dequantize import gguf_torch as by_torch

ROWS, COLUMNS = 150, 512  # enough numbers for several threads
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random_blocks(kind, shape, seed)[2]), dtype=torch.uint8)


def in_slices(function: Callable[[int, int], None], count: int) -> None:
    """The ranges of several threads, the last first."""
    for begin in reversed(range(0, count, 77)):
        function(begin, min(begin + 77, count))


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_bit_for_bit_like_gguf(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = raw_of(kind, (ROWS, COLUMNS))
    wanted = gguf.quants.dequantize(raw.numpy().reshape(ROWS, -1), gguf.GGMLQuantizationType[kind])
    for decode in (compiled.decode_blocks, by_torch.decode_blocks):
        out = torch.full((ROWS, COLUMNS), torch.nan)
        decode(kind, raw, out, in_slices)
        assert np.array_equal(out.numpy().view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_compiled_loops_and_torch_agree(kind: str) -> None:
    """Both round once, to nearest even."""
    raw = raw_of(kind, (ROWS, COLUMNS), seed=1)
    exact = torch.empty(ROWS, COLUMNS)
    by_torch.decode_blocks(kind, raw, exact)
    assert exact.std() > 0
    for dtype in DTYPES:
        out = torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype)
        compiled.decode_blocks(kind, raw, out, in_slices)
        assert torch.equal(as_bits(out), as_bits(exact.to(dtype)))


def test_other_dtypes_are_written_through_float32() -> None:
    raw = raw_of("Q4_K", (2, 256))
    exact, out = torch.empty(2, 256), torch.empty(2, 256, dtype=torch.float64)
    compiled.decode_blocks("Q4_K", raw, exact, serially)
    compiled.decode_blocks("Q4_K", raw, out, serially)
    assert torch.equal(out, exact.double())


def test_every_scale_of_mxfp4() -> None:
    """Exponents 0 and 1 give subnormal numbers."""
    gguf = pytest.importorskip("gguf")
    blocks = np.random.default_rng(2).integers(0, 256, (256, 17), dtype=np.uint8)
    blocks[:, 0] = np.arange(256)
    with np.errstate(over="ignore"):
        wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    for decode in (compiled.decode_blocks, by_torch.decode_blocks):
        out = torch.empty(256, 32)
        decode("MXFP4", torch.from_numpy(blocks.copy()).view(-1), out, serially)
        assert np.array_equal(out.numpy().view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_a_format_decodes_whole_blocks_only(kind: str) -> None:
    raw, block = raw_of(kind, (3, 256)), SIZES[kind][0]
    out = torch.empty(3, 256)
    blocks_of(kind).decode([raw], 0, out)
    exact = torch.empty(3, 256)
    by_torch.decode_blocks(kind, raw, exact)
    assert torch.equal(out, exact)
    with pytest.raises(EngineError, match=kind):
        blocks_of(kind).decode([raw[:-1]], 0, out)
    with pytest.raises(EngineError, match=kind):
        blocks_of(kind).decode([raw], 0, torch.empty(block))


def test_unknown_blocks() -> None:
    for decode in (compiled.decode_blocks, by_torch.decode_blocks):
        with pytest.raises(EngineError, match=r"IQ4_XS.*Q4_K"):
            decode("IQ4_XS", torch.empty(0, dtype=torch.uint8), torch.empty(0), serially)
