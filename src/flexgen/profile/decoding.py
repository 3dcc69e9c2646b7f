"""Measures how fast the host decodes number formats, from random stored numbers; only those that a model needs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Sequence

import torch

from flexgen.base.steps import step
from flexgen.errors import EngineError, UnsupportedModelError
from flexgen.formats.base import Encoding, NumberFormat
from flexgen.formats.random_numbers import encoded_as, sampled_parts
from flexgen.formats.table import FORMATS
from flexgen.kernels.threads import KernelThreads
from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import Machine, Rate
from flexgen.profile.timing import measured_rate

logger = logging.getLogger(__name__)

FORMAT_SECONDS = 0.4  # how long a format is measured


def with_formats(machine: Machine, dtype: str, formats: Iterable[str], max_bytes: int) -> Machine:
    """Return the machine with the rates of decoding number formats, those that are missing measured now.

    Args:
        machine: The machine.
        dtype: The dtype of computing.
        formats: The names of the formats; dtypes, and formats that do not run or cannot be sampled, are left out.
        max_bytes: The most memory of all buffers at the same time.
    """
    wanted = [FORMATS[name] for name in formats if name in FORMATS and name not in DTYPE_BYTES and f"{name} {dtype}" not in machine.casts]
    missing = [encoding for each in wanted if each.runs and (encoding := _example(each, max_bytes // 16)) is not None]
    if not missing:
        return machine
    step(f"measuring how fast {', '.join(each.format.name for each in missing)} is decoded")
    computed = getattr(torch, dtype)
    with torch.inference_mode(), contextlib.closing(KernelThreads(machine.cores)) as threads:
        rates = {f"{each.format.name} {dtype}": _rate(each, computed, threads) for each in missing}
    return dataclasses.replace(machine, casts=machine.casts | rates)


def _example(number_format: NumberFormat, num_elements: int) -> Encoding | None:
    """Return how a matrix is stored in this format; None, so that its rate is estimated, if it cannot be made of random numbers."""
    try:
        encoding = encoded_as(number_format, number_format.example(num_elements))
        sampled_parts(encoded_as(number_format, number_format.example(1)))
    except (EngineError, UnsupportedModelError) as error:
        logger.debug("%s is not measured: %s", number_format.name, error)
        return None
    return encoding


def _rate(encoding: Encoding, dtype: torch.dtype, threads: KernelThreads) -> Rate:
    """Measure the bytes per second of decoded numbers."""
    parts: Sequence[torch.Tensor] = sampled_parts(encoding)
    out = torch.empty(encoding.shape, dtype=dtype)
    return measured_rate(out.nbytes, lambda: encoding.format.decode(parts, 0, out, threads.over), FORMAT_SECONDS)
