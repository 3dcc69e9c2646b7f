"""What a run shows: progress as it goes, and the closing report.  Knows the values of report/progress.py; nothing of engines.

Messages and progress go to one stream, the report (and JSON events) to another, so that either can be piped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from flexgen.base.quantities import format_seconds
from flexgen.errors import OptionError
from flexgen.report.format import format_details, format_plan, format_progress, format_report
from flexgen.report.progress import Progress, RunReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from flexgen.plan.tell.forecast import Plan

_PLAIN_SECONDS = 10.0
_JSON_SECONDS = 1.0


class Display(Protocol):
    """How a run is shown."""

    def message(self, text: str) -> None:
        """Something said once: what is about to run, and with what."""
        ...

    def step(self, text: str) -> None:
        """Something that begins now and may take a while."""
        ...

    def plan(self, plan: Plan) -> None:
        """How it will run."""
        ...

    def progress(self, progress: Progress) -> None:
        """A snapshot; called as often as the engine likes."""
        ...

    def report(self, report: RunReport, done: str = "") -> None:
        """How it went; `done` says in words what was done."""
        ...

    def details(self, report: RunReport) -> None:
        """The rest of the report."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class NoDisplay:
    """The report only."""

    def __init__(self, messages: TextIO, results: TextIO, *, steps: TextIO | None = None) -> None:
        self._messages, self._results, self._steps = messages, results, steps or messages

    def message(self, text: str) -> None:
        """Nothing."""

    def step(self, text: str) -> None:
        """Nothing."""

    def plan(self, plan: Plan) -> None:
        """The plan as text, as a message."""
        self.message(format_plan(plan))

    def progress(self, progress: Progress) -> None:
        """Nothing."""

    def report(self, report: RunReport, done: str = "") -> None:
        """The report as text."""
        _write(self._results, format_report(report, done))

    def details(self, report: RunReport) -> None:
        """The rest as text."""
        _write(self._results, "\n" + format_details(report))

    def close(self) -> None:
        """Nothing."""


class PlainDisplay(NoDisplay):
    """One line per interval: for log files."""

    def __init__(self, messages: TextIO, results: TextIO, *, steps: TextIO | None = None, interval_seconds: float = _PLAIN_SECONDS) -> None:
        super().__init__(messages, results, steps=steps)
        self._interval_seconds = interval_seconds
        self._next = time.monotonic() + interval_seconds

    def message(self, text: str) -> None:
        """The text."""
        _write(self._messages, text)

    def step(self, text: str) -> None:
        """The text."""
        _write(self._steps, text)

    def progress(self, progress: Progress) -> None:
        """A line, if the last one is old enough."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval_seconds
            _write(self._messages, format_progress(progress))


class JsonDisplay(NoDisplay):
    """One JSON object per line, all with `event`: "message", "plan", "progress", "report"."""

    def __init__(self, messages: TextIO, results: TextIO, *, steps: TextIO | None = None, interval_seconds: float = _JSON_SECONDS) -> None:
        super().__init__(messages, results, steps=steps)
        self._interval_seconds = interval_seconds
        self._next = 0.0

    def message(self, text: str) -> None:
        """{"event": "message", "text": ...}"""
        self._event("message", {"text": text})

    def step(self, text: str) -> None:
        """The same."""
        self.message(text)

    def plan(self, plan: Plan) -> None:
        """{"event": "plan", "policy": {...the fields of Policy}, "forecast": {...the fields of Forecast}}"""
        self._event("plan", {"policy": dataclasses.asdict(plan.policy), "forecast": dataclasses.asdict(plan.forecast)})

    def progress(self, progress: Progress) -> None:
        """{"event": "progress", ...the fields of Progress}"""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval_seconds
            self._event("progress", dataclasses.asdict(progress))

    def report(self, report: RunReport, done: str = "") -> None:
        """{"event": "report", ...the fields of RunReport}, behind a message if there are words."""
        if done:
            self.message(done)
        self._event("report", dataclasses.asdict(report))

    def details(self, report: RunReport) -> None:
        """Nothing: the report has them."""

    def _event(self, event: str, fields: Mapping[str, Any]) -> None:
        _write(self._results, json.dumps({"event": event, **fields}))


class RichDisplay(NoDisplay):
    """A live picture at the foot of a terminal."""

    def __init__(self, messages: TextIO, results: TextIO, *, steps: TextIO | None = None) -> None:
        super().__init__(messages, results, steps=steps)
        from rich.console import Console

        self._console = Console(file=messages, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def message(self, text: str) -> None:
        """The text, above the picture."""
        self._console.print(text, markup=False)

    def step(self, text: str) -> None:
        """In place of the step before."""
        from rich.text import Text

        self._draw(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))

    def progress(self, progress: Progress) -> None:
        """Redraw."""
        self._draw(_picture(progress))

    def _draw(self, picture: RenderableType) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Take the picture away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


_DISPLAYS = {"rich": RichDisplay, "plain": PlainDisplay, "json": JsonDisplay, "none": NoDisplay}


def open_display(name: str, messages: TextIO, results: TextIO, *, steps: TextIO | None = None) -> Display:
    """The display of that name; "auto" is rich on a terminal and plain elsewhere.

    Args:
        steps: where a plain display's steps go; None is where its messages do.

    Raises:
        OptionError: an unknown name.
    """
    if name == "auto":
        name = "rich" if messages.isatty() else "plain"
    if name not in _DISPLAYS:
        raise OptionError(f"--progress {name!r} is unknown; known: auto, {', '.join(_DISPLAYS)}")
    return _DISPLAYS[name](messages, results, steps=steps)


def _write(stream: TextIO, text: str) -> None:
    """A reader who left (`| head`), a full disk or a closed terminal does not stop the run."""
    with contextlib.suppress(OSError):
        stream.write(text + "\n")
        stream.flush()


def _picture(progress: Progress) -> Any:
    """Three lines for a terminal: requests, rates, links."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    total = "?" if progress.num_requests is None else f"{progress.num_requests:,}"
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(f"{progress.num_requests_done:,}/{total} requests", style="bold"),
        ProgressBar(total=progress.num_requests, completed=progress.num_requests_done, width=40),
        Text(f"{format_seconds(progress.elapsed_seconds)}, ETA {format_seconds(progress.eta_seconds)}"),
    )
    rates = Text(
        f"prompt {progress.prompt_tokens_per_s:,.1f} tokens/s   output {progress.output_tokens_per_s:,.1f} tokens/s   "
        f"{progress.num_live_sequences:,} live   pass {progress.pass_index}, unit {progress.unit}/{progress.num_units}"
    )
    links = Table.grid(padding=(0, 1))
    cells: list[Any] = []
    for name, share in progress.link_shares.items():
        cells += [Text(name), ProgressBar(total=1.0, completed=min(share, 1.0), width=10), Text(f"{share:4.0%} ")]
    if cells:
        links.add_row(*cells)
    return Group(head, rates, links)
