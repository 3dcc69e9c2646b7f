"""What one stage of a pipeline has done since it was opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.engine.runner import ModelRunner


@dataclass(slots=True)
class StageFigures:
    """The passes of a stage.

    Attributes:
        passes: The number of passes.
        seconds: The time within passes, waits included.
        waits: For each cause, the seconds in which the stage had nothing to compute within passes.
    """

    passes: int = 0
    seconds: float = 0.0
    waits: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, seconds: float, waits: Mapping[str, float]) -> None:
        """Count a pass."""
        self.passes += 1
        self.seconds += seconds
        for cause, each in waits.items():
            self.waits[cause] = self.waits.get(cause, 0.0) + each

    def message(self, runner: ModelRunner) -> dict[str, Any]:
        """Return the figures, and those of the runner, as JSON values."""
        return {"passes": self.passes, "seconds": self.seconds, "waits": self.waits, "bytes_moved": runner.bytes_moved()}
