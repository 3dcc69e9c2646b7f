"""A model twice: ours, and transformers' own, which scores and generates without batches or padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexgen import LLM
from flexgen.jobs.folder import find_job
from flexgen.jobs.interrupt import StopRequest
from flexgen.jobs.status import read_status


@dataclass(frozen=True)
class Oracle:
    """transformers' model, which scores one continuation at a time, without batches or padding."""

    model: Any

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The log probability of a continuation, and whether each of its tokens is the likeliest."""
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logits = self.model(ids[:, :-1]).logits[0, -len(continuation) :]
        wanted = ids[0, -len(continuation) :]
        chosen = torch.log_softmax(logits, -1).gather(1, wanted[:, None])
        return float(chosen.double().sum()), bool((logits.argmax(-1) == wanted).all())

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy tokens, up to the end of the text."""
        ids = torch.tensor([list(prompt)])
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        return found[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Subject:
    """A model twice: ours and the oracle."""

    llm: LLM
    oracle: Oracle


class StopAfterPasses(StopRequest):
    """A request to stop that is made after a number of passes, however long they take."""

    def __init__(self, num_passes: int) -> None:
        super().__init__()
        self._left = num_passes

    @property
    def asked(self) -> bool:
        self._left -= 1
        return self._left < 0


def num_done(folder: Path) -> int:
    """The number of lines of a job that are done."""
    return read_status(find_job(folder)).answered
