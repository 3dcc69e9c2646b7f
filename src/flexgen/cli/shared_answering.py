"""The part of a job after its lines are known, where workers answer them: the run starts workers, collects, and shows how far all are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.base.quantities import counted, format_seconds
from flexgen.cli.answering import Answering
from flexgen.cli.worker_places import Crew, WorkerPlace, places_of
from flexgen.cli.workers import Children
from flexgen.jobs.interrupt import Stopped

if TYPE_CHECKING:
    from flexgen.jobs.store import Store
    from flexgen.jobs.workers.run import SharedRun
    from flexgen.jobs.workers.task import SharedTask
    from flexgen.llm import LLM
    from flexgen.options import EngineOptions
    from flexgen.plan.workload import Workload

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAnswering(Answering):
    """A job whose lines workers are about to answer, see `Answering`.

    Attributes:
        task: What workers have to know.
        places: What each worker that the run starts may use.
        figures: Figures of the run, once it is over.
    """

    task: SharedTask
    places: Sequence[WorkerPlace]
    figures: dict[str, Any] = field(default_factory=dict[str, Any])

    def _answer(self, workload: Workload) -> None:
        if not len(workload):
            return
        from flexgen.jobs.workers.run import SharedRun

        paths = self.store.paths
        named = (paths.output or paths.folder).absolute()
        if not self.places:
            self.display.message(f"waiting for workers: `flexgen work {named}`, on any host that sees {paths.workers}")
        tell, began = self.store.run.teller(self.store.num_output_tokens, None), time.monotonic()
        with SharedRun(self.job, self.store, self.task) as run:
            logs = run.folder.logs
            with Children(named, self.places, logs, run.members, self.display.warning) as children:
                while run.num_left:
                    progress = run.collect()
                    self.job.started = self.job.started or progress.num_requests_done > 0
                    tell(progress)
                    self.display.progress(progress)
                    children.tend()
                    if self.signals.request.asked:
                        raise Stopped
                    time.sleep(_POLL_SECONDS)
                children.wait()
            self._add_up(run, time.monotonic() - began)

    def _add_up(self, run: SharedRun, seconds: float) -> None:
        from flexgen.jobs.workers.worker import reports

        totals = run.totals()
        self.job.num_resumed, self.job.tokens_kept = totals.pop("answers_resumed"), totals.pop("tokens_kept")
        rates = {f"{name}_per_s": totals[name] / max(seconds, 1e-9) for name in ("prompt_tokens", "output_tokens")}
        num_workers = len(run.members())
        self.figures.update({"elapsed_seconds": seconds, "num_workers": num_workers, **totals, **rates, "workers": reports(run.folder)})

    def _report(self) -> Mapping[str, object]:
        """Show what the workers did together, and return the figures."""
        if self.job.num_resumed:
            kept = f"{counted(self.job.num_resumed, 'answer')} went on after {counted(self.job.tokens_kept, 'token')}"
            self.display.message(f"{kept} that earlier runs or other workers had generated")
        workers, seconds = counted(self.figures["num_workers"], "worker"), format_seconds(self.figures["elapsed_seconds"])
        rate = f"{self.figures['output_tokens_per_s']:,.1f} output tokens/s"
        self.display.message(f"done by {workers} in {seconds}, loading included, at {rate}: {self._done()}")
        return self.figures


def shared_task(llm: LLM, store: Store, *, model: str, source: Path, keywords: Mapping[str, Any], **fields: Any) -> SharedTask:
    """Return what workers have to know, with paths that do not depend on the folder of this process.

    Args:
        llm: The model.
        store: The state of the job, which was begun.
        model: The name of the model, as the user wrote it.
        source: The input.
        keywords: The keywords of `LLM` that are not options of the engine.
        **fields: Other fields of `SharedTask`.
    """
    from flexgen.jobs.workers.task import SharedTask

    options = llm.options
    if options.offload_dir is not None:
        options = dataclasses.replace(options, offload_dir=str(Path(options.offload_dir).absolute()))
    own = {"tokenizer": _absolute(keywords["tokenizer"])}
    if keywords["chat_template"] is not None:
        own["chat_template"] = llm.chat_template
    return SharedTask(
        name=store.paths.name, model=_absolute(model) or model, source=str(source.absolute()), options=options,
        keywords={**keywords, **own}, created=store.created, model_name=store.model, **fields,
    )  # fmt: skip


def divide(crew: Crew, options: EngineOptions) -> list[WorkerPlace]:
    """Divide this host among the workers that a run starts; see `places_of`."""
    import psutil

    return places_of(crew, options, psutil.Process().memory_info().rss)


def settle_formats(llm: LLM, store: Store, workload: Workload, num_workers: int) -> None:
    """Choose formats where the options leave a choice, once for all workers."""
    if llm.options.allow_formats is None:
        return
    choice = llm.plan(workload.take(range(0, len(workload), num_workers))).formats
    assert choice is not None
    llm.model.resume({"weight_format": choice.chosen.weights, "kv_format": choice.chosen.kv})
    store.settle(llm.model.fingerprint())


def _absolute(named: str | None) -> str | None:
    """Return the path of what lies on this host, and another name as it is."""
    return None if named is None else str(Path(named).expanduser().absolute()) if Path(named).expanduser().exists() else named
