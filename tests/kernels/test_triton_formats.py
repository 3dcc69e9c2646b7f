"""Every format by Triton's kernels: what it hands over is decoded in one launch, to what a device without kernels decodes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.sources import read_bytes
from flexgen.devices.sim_tensor import register
from flexgen.formats.base import Encoding, NamedTensor
from flexgen.formats.gguf import blocks_of
from flexgen.formats.random_numbers import encoded_as, sampled_parts
from flexgen.formats.table import COMMON_CONFIGS
from flexgen.kernels.dequantize.reference import DequantizeKernels
from tests.formats.encoded import bitsandbytes
from tests.formats.from_config import stated
from tests.gguf_files import BLOCK_TYPES, random_blocks
from tests.kernels.test_dequantize import assert_same
from tests.kernels.triton_dequantize import arithmetic as arithmetic  # a fixture, and another one
from tests.kernels.triton_dequantize import kernels as kernels
from tests.kernels.triton_dequantize import numbers
from tests.kernels.triton_kernels import DEVICE, ON_GPU

pytestmark = ON_GPU


class OnHost(DequantizeKernels):
    """Triton's kernels for tensors of the simulated device: they are copied to where Triton runs, and what is written is copied back."""

    def __init__(self, kernels: DequantizeKernels) -> None:
        self.calls: list[str] = []
        for name in ("look_up", "flat", "rows", "gptq", "awq", "gguf_blocks", "ranges"):
            setattr(self, name, self._moved(name, getattr(kernels, name)))

    def _moved(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            *given, out = (_moved(each) for each in arguments)
            method(*given, out)
            arguments[-1].copy_(out.to(arguments[-1].device))
            self.calls.append(name)

        return call


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu().to(DEVICE)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{each.name: _moved(getattr(value, each.name)) for each in dataclasses.fields(value)})
    return value


METHODS = {
    "mxfp4": "look_up", "fp8_block_fp8": "look_up", "modelopt_fp4": "look_up", "modelopt_fp8": "look_up", "int4": "rows", "int8": "rows",
    "gptq_int4": "gptq", "gptq_int8": "gptq", "awq": "awq", "flexgen-v0": "ranges",
}  # fmt: skip
WEIGHT, EXPERTS = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.down_proj"
NESTED_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def check_format(kernels: DequantizeKernels, method: str, encoding: Encoding, parts: Sequence[Tensor], patch: pytest.MonkeyPatch) -> None:
    device, used, found = register(), OnHost(kernels), []
    for chosen in (DequantizeKernels(), used):
        for module in ("lookup", "integers", "gguf", "choice"):
            patch.setattr(f"flexgen.kernels.dequantize.{module}.dequantize_kernels", lambda device, chosen=chosen: chosen)
        out = encoding.laid_out(torch.full((math.prod(encoding.shape),), math.nan, dtype=torch.bfloat16).to(device))
        encoding.format.decode([part.to(device) for part in parts], 0, out)
        found.append(out.cpu())
    assert used.calls == [method]
    assert_same(found[1], found[0])
    assert not bool(found[0].isnan().any())


@pytest.mark.parametrize("name", COMMON_CONFIGS)
def test_formats(kernels: DequantizeKernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number_format = stated(dict(COMMON_CONFIGS[name]))
    tensor, shape = (EXPERTS, (2, 64, 96)) if name == "mxfp4" else (WEIGHT, (96, 256))
    encoding = encoded_as(number_format, NamedTensor(tensor, shape, torch.bfloat16))
    check_format(kernels, METHODS[name], encoding, sampled_parts(number_format, encoding), monkeypatch)


@pytest.mark.parametrize("shape", [(24, 128), (5, 33)])
def test_nf4_of_files(kernels: DequantizeKernels, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, wanted = bitsandbytes("nf4", nested=True)(WEIGHT, numbers(random.Random(0), *shape, wide=False))
    save_file(stored, tmp_path / "model.safetensors")
    encoding = Checkpoint(tmp_path).decoded(stated(NESTED_NF4), torch.bfloat16).tensors[WEIGHT].encoding
    assert encoding is not None
    assert encoding.shape == wanted.shape
    parts = [read_bytes(each.path, each.offset, each.nbytes).view(each.dtype) for each in encoding.ranges(0, shape[0])]
    check_format(kernels, "flat", encoding, parts, monkeypatch)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf(kernels: DequantizeKernels, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shape, data = random_blocks(kind, (3, 512))
    encoding = Encoding(blocks_of(kind), shape, ())
    check_format(kernels, "gguf_blocks", encoding, [torch.frombuffer(bytearray(data), dtype=torch.uint8)], monkeypatch)
