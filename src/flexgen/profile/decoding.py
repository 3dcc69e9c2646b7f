"""Measures how fast the host and a device decode number formats, from random stored numbers; only those that a model needs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable

import torch

from flexgen.base.steps import step
from flexgen.errors import EngineError, UnsupportedModelError
from flexgen.formats.base import Encoding, NumberFormat
from flexgen.formats.random_numbers import encoded_as, sampled_parts
from flexgen.formats.table import COMMON_CONFIGS, stated_format
from flexgen.kernels.threads import KernelThreads
from flexgen.plan.machine import Machine, Rate, rounded_from
from flexgen.profile.compute import queued
from flexgen.profile.timing import measured_rate

logger = logging.getLogger(__name__)

FORMAT_SECONDS = 0.4  # how long a format is measured


def with_formats(machine: Machine, dtype: str, formats: Iterable[str], max_bytes: int) -> Machine:
    """Return the machine with the rates of decoding number formats, those that are missing measured now.

    Args:
        machine: The machine.
        dtype: The dtype of computing.
        formats: The names of the formats of encodings, as in ModelSpec.decoded_from; those without a common config stay unknown, so that
            their rates are estimated.
        max_bytes: The most memory of all buffers at the same time.
    """
    names = [name for name in dict.fromkeys(rounded_from(each) or each for each in formats) if name in COMMON_CONFIGS]
    computed = getattr(torch, dtype)
    on_host = [name for name in names if f"{name} {dtype}" not in machine.casts]
    on_device = [name for name in names if machine.device == "cuda" and f"{name} {dtype}" not in machine.device_casts]
    if on_host:
        step(f"measuring how fast {', '.join(on_host)} is decoded")
    with torch.inference_mode(), contextlib.closing(KernelThreads(machine.cores)) as threads:
        casts = _rates(on_host, dtype, max_bytes, lambda number_format, encoding: _rate(number_format, encoding, computed, threads))
        cuda = torch.device("cuda")
        there = _rates(on_device, dtype, max_bytes, lambda number_format, encoding: device_rate(number_format, encoding, computed, cuda))
    if not casts and not there:
        return machine
    return dataclasses.replace(machine, casts=machine.casts | casts, device_casts=machine.device_casts | there)


def _rates(names: Iterable[str], dtype: str, max_bytes: int, measure: Callable[[NumberFormat, Encoding], Rate | None]) -> dict[str, Rate]:
    """Return the rates of those formats that run, by the names of casts."""
    rates: dict[str, Rate] = {}
    for name in names:
        with contextlib.suppress(EngineError, UnsupportedModelError):  # what does not run has no rate
            if (rate := measure(*example(name, max_bytes // 16))) is not None:
                rates[f"{name} {dtype}"] = rate
    return rates


def example(name: str, num_elements: int) -> tuple[NumberFormat, Encoding]:
    """Return a format, and how it stores a matrix of about so many numbers.

    Raises:
        UnsupportedModelError: The example's config is not supported.
        EngineError: The format does not encode its own example.
    """
    number_format = stated_format({"quantization_config": COMMON_CONFIGS[name]})
    if number_format is None:
        raise EngineError(f"the example of {name} states no format")
    return number_format, encoded_as(number_format, number_format.example(num_elements))


def _rate(number_format: NumberFormat, encoding: Encoding, dtype: torch.dtype, threads: KernelThreads) -> Rate:
    """Measure the bytes per second of decoded numbers."""
    parts = sampled_parts(number_format, encoding)
    out = encoding.laid_out(torch.empty(math.prod(encoding.shape), dtype=dtype))
    return measured_rate(out.nbytes, lambda: encoding.format.decode(parts, 0, out, threads.over), FORMAT_SECONDS)


def device_rate(number_format: NumberFormat, encoding: Encoding, dtype: torch.dtype, where: torch.device) -> Rate | None:
    """Measure the bytes per second of numbers that a device decodes; None for a format that the host decodes for it."""
    if not encoding.format.carried_as_stored:
        return None
    parts = [part.to(where) for part in sampled_parts(number_format, encoding)]
    out = encoding.laid_out(torch.empty(math.prod(encoding.shape), dtype=dtype, device=where))

    def decode() -> torch.Tensor:
        encoding.format.decode(parts, 0, out)
        return out

    run, calls = queued(decode, where)
    return measured_rate(calls * out.nbytes, run, FORMAT_SECONDS)
