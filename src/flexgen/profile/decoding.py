"""Measures how fast the host decodes number formats, from random stored numbers; only those that a model needs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable

import torch

from flexgen.base.steps import step
from flexgen.errors import EngineError, UnsupportedModelError
from flexgen.formats.base import Encoding, NumberFormat
from flexgen.formats.random_numbers import encoded_as, sampled_parts
from flexgen.formats.table import COMMON_CONFIGS, stated_format
from flexgen.kernels.threads import KernelThreads
from flexgen.plan.machine import Machine, Rate, rounded_from
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
    decoded = dict.fromkeys(rounded_from(name) or name for name in formats)
    wanted = [name for name in decoded if name in COMMON_CONFIGS and f"{name} {dtype}" not in machine.casts]
    if not wanted:
        return machine
    step(f"measuring how fast {', '.join(wanted)} is decoded")
    computed, rates = getattr(torch, dtype), dict[str, Rate]()
    with torch.inference_mode(), contextlib.closing(KernelThreads(machine.cores)) as threads:
        for name in wanted:
            with contextlib.suppress(EngineError, UnsupportedModelError):  # what does not run has no rate
                rates[f"{name} {dtype}"] = _rate(*example(name, max_bytes // 16), computed, threads)
    return dataclasses.replace(machine, casts=machine.casts | rates) if rates else machine


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
