"""The part of a job after its lines are known: they are answered, the output is written, and the result is reported to the user."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexgen.base.quantities import counted
from flexgen.cli.exit_codes import ExitCode, complain
from flexgen.cli.options import write_asked
from flexgen.cli.run_flags import RunFlags
from flexgen.cli.signals import StopSignals
from flexgen.cli.spelling import in_flags
from flexgen.errors import FlexGenError, OutOfMemoryError, StageError, is_disk_failure
from flexgen.jobs.interrupt import Stopped

if TYPE_CHECKING:
    from flexgen.jobs.runner import Job
    from flexgen.jobs.store import Store
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.report.show import Display


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A job whose lines are about to be answered.

    Attributes:
        llm: The model.
        job: The job, which has been scanned.
        store: The state of the job.
        flags: The flags of the command, some of which ask for reports.
        display: The display for progress and messages.
        signals: The signals that may stop the run.
    """

    llm: LLM
    job: Job
    store: Store
    flags: RunFlags
    display: Display
    signals: StopSignals

    def run(self, workload: Workload) -> ExitCode:
        """Answer the lines, write the output from all finished lines, and return the exit code."""
        from flexgen.jobs.workers.place import remove_folder

        reason: object = None
        try:
            self.store.start_run(self.job.num_lines)
            remove_folder(self.store.paths.workers)  # what workers of an earlier run had stored is in the database
            self._answer(workload)
            code = ExitCode.SOME_FAILED if self.store.num_failed else ExitCode.ALL_ANSWERED
        except Stopped:
            code, reason = self.signals.exit_code, f"stopped by {self.signals.name}"
        except (FlexGenError, PermissionError) as error:
            stopped = self.job.started or is_disk_failure(error) or isinstance(error, StageError)
            code, reason = ExitCode.RESUMABLE if stopped else ExitCode.REFUSED, error
        self.display.close()
        try:
            self._write_output(finished=reason is None)
            self.store.end_run(str(reason or "finished"))
        except FlexGenError as error:
            error = f"{error}{self._how_to_get()}"
            code, reason = (ExitCode.RESUMABLE, error) if reason is None else (code, f"{reason}; then {error}")
        if reason is not None:
            done = self.store.num_answered + self.store.num_failed
            lines = counted(self.job.num_lines, "line")
            left = counted(done, f"of {lines} is done", f"of {lines} are done")
            return complain(f"{reason}\n{left}; the same command goes on from there", code)
        self._conclude(workload)
        return code

    def _answer(self, workload: Workload) -> None:
        def shrunk(error: OutOfMemoryError, num_seqs: int) -> None:
            self.display.warning(f"{in_flags(str(error))}\ngoing on with at most {counted(num_seqs, 'sequence')} at once")

        self.job.answer(workload, on_progress=self.display.progress, on_shrink=shrunk)

    def _write_output(self, *, finished: bool) -> None:
        """Write the output: a file in any case, standard output only when the job is finished."""
        from flexgen.jobs.export import export, export_to_stream

        if self.store.paths.output is not None:
            export(self.store.paths, self.store.paths.output)
        elif finished:
            export_to_stream(self.store.paths, sys.stdout.buffer)

    def _how_to_get(self) -> str:
        """Return a hint how to get answers that could not be written to standard output."""
        if self.store.paths.output is not None:
            return ""
        command = shlex.join(["flexgen", "export", str(self.store.paths.folder), "--to", "FILE"])
        return f"; the answers are kept: `{command}` writes them"

    def _conclude(self, workload: Workload) -> None:
        from flexgen.report.progress import SCHEMA_VERSION

        metrics: dict[str, object] = {"schema_version": SCHEMA_VERSION}  # all there is where nothing was left to do
        if len(workload):
            metrics |= self._report()
        else:
            nothing_new = self.store.num_found == self.job.num_lines  # otherwise all new lines failed when they were read
            what = "nothing was left to do" if nothing_new else "done"
            self.display.message(f"{what}: {self._done()}")
        if self.flags.metrics is not None:  # if that fails, the exit code is still that of the lines
            write_asked(self.flags.metrics, "--metrics", json.dumps({**metrics, "job": self._figures()}, indent=2) + "\n")

    def _report(self) -> Mapping[str, object]:
        """Show what the run did, and return its figures."""
        report = self.llm.report()
        if self.job.num_resumed:
            kept = f"{counted(self.job.num_resumed, 'answer')} went on after {counted(self.job.tokens_kept, 'token')}"
            again = counted(report.recomputed_tokens, "token was", "tokens were")
            self.display.message(f"{kept} that earlier runs had generated; {again} computed again")
        self.display.report(report, self._done())
        if self.flags.verbose:
            self.display.details(report)
        return dataclasses.asdict(report)

    def _done(self) -> str:
        """Return a summary: the output, the number of lines with answers and errors, and how to retry errors."""
        before = f" ({self.store.num_found:,} done before)" if self.store.num_found else ""
        again = "; the same command with --retry-errors tries those again" if self.store.num_failed else ""
        lines = f"{self.store.num_answered:,} of {counted(self.job.num_lines, 'line')} answered, {self.store.num_failed:,} with errors"
        return f"{self.store.paths.name if self.store.paths.output is not None else 'standard output'}: {lines}{before}{again}"

    def _figures(self) -> dict[str, int]:
        """Return the metrics of the job itself."""
        lines = {
            "lines": self.job.num_lines,
            "answered": self.store.num_answered,
            "failed": self.store.num_failed,
            "done_before": self.store.num_found,
        }
        return lines | {"answers_resumed": self.job.num_resumed, "tokens_kept": self.job.tokens_kept}
