"""A model that takes requests: texts become tokens, tokens results, and results texts, over at most one open engine.

Jobs, evaluations and `LLM` ask this.  Knows nothing of files of requests.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen.chat import Chat, Templates
from flexgen.errors import FlexGenError, OptionError, RequestError
from flexgen.options import EngineOptions
from flexgen.plan.formats import Formats
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress, RunReport
from flexgen.report.steady import SteadyReport
from flexgen.request import PartialAnswer, TokenRequest, TokenResult
from flexgen.session.fingerprint import fingerprint
from flexgen.session.model import ResolvedModel
from flexgen.session.session import EngineSession
from flexgen.session.texts import ModelTexts
from flexgen.session.turns import Turns
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus
from flexgen.text.guides import Guides
from flexgen.text.tokenizer import Tokenizer


class ServedModel(ModelTexts):
    """A model that takes requests; what it makes of texts and tokens without an engine stands in `ModelTexts`.

    The engine is opened by the first work, because the plan depends on it, and closed with this, or when this is garbage collected.

    Args:
        resolved: The files of the model, and the options.
        tokenizer: The tokenizer; None where there is none, so that prompts are token ids and answers have no text.
        chat_template: What replaces the tokenizer's own template, see `LLM`.
        chat_template_kwargs: Variables for the template of every chat.

    Attributes:
        turns: The turns of callers, one of which `run` needs.

    Raises:
        OptionError: The template cannot be used.
    """

    def __init__(
        self,
        resolved: ResolvedModel,
        tokenizer: Tokenizer | None,
        *,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(resolved, tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        self.turns = Turns()
        self._engine = EngineSession(resolved)
        self._finalizer = weakref.finalize(self, _close, self.turns, self._engine, self.templates, self.guides, wait=False)

    @property
    def name(self) -> str:
        """The name of the model, as the user wrote it."""
        return self._engine.model.files.name

    @property
    def options(self) -> EngineOptions:
        """The options that were asked for; `shrink` lowers `max_num_seqs`, and formats to choose among become those that are chosen."""
        return self._engine.options

    def check(self) -> None:
        """Check that the model's files can be served, so that this does not fail only when there is work; no weights are read.

        Raises:
            ModelError: The model cannot be served; the message says why.
        """
        self._engine.model.check()

    def fingerprint(self) -> dict[str, Any]:
        """Return the properties of the model that change its answers, as JSON values by name.

        A job refuses to go on with another fingerprint.  As long as formats are to be chosen, it is that of the model as it is.

        Raises:
            FlexGenError: See `check`.
        """
        return fingerprint(self._engine.model, self.translator, self.templates.text)

    def resume(self, begun: Mapping[str, Any]) -> str:
        """Serve in the formats of a job that was begun before, where the options leave formats to choose.

        Args:
            begun: The fingerprint that the job was begun with.

        Returns:
            The formats in words; empty where there was nothing to choose.

        Raises:
            OptionError: The options do not allow these formats.
            FlexGenError: The weights cannot be converted.
        """
        if self.options.allow_formats is None:
            return ""
        formats = Formats(begun.get("weight_format", "auto"), begun.get("kv_format", "auto"))
        self._engine.keep_formats(formats)
        return str(formats)

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation by the model's template, or the error that prevents it.

        Prompts are rendered as the iterator is advanced.

        Args:
            chats: The conversations.
            now: The time that templates see, in seconds since 1970, given where a later run must render the same prompts; None for the
                current time.
        """
        self.turns.check()
        return self.templates.render(chats, now=now)

    # -- the engine -----------------------------------------------------------------------------------------------------------------------

    def prefix_census(self) -> PrefixCensus | None:
        """Return an object that finds the common prefixes of requests before they are streamed; None if prefix sharing is off."""
        return PrefixCensus(PAGE_TOKENS) if self.options.prefix_sharing else None

    def plan(self, workload: Workload) -> Plan:
        """Return the plan that `open` would make for this workload, without opening the engine (see `plan_job` and `choose_formats`)."""
        _check_workload("plan", workload)
        return self._engine.plan(workload)

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this workload, as `stream` would, and return its plan."""
        _check_workload("open", workload)
        with self.turns.call():
            return self._engine.serving(workload).plan

    def stream(
        self,
        requests: Iterable[TokenRequest],
        workload: Workload,
        *,
        prefixes: CommonPrefixes = NO_PREFIXES,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """Answer requests, and yield the results as they finish.

        From the first result to the end of the iterator, the iterator owns the engine: other calls that need it are refused in all threads,
        and closing the model closes the iterator.

        Args:
            requests: The requests, pulled lazily.
            workload: The lengths of the requests; tokens that an earlier run generated count as prompt.
            prefixes: The common prefixes of the prompts.
            on_progress: A callback that is called with the progress of the run, also within passes, but not for every step.
            on_pass: A callback that is called after every pass with the unfinished answers, which are gathered while it iterates.

        Raises:
            FlexGenError: Another iterator is not at its end; or, at any result, the model is closed.
        """
        _check_workload("stream", workload)
        return self.turns.iterate(self.run(requests, workload, prefixes=prefixes, on_progress=on_progress, on_pass=on_pass))

    def run(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> Generator[TokenResult]:
        """Yield the results of the engine, whose turn is the caller's.  `how` has the other arguments of `stream`."""
        engine = self._engine.serving(workload)
        try:
            yield from engine.generate(requests, num_requests=len(workload), **how)
        except BaseException:
            self._engine.close()  # its live sequences are of no use to a later call
            raise

    def steady(self, requests: Iterable[TokenRequest], workload: Workload, **how: Any) -> SteadyReport:
        """Measure passes in the middle of a job; arguments and errors are those of `PlannedEngine.steady`."""
        _check_workload("steady", workload)
        with self.turns.call():
            engine = self._engine.serving(workload)
            try:
                return engine.steady(requests, seed=self.options.seed, **how)
            except BaseException:
                self._engine.close()  # its live sequences are of no use to a later call
                raise

    def shrink(self) -> int | None:
        """Have the next engine keep half as many sequences alive as the last one, after memory ran out.

        Returns:
            The new number of sequences; None if it was 1 already.
        """
        with self.turns.call():
            return self._engine.shrink()

    def report(self) -> RunReport:
        """Return the report of the last run.

        Raises:
            FlexGenError: Nothing has run yet.
        """
        if self._engine.engine is None:
            raise FlexGenError("nothing has run yet, so there is nothing to report")
        return self._engine.engine.report()

    def close(self) -> None:
        """Free the engine's memory, files, threads and processes, after the call of another thread that is at work.

        In a forked process nothing happens, because all of it belongs to the parent.
        """
        _close(self.turns, self._engine, self.templates, self.guides, wait=True)


def _check_workload(call: str, workload: object) -> None:
    if not isinstance(workload, Workload):
        raise OptionError(f"{call} takes a Workload, the lengths of requests; prompts and SamplingParams are for generate")


def _close(turns: Turns, engine: EngineSession, templates: Templates, guides: Guides, *, wait: bool) -> None:
    """Release the resources of a model that is closed or garbage collected.

    Args:
        turns: The turns of the model.
        engine: The engine of the model.
        templates: The templates of the model.
        guides: The maker of guides of the model.
        wait: Whether to wait for a call of another thread; if not, the operating system frees its resources at the end of the process.
    """
    with turns.end(wait=wait) as mine:
        if mine:
            templates.close()
            guides.close()
            engine.end()
