"""The steps in their order, and what they share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .models import CAPS, MODELS, PEERS_MODEL, where
from .peers.commands import Peers, peer_steps
from .step import Step

FLEXGEN = (sys.executable, "-m", "flexgen")
# Cycles of zigzag and row are as long as an answer: fewer passes would have all prompts or none.
WHOLE_CYCLES = ("zigzag", "row")
WHOLE_CYCLES_TAKE = 1.7  # as long as other passes
NO_OVERLAP = "no-overlap"
PROMPT_LEN, SHORT, LONG = 512, 32, 128  # tokens of prompts and of answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all steps share.

    Attributes:
        out: The folder of the results; random weights that stay on disk, and what is read from the disk, lie below it.
        device: "cuda", "cpu" or "sim".
        tiny: Whether models, jobs and copies are so small that any machine runs them in a minute; their figures mean nothing.
        peers: Where other systems are.
        options: Further options of every `flexgen bench steady`.
    """

    out: Path
    device: str
    tiny: bool
    peers: Peers = field(default_factory=Peers)
    options: tuple[str, ...] = field(default=())

    @property
    def configs(self) -> Path:
        """The folder of the configs that `write_configs` writes."""
        return self.out / "models"

    def steps(self) -> tuple[Step, ...]:
        """Return all steps, the most important ones first."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[Step]:
        why = "a tiny trial" if self.tiny else "" if self.device == "cuda" else "peers are compared on a GPU"
        largest, smaller, *others = peer_steps(self.peers, self.out, self.configs, why)
        yield from self._machine()
        second, third, *rest = (name for name in MODELS if name != PEERS_MODEL)
        yield self._steady(PEERS_MODEL)
        yield largest
        yield self._steady(PEERS_MODEL, NO_OVERLAP, "--no-overlap")
        yield self._steady(second)
        yield self._steady(third)
        yield smaller
        for name in rest:
            yield self._steady(name)
        attends = "on" if self.device == "cpu" else "off"  # where nothing else computes, there is no choice
        yield self._steady(PEERS_MODEL, "no-host-attention", "--host-attention", attends)
        for schedule in WHOLE_CYCLES:
            yield self._steady(PEERS_MODEL, schedule, "--schedule", schedule)
        yield from others
        for own_cap, output_len in ((True, LONG), (False, SHORT), (False, LONG)):
            for name, model in MODELS.items():
                cap = model.cap if own_cap else next(each for each in CAPS if each != model.cap)
                yield self._other(name, cap, output_len)

    def _machine(self) -> Iterator[Step]:
        """Yield what is measured of the machine itself."""
        python, on = (sys.executable, "-m"), ("--device", self.device)
        small = ("--tiny",) if self.tiny else ()
        yield Step(name="facts", what="versions, memory, disk", command=(*python, "benchmarks.gpu.facts", *on, str(self.out)), seconds=10)
        links = (*python, "benchmarks.gpu.links", *on, *small, str(self.out))
        yield Step(name="links", what="pinning, copies, a small copy behind a large one, reads", command=links, seconds=30)
        dtypes = ("float32",) if self.tiny else ("float16", "bfloat16")
        profile = (*FLEXGEN, "profile", str(self.out), *on, "--json", *(each for name in dtypes for each in ("--dtype", name)))
        yield Step(name="profile", what="rates of the machine", command=(*profile, *(("--quick",) if self.tiny else ())), seconds=60)

    def _other(self, model: str, cap: str, output_len: int) -> Step:
        """Return the step that measures a model with another budget of the device, or other answers, than at first."""
        why = "a tiny trial" if self.tiny else "there is no budget of a device" if self.device == "cpu" and cap != MODELS[model].cap else ""
        step = self._steady(model, f"{cap}-{PROMPT_LEN}+{output_len}", cap=cap, output_len=output_len)
        return replace(step, skipped=why)

    def _steady(self, model: str, variant: str = "", *options: str, cap: str | None = None, output_len: int = SHORT) -> Step:
        """Return the step that measures a model in the middle of a job."""
        measured = MODELS[model]
        if self.tiny:
            input_len, output_len, passes, device_mem = 24, 6, 4, "128MiB"
            job = ["--num-prompts", "60", "--max-num-seqs", "8", "--dtype", "float32"]
        else:
            input_len, passes, device_mem = PROMPT_LEN, 12, cap or measured.cap
            job = ["--num-prompts", "2000"]
        whole = variant in WHOLE_CYCLES
        passes = output_len if whole else passes
        job += ["--input-len", str(input_len), "--output-len", str(output_len), "--passes", str(passes)]
        budget = () if self.device == "cpu" else ("--device-mem", device_mem)
        name = f"{model}-{variant}" if variant else model
        traced = ("--trace", str(self.out / f"{name}.trace.json"), "--trace-passes", "0:2")  # those of the warm-up
        command = (
            *FLEXGEN, "bench", "steady", where(model, self.configs, tiny=self.tiny), "--load-format", "dummy",
            "--offload-dir", str(self.out / "offload"), "--device", self.device, *budget, *job, "--json", "--progress", "plain",
            *(traced if variant in ("", NO_OVERLAP) else ()), *measured.options, *options, *self.options,
        )  # fmt: skip
        seconds = measured.seconds * (WHOLE_CYCLES_TAKE if whole else 1)
        return Step(name=name, what=f"{passes} passes in the middle of a job", command=command, seconds=seconds)


def why_not(device: str) -> str:
    """Return why steps cannot be run on a device; empty if they can."""
    if device != "cuda":
        return ""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device: --device cpu or sim tries the steps out"
