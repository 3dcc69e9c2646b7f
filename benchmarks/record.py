"""Results as JSON lines: one measurement a line, with what is needed to read it years later.  Knows no system."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = ("system", "shape", "memory_bytes", "num_requests", "tokens", "role", "setting")
DEFAULT_TOKENS = (256, 32)  # of prompts and answers, where a line does not say
PACKAGES = ("flexgen-engine", "torch", "transformers", "accelerate", "gguf", "numba", "numpy")


@dataclass(frozen=True, slots=True)
class Results:
    """A file of measurements.  What stands in it is not measured again: an interrupted comparison goes on where it stopped."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [{"tokens": list(DEFAULT_TOKENS), **json.loads(line)} for line in lines]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The newest measurement with that key (all of KEY)."""
        return next((row for row in reversed(self.read()) if all(row[name] == key[name] for name in KEY)), None)

    def append(self, measurement: Mapping[str, Any]) -> dict[str, Any]:
        """Write `measurement` with date, commit, machine and versions around it; returns the line as written."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {**measurement, "date": date, **commit(), "machine": machine(), "versions": versions()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether src/ differs from it; both None outside of git."""

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", ":(top)src")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def machine() -> dict[str, Any]:
    """Processor, cores and memory: no host name, no paths."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
