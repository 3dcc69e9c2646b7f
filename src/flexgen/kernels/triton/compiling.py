"""Compiles kernels before they are needed: calls on tensors without memory say which, and threads compile several at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import triton

from flexgen.base.steps import step

logger = logging.getLogger(__name__)

STEP = "compiling kernels (kept by Triton)"
TELL_SECONDS = 2.0


def compile_ahead(calls: Iterable[Callable[[], None]], num_threads: int) -> int:
    """Compile the kernels that calls launch with tensors without memory, for the current CUDA device, and load them there.

    Programs that are in Triton's cache are only loaded.

    Args:
        calls: The calls; they are made on the thread that asks for this.
        num_threads: The number of threads that compile.

    Returns:
        The number of programs.
    """
    step(STEP)
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="flexgen-compile") as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True) as mode,  # what a thread raises is raised below
    ):
        try:
            for call in calls:
                call()
            _tell(mode.raw_futures)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    launchers = [each.result().run for each in mode.future_kernels.values()]  # asking for it loads the program
    logger.debug("%d programs of Triton are loaded", len(launchers))
    return len(launchers)


def _tell(futures: list[Future[Any]]) -> None:
    """Wait for all futures, and say now and then how many are done."""
    due = time.monotonic() + TELL_SECONDS
    for count, _ in enumerate(as_completed(futures), 1):
        if time.monotonic() >= due:
            step(f"{STEP}: {count} of {len(futures)}")
            due = time.monotonic() + TELL_SECONDS
