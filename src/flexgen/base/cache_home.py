"""The folder in which flexgen keeps what it can make again: rates of machines, converted weights, what was made of GGUF files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """Return flexgen's folder below XDG_CACHE_HOME, or below ~/.cache where that is unset or, as its specification demands, relative."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "flexgen"
