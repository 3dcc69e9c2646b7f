"""`flexgen bench steady --machine`: the same passes on a machine that is not at hand, simulated in slow motion.

The engine is the real one: its plan, schedule, threads, rings and streams.  Only what takes time is replaced, by sleeping.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexgen.base.option_values import parse_passes
from flexgen.base.recorder import Recorder
from flexgen.bench.throughput import uniform_job
from flexgen.options import EngineOptions
from flexgen.plan.known.machines import find_machine
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.report.steady import SteadyReport
from flexgen.request import TokenRequest
from flexgen.session.lookup import files_of
from flexgen.session.model import ResolvedModel
from flexgen.session.planned import PlannedEngine
from flexgen.session.prepare import Prepared
from flexgen.session.simulated import prepare_simulated


def prepare_steady(
    model: str, machine: str, options: EngineOptions, *, num_prompts: int, input_len: int, output_len: int, slow_motion: float
) -> Prepared:
    """Plan a job of random prompts for a machine, of which `simulate_steady` simulates some passes.

    Args:
        model: A name of the catalogue, a folder or a hub id, of which the config is read.
        machine: The name of a known machine, or a file that describes one.
        options: The options of the engine; budgets are those of the machine.
        num_prompts: The number of requests.
        input_len: The tokens of each prompt.
        output_len: The tokens of each answer.
        slow_motion: How many times longer everything takes here than there.

    Raises:
        OptionError: An option is not simulated, or prompt and answer do not fit the context.
        ModelError: The model cannot be found or served.
        CapacityError: The job does not fit the machine without KV on disk.
    """
    box = find_machine(machine)
    files = files_of(model, dataclasses.replace(options, load_format="dummy"))
    _, context = ResolvedModel(files, options).token_limits
    workload = uniform_job(context, num_prompts, input_len, output_len)
    return prepare_simulated(files, options, box, workload, slow_motion=slow_motion)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedReport:
    """The report of passes that were simulated.

    Attributes:
        steady: The report, in the time of the simulated machine.
        slow_motion: How many times longer everything took.
        seconds: The simulated seconds of all passes, those of the warm-up included.
        busy_seconds: For each resource, the seconds of these in which it was in use.
    """

    steady: SteadyReport
    slow_motion: float
    seconds: float
    busy_seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the keys of the report, and those of the simulation under "simulated"."""
        name = self.steady.run.machine["name"]
        simulated = {"machine": name, "slow_motion": self.slow_motion, "seconds": self.seconds, "busy_seconds": self.busy_seconds}
        return self.steady.to_json() | {"simulated": simulated}


def simulate_steady(
    prepared: Prepared,
    *,
    warmup: int,
    passes: int,
    seed: int = 0,
    trace: str | None = None,
    trace_passes: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SimulatedReport:
    """Simulate some passes in the middle of the job that was planned; see `run_steady`.

    Args:
        prepared: The plan, with a simulated device.
        warmup: The number of passes before those that count.
        passes: The number of passes that count.
        seed: The seed of the prompts.
        trace: As in EngineOptions; its times are those of the simulated machine.
        trace_passes: As in EngineOptions.
        on_progress: Called now and then with the progress of the passes.

    Raises:
        OptionError: The job has fewer passes between its beginning and its end.
        StorageError: The trace cannot be written.
    """
    device = prepared.device
    assert device is not None
    with contextlib.ExitStack() as closing:
        closing.callback(prepared.discard)
        recorder = None
        if trace is not None:
            chosen = None if trace_passes is None else parse_passes(trace_passes)
            recorder = Recorder(Path(trace), chosen, {"model": prepared.model.spec.name, "machine": prepared.plan.machine.name}, device.now)
            closing.callback(recorder.close)
        engine = PlannedEngine(prepared, recorder)
        closing.callback(engine.close)
        requests = _random_requests(prepared.workload, prepared.model.spec.vocab_size, seed)
        report = engine.steady(requests, num_warmup=warmup, num_passes=passes, seed=seed, on_progress=on_progress)
        return SimulatedReport(
            steady=report, slow_motion=device.clock.slow_motion, seconds=device.now(), busy_seconds=device.busy_seconds()
        )


def _random_requests(workload: Workload, vocab_size: int, seed: int) -> Iterator[TokenRequest]:
    """Yield a request with a random prompt for each of the lengths, answered greedily and in full."""
    rng = np.random.default_rng(seed)
    for index, (prompt_len, output_len) in enumerate(zip(workload.prompt_lens, workload.output_lens, strict=True)):
        yield TokenRequest(index=index, prompt_token_ids=tuple(rng.integers(0, vocab_size, prompt_len).tolist()), max_tokens=output_len)
