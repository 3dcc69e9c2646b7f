"""The FlexGen paper's format: found in headers, decoded by any range of rows, refused where it is something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen.checkpoint.repository import headers_of, sharded
from flexgen.errors import UnsupportedModelError
from flexgen.formats.base import NamedTensor
from flexgen.formats.flexgen_v0 import FlexGenV0
from flexgen.formats.table import stated_format
from flexgen.kernels.threads import KernelThreads
from flexgen.quantize.rounding import round_as_the_paper
from tests.models.tiny_configs import tiny_config

STATED = {"quant_method": "flexgen-v0", "bits": 4, "group_size": 64, "ignore": ["lm_head"]}
ROWS, COLUMNS = 150, 7


def matrix() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges of a matrix, and its decoded numbers, computed one by one."""
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weights[64:128, 3] = 0.5  # a group of equal weights
    codes, ranges = round_as_the_paper(weights)
    decoded = torch.empty(ROWS, COLUMNS)
    for row in range(ROWS):
        byte = codes[row // 2]
        code = (byte >> 4 if row % 2 == 0 else byte & 15).float()
        decoded[row] = code / ranges[row // 64, 0].float() + ranges[row // 64, 1].float()
    assert (decoded - weights).abs().max() < 0.25
    return codes, ranges, decoded


def test_any_rows_are_decoded_from_what_is_read_for_them() -> None:
    codes, ranges, decoded = matrix()
    headers = headers_of("x", sharded(FlexGenV0().encode(NamedTensor("a.weight", (ROWS, COLUMNS), torch.bfloat16)), 10**9))
    (encoding,) = FlexGenV0().find(headers.tensors).values()
    assert encoding.shape == (ROWS, COLUMNS)
    stored = [tensor.reshape(-1).view(torch.uint8) for tensor in (codes.contiguous(), ranges.contiguous())]
    offsets = [part.tensor.offset for part in encoding.parts]
    with KernelThreads(3) as threads:
        for start in range(ROWS):
            for stop in {start + 1, min(start + 5, ROWS), min(start + 70, ROWS), ROWS}:
                read = [
                    whole[each.offset - offset : each.offset - offset + each.nbytes].clone().view(each.dtype)
                    for whole, offset, each in zip(stored, offsets, encoding.ranges(start, stop), strict=True)
                ]
                out = torch.full((stop - start, COLUMNS), float("nan"))
                FlexGenV0().decode(read, start, out, threads.over)
                assert torch.equal(out, decoded[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoded_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    codes, ranges, decoded = matrix()
    out = torch.empty(ROWS, COLUMNS, dtype=dtype)
    FlexGenV0().decode([codes.reshape(-1), ranges.reshape(-1)], 0, out)
    assert torch.equal(out, decoded.to(dtype))


def test_the_config_states_the_format_and_what_is_not_in_it() -> None:
    config: Any = tiny_config("llama")
    config.quantization_config = STATED
    number_format = stated_format(config)
    assert isinstance(number_format, FlexGenV0)
    kept = NamedTensor("lm_head.weight", (128, 64), torch.bfloat16)
    assert number_format.encode(kept) == [kept]
    assert len(number_format.encode(NamedTensor("a.weight", (128, 64), torch.bfloat16))) == 2
    config.quantization_config = STATED | {"group_size": 32}
    with pytest.raises(UnsupportedModelError, match="group_size must be 64 in flexgen-v0, not 32"):
        stated_format(config)
