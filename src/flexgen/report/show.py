"""Displays of a run: its progress and its closing report.  Depends on plans and on the values of report/progress.py, not on the engine.

Messages and progress go to one stream, the report (and JSON events) to another, so that either can be piped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from flexgen.base.quantities import format_seconds
from flexgen.errors import OptionError
from flexgen.report.format import format_details, format_progress, format_report, place_of, token_rates
from flexgen.report.plans import format_plan
from flexgen.report.progress import Progress, RunReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from flexgen.plan.tell.forecast import Plan

_PLAIN_SECONDS = 10.0
_JSON_SECONDS = 1.0


class Display(Protocol):
    """A way to show a run."""

    def message(self, text: str) -> None:
        """Show a message once, such as which model is about to run."""
        ...

    def warning(self, text: str) -> None:
        """Show a message that no display leaves out."""
        ...

    def step(self, text: str) -> None:
        """Show that a step begins that may take a while."""
        ...

    def plan(self, plan: Plan) -> None:
        """Show the plan that will be executed."""
        ...

    def progress(self, progress: Progress) -> None:
        """Show a snapshot; the engine may call this as often as it likes."""
        ...

    def report(self, report: RunReport, done: str = "") -> None:
        """Show the closing report; `done` says in words what was done."""
        ...

    def details(self, report: RunReport) -> None:
        """Show the rest of the report."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class NoDisplay:
    """A display that shows only warnings and the report.

    Args:
        messages: The stream of messages and progress.
        results: The stream of the report.
        steps: The stream of steps where they are lines of their own; None for `messages`.
        spelled: Returns a plan or a report, which name options as in Python, as the user of the display writes them.
    """

    def __init__(
        self, messages: TextIO, results: TextIO, *, steps: TextIO | None = None, spelled: Callable[[str], str] = lambda text: text
    ) -> None:
        self._messages, self._results, self._steps, self._spelled = messages, results, steps or messages, spelled

    def message(self, text: str) -> None:
        """Ignore the message."""

    def warning(self, text: str) -> None:
        """Write the warning."""
        _write(self._messages, text)

    def step(self, text: str) -> None:
        """Ignore the step."""

    def plan(self, plan: Plan) -> None:
        """Show the plan as a message."""
        self.message(self._spelled(format_plan(plan)))

    def progress(self, progress: Progress) -> None:
        """Ignore the snapshot."""

    def report(self, report: RunReport, done: str = "") -> None:
        """Write the report as text."""
        _write(self._results, self._spelled(format_report(report, done)))

    def details(self, report: RunReport) -> None:
        """Write the rest of the report as text."""
        _write(self._results, "\n" + self._spelled(format_details(report)))

    def close(self) -> None:
        """Do nothing."""


class PlainDisplay(NoDisplay):
    """A display for log files, with one line of progress per interval."""

    def __init__(self, messages: TextIO, results: TextIO, *, interval_seconds: float = _PLAIN_SECONDS, **more: Any) -> None:
        super().__init__(messages, results, **more)
        self._interval_seconds = interval_seconds
        self._next = time.monotonic() + interval_seconds

    def message(self, text: str) -> None:
        """Write the message."""
        _write(self._messages, text)

    def step(self, text: str) -> None:
        """Write the step."""
        _write(self._steps, text)

    def progress(self, progress: Progress) -> None:
        """Write a line of progress, if the last one is old enough."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval_seconds
            _write(self._messages, format_progress(progress))


class JsonDisplay(NoDisplay):
    """A display that writes one JSON object per line, each with the key `event`: "message", "plan", "progress" or "report"."""

    def __init__(self, messages: TextIO, results: TextIO, *, interval_seconds: float = _JSON_SECONDS, **more: Any) -> None:
        super().__init__(messages, results, **more)
        self._interval_seconds = interval_seconds
        self._next = 0.0

    def message(self, text: str) -> None:
        """Write {"event": "message", "text": ...}."""
        self._event("message", {"text": text})

    def warning(self, text: str) -> None:
        """Write the warning as a message."""
        self.message(text)

    def step(self, text: str) -> None:
        """Write the step as a message."""
        self.message(text)

    def plan(self, plan: Plan) -> None:
        """Write {"event": "plan"} with the fields of Policy, Forecast and FormatChoice as "policy", "forecast" and "formats"."""
        parts = {"policy": plan.policy, "forecast": plan.forecast, "formats": plan.formats}
        self._event("plan", {name: None if part is None else dataclasses.asdict(part) for name, part in parts.items()})

    def progress(self, progress: Progress) -> None:
        """Write {"event": "progress", ...the fields of Progress}."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval_seconds
            self._event("progress", dataclasses.asdict(progress))

    def report(self, report: RunReport, done: str = "") -> None:
        """Write {"event": "report", ...the fields of RunReport}, preceded by a message if `done` is not empty."""
        if done:
            self.message(done)
        self._event("report", dataclasses.asdict(report))

    def details(self, report: RunReport) -> None:
        """Do nothing, because the report contains the details."""

    def _event(self, event: str, fields: Mapping[str, Any]) -> None:
        _write(self._results, json.dumps({"event": event, **fields}))


class RichDisplay(NoDisplay):
    """A display at the bottom of a terminal that is updated in place."""

    def __init__(self, messages: TextIO, results: TextIO, **more: Any) -> None:
        super().__init__(messages, results, **more)
        from rich.console import Console

        self._console = Console(file=messages, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def message(self, text: str) -> None:
        """Write the message above the live display."""
        self._console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Write the warning above the live display."""
        self.message(text)

    def step(self, text: str) -> None:
        """Show the step in place of the previous one."""
        from rich.text import Text

        self._draw(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))

    def progress(self, progress: Progress) -> None:
        """Redraw the live display."""
        self._draw(_picture(progress))

    def _draw(self, picture: RenderableType) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._live.update(picture, refresh=True)

    def close(self) -> None:
        """Remove the live display from the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None


_DISPLAYS = {"rich": RichDisplay, "plain": PlainDisplay, "json": JsonDisplay, "none": NoDisplay}


def open_display(
    name: str, messages: TextIO, results: TextIO, *, steps: TextIO | None = None, spelled: Callable[[str], str] = lambda text: text
) -> Display:
    """Open the display of this name; "auto" chooses "rich" on a terminal and "plain" elsewhere.

    Args:
        name: The name of the display.
        messages: The stream of messages and progress.
        results: The stream of the report.
        steps: The stream of a plain display's steps; None for `messages`.
        spelled: Returns a plan or a report, which name options as in Python, as the user of the display writes them.

    Raises:
        OptionError: The name is unknown.
    """
    if name == "auto":
        name = "rich" if messages.isatty() else "plain"
    if name not in _DISPLAYS:
        raise OptionError(f"progress={name!r} is unknown; known: auto, {', '.join(_DISPLAYS)}")
    return _DISPLAYS[name](messages, results, steps=steps, spelled=spelled)


def _write(stream: TextIO, text: str) -> None:
    """Write to a stream; a reader that left (`| head`), a full disk or a closed terminal does not stop the run."""
    with contextlib.suppress(OSError):
        stream.write(text + "\n")
        stream.flush()


def _picture(progress: Progress) -> Any:
    """Return three lines for a terminal: requests, rates and links."""
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
    rates = Text(f"{'   '.join(token_rates(progress))}   {place_of(progress, '   ')}")
    links = Table.grid(padding=(0, 1))
    cells: list[Any] = []
    for name, share in progress.link_shares.items():
        cells += [Text(name), ProgressBar(total=1.0, completed=min(share, 1.0), width=10), Text(f"{share:4.0%} ")]
    if cells:
        links.add_row(*cells)
    return Group(head, rates, links)
