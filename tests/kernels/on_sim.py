"""Triton's kernels on the simulated device, in Triton's interpreter, and the programs that a CUDA device would need for their launches.

Tensors are those that hold the device's numbers, without copies, so that addresses and strides are those that a launch would meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from flexgen.devices.sim_tensor import SimTensor
from flexgen.kernels.dequantize import tables
from flexgen.kernels.dequantize.reference import DequantizeKernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.triton.dequantize import TritonDequantizeKernels
from flexgen.kernels.triton.experts import TritonGroupedKernels
from flexgen.kernels.triton.random_numbers import exponential_rows
from flexgen.kernels.triton.sealed_kernels import TritonKernels
from tests.kernels.triton_kernels import METHODS

if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles for a device here", allow_module_level=True)

DECODING = ("look_up", "flat", "rows", "gptq", "awq", "gguf_blocks", "ranges")
TABLES = (tables.E2M1, tables.e4m3())
HOST = torch.device("cpu")


def raw(value: Any) -> Any:
    """A value with the host tensors that hold the device's numbers; known tables are known ones there."""
    if isinstance(value, SimTensor):
        known = next((each for each in TABLES if value is tables.on_device(each, value.device)), None)
        return value.raw if known is None else tables.on_device(known, HOST)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{each.name: raw(getattr(value, each.name)) for each in dataclasses.fields(value)})
    return value


def on_raw(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method for tensors of the device; what it returns is on the device if what it was given is."""

    def call(*given: Any, **how: Any) -> Any:
        found = method(*map(raw, given), **{name: raw(each) for name, each in how.items()})
        there = any(isinstance(each, SimTensor) for each in (*given, *how.values()))
        return SimTensor(found) if there and isinstance(found, Tensor) else found

    return call


class SimAttention(TritonKernels):
    """Attention; what has no kernel in Triton is computed by torch's operations on the device."""

    def __init__(self) -> None:
        super().__init__()
        inner = TritonKernels()
        for name in METHODS:
            setattr(self, name, on_raw(getattr(inner, name)))


class SimDecoding(DequantizeKernels):
    def __init__(self) -> None:
        inner = TritonDequantizeKernels()
        for name in DECODING:
            setattr(self, name, on_raw(getattr(inner, name)))


class SimExperts(TritonGroupedKernels):
    def __init__(self) -> None:
        inner = TritonGroupedKernels()
        self.product, self.add = on_raw(inner.product), on_raw(inner.add)  # type: ignore[method-assign]


draw = on_raw(exponential_rows)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in Triton on the simulated device, and compile there for tensors without memory."""
    from flexgen.kernels.attention import attention_kernels

    def attention(device: torch.device, num_threads: int) -> AttentionKernels:
        return SimAttention() if device.type == "sim" else attention_kernels(device, num_threads)

    monkeypatch.setattr("flexgen.kv.open.attention_kernels", attention)
    for module in ("models.experts", "weights.opened"):
        monkeypatch.setattr(f"flexgen.{module}.grouped_kernels", lambda device: SimExperts() if device.type == "sim" else None)
    monkeypatch.setattr("flexgen.engine.device_rows.exponential_rows_on", lambda device: draw)
    decoding = SimDecoding()
    for module in ("lookup", "integers", "gguf", "choice"):
        monkeypatch.setattr(f"flexgen.kernels.dequantize.{module}.dequantize_kernels", lambda device: decoding)


Program = tuple[str, str, str]  # its kernel, the types and properties of its arguments, and its options


class Programs:
    """Records which programs are compiled, and which are launched.

    Attributes:
        compiled: Those of launches with tensors without memory.
        launched: Those of other launches.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled: set[Program] = set()
        self.launched: set[Program] = set()
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Callable[..., Any]] = {}
        run = InterpretedFunction.run

        def recording(kernel: Any, *args: Any, grid: Any, warmup: bool, **how: Any) -> Any:
            (self.compiled if warmup else self.launched).add(self._program(kernel, args, how))
            return run(kernel, *args, grid=grid, warmup=warmup, **how)

        monkeypatch.setattr(InterpretedFunction, "run", recording)

    def _program(self, kernel: Any, args: Any, how: Any) -> Program:
        if kernel.fn not in self._binders:
            jit = JITFunction(kernel.fn, **kernel.kwargs)
            self._binders[kernel.fn] = create_function_from_signature(jit.signature, jit.params, self._backend)
        _, specialization, options = self._binders[kernel.fn](*args, **how)
        return kernel.fn.__name__, str(specialization), str(sorted(options.items()))
