"""What launchers share: finding a peer's packages, saying why it cannot be run, and printing its figures."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_HERE = 3  # the exit code of a launcher whose peer is missing
CONTEXT_BYTES = 512 << 20  # what CUDA takes beside tensors, see docs/cuda.md


def launch(
    needs: Mapping[str, str],
    options: Callable[[argparse.ArgumentParser], object],
    run: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a peer, and return the exit code.

    Args:
        needs: The modules that have to be there, and the name of the package that brings each.
        options: A function that adds the launcher's options to a parser.
        run: A function that runs the peer and returns its figures.
        arguments: The command line; None for that of the process.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--packages", type=Path, help="a folder with packages, which count before those that are installed")
    first.add_argument("--check", action="store_true", help="only say why the peer cannot be run, if it cannot")
    here, rest = first.parse_known_args(arguments)
    if here.packages is not None:
        sys.path.insert(0, str(here.packages.resolve()))
    if why := missing(needs):
        print(why)
        return NOT_HERE
    if here.check:
        return 0
    parser = argparse.ArgumentParser(parents=[first], allow_abbrev=False)
    options(parser)
    asked = parser.parse_args(rest)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # processes that the peer starts print there, too
    try:
        figures = run(asked)
    except BaseException:  # noqa: BLE001 - threads of the peer may still run, and would keep the process
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    results.write(json.dumps(figures, indent=2) + "\n")
    results.flush()
    return 0


def missing(needs: Mapping[str, str]) -> str:
    """Return which modules cannot be found; empty if all can."""
    absent = [f"{module} ({package})" for module, package in needs.items() if not _is_there(module)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package above it
        return False


def figures_of(
    peer: str,
    *,
    version: str | None = None,
    sequences: int,
    output_tokens: int,
    prefill_seconds: float,
    decode_seconds: float,
    timed_tokens: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the figures of a peer in the form that all of them have.

    Args:
        peer: The name of its package, or its own.
        version: Its version; None for that of the package.
        sequences: The sequences that were answered together.
        output_tokens: The tokens of each answer.
        prefill_seconds: The time of the prompts, with the first token of each answer.
        decode_seconds: The time of the other tokens, of all of them also where fewer were timed.
        timed_tokens: The tokens of each answer that were timed; None for all.
        more: What else there is to say of it.
    """
    return {
        "peer": peer, "version": version or version_of(peer),
        "output_tokens_per_s": sequences * output_tokens / (prefill_seconds + decode_seconds),
        "sequences": sequences, "output_tokens": output_tokens, "timed_tokens": timed_tokens or output_tokens,
        "prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds, **more,
    }  # fmt: skip


def version_of(package: str) -> str | None:
    """Return the version of a package; None for one that says nothing of itself."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def limit_device(device_bytes: int) -> None:
    """Let torch take no more of the first GPU than so many bytes, less what CUDA itself takes."""
    import torch

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min((device_bytes - CONTEXT_BYTES) / total, 1.0))


def peak_device_bytes() -> int:
    """Return the most bytes that torch has held on the first GPU."""
    import torch

    return torch.cuda.max_memory_reserved()
