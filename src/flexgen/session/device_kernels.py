"""Compiles what Triton computes of a model before anything is planned: its memory belongs to the process, and its time to loading."""

from __future__ import annotations

import os
from functools import partial

import torch

from flexgen.errors import OptionError
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.experts import grouped_kernels
from flexgen.kernels.philox import exponential_rows_on
from flexgen.kernels.triton_support import why_not_triton
from flexgen.kv.pages import group_layers
from flexgen.kv.warming import attend_without_memory
from flexgen.models.assemble import AssembledModel
from flexgen.models.warming import decode_without_memory, multiply_without_memory
from flexgen.plan.policy import PAGE_TOKENS

MOST_THREADS = 16  # more programs than that are seldom missing, and each thread that compiles takes some memory


def compile_kernels(model: AssembledModel, device: torch.device) -> None:
    """Compile each program that a pass may launch on a CUDA device, where Triton compiles for it, and load it there.

    Raises:
        OptionError: A program cannot be compiled on this machine.
    """
    if why_not_triton(device):
        return
    from flexgen.kernels.triton.compiling import compile_ahead
    from flexgen.kernels.triton.experts import MEAN_ROWS

    groups = group_layers(model.layers, PAGE_TOKENS, model.kv_format)
    calls = [
        partial(attend_without_memory, groups, attention_kernels(device, 1), model.calls),
        partial(decode_without_memory, model),
        partial(_draw_without_memory, device, model.spec.vocab_size),
    ]
    if (grouped := grouped_kernels(device)) is not None:
        calls.append(partial(multiply_without_memory, model, grouped, MEAN_ROWS))
    try:
        compile_ahead(calls, min(len(os.sched_getaffinity(0)), MOST_THREADS))
    except Exception as error:
        raise OptionError(
            f"device='cuda': Triton cannot compile a kernel on this machine ({error}); without Triton torch's own operations compute"
        ) from error


def _draw_without_memory(device: torch.device, vocab_size: int) -> None:
    numbers = torch.empty(1, 1, dtype=torch.int64, device="meta")
    exponential_rows_on(device)(numbers, numbers, vocab_size)
