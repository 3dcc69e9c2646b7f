"""The lines of `flexgen run`: a file of requests, or what comes from standard input or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.cli.defaults import bare_defaults
from flexgen.cli.reading import Reading
from flexgen.cli.run_flags import RunFlags
from flexgen.errors import StorageError

if TYPE_CHECKING:
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.serving import Judge
    from flexgen.llm import LLM
    from flexgen.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLines:
    """The lines of a file of requests, see `JobLines`.

    Attributes:
        flags: The flags of `flexgen run`.
        reading: The flags that say how the input is read.
    """

    flags: RunFlags
    reading: Reading

    @property
    def name(self) -> str | None:
        return None

    @property
    def form(self) -> str:
        return self.reading.form

    @property
    def keywords(self) -> Mapping[str, Any]:
        return self.reading.keywords

    @property
    def output_form(self) -> str | None:
        return None

    def defaults(self, llm: LLM) -> SamplingParams:
        """Return the sampling parameters of lines that set none."""
        return bare_defaults(llm, {"max_tokens": self.reading.max_tokens, **self.flags.sampling})

    def judge(self, llm: LLM) -> Judge | None:
        """Return None: every answer counts."""
        return None

    @contextmanager
    def to_measure(self, llm: LLM, show: Callable[[str], None]) -> Iterator[Path]:
        """Yield the file, checked to be one of requests."""
        from flexgen.jobs.mistaken import check_input

        source = self.flags.source
        assert source is not None
        check_input(source, input_format=self.form)
        yield source

    def to_answer(self, folder: JobFolder, llm: LLM) -> Path:
        """Remove earlier runs for `--fresh`, copy a piped input, and return the file to read, checked to be a file of requests."""
        from flexgen.jobs.export import remove_job
        from flexgen.jobs.mistaken import check_input

        source = self.flags.source
        if source is not None and not self.flags.source_is_stream:
            check_input(source, input_format=self.form)  # checked before `--fresh` removes anything
            if self.flags.fresh:
                remove_job(folder)
            return source
        if self.flags.fresh:
            remove_job(folder)
        kept = _keep_stream(folder, source)
        check_input(kept, input_format=self.form, name=str(source or "standard input"))
        return kept


def _keep_stream(folder: JobFolder, pipe: Path | None) -> Path:
    from flexgen.jobs.input_file import keep_input

    if pipe is None:
        return keep_input(folder, sys.stdin.buffer)
    try:
        with pipe.open("rb") as stream:
            return keep_input(folder, stream)
    except OSError as error:
        raise StorageError(f"INPUT {pipe} cannot be read: {error.strerror}") from error
