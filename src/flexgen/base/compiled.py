"""Compiling a function that Python calls: without the GIL, and kept on disk where a folder for it can be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba.extending
from numba import njit

logger = logging.getLogger(__name__)

_KERNELS = Path(__file__).parent.parent / "kernels"  # what compiled functions of other folders call, too


def entry(function: Callable[..., Any]) -> Any:
    """Compile `function` for each kind of arguments at its first call, or load what an earlier process compiled."""
    try:
        dispatcher: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # Numba found no folder that it may write to
        logger.info("%s cannot be kept on disk and will be compiled in every process", function.__name__)
        return njit(nogil=True, error_model="numpy")(function)
    _forget_outdated(Path(dispatcher.stats.cache_path), Path(function.__code__.co_filename))
    _keep_if_possible(dispatcher)
    return dispatcher


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make an intrinsic of a function that writes LLVM code.

    Compiled functions call it without its first argument, the typing context.
    """
    return numba.extending.intrinsic(function)


def _keep_if_possible(dispatcher: Any) -> None:
    """Let what is compiled be used where the disk does not take it; Numba makes that an error of the first call."""
    save = dispatcher._cache.save_overload

    def saved(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            logger.info("%s is compiled but cannot be kept on disk: %s", dispatcher.__name__, error)

    dispatcher._cache.save_overload = saved


def _forget_outdated(cache: Path, file: Path) -> None:
    """Remove what was compiled before a file beside `file` or a kernel changed; Numba itself looks at the function's own file only."""
    sources = (*file.parent.glob("*.py"), *_KERNELS.rglob("*.py"))
    newest = max(source.stat().st_mtime for source in sources)
    for compiled in cache.glob(f"{file.stem}.*.nb[ic]"):
        with suppress(FileNotFoundError):  # another process was faster
            if compiled.stat().st_mtime < newest:
                compiled.unlink()
