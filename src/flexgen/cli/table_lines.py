"""The lines of `flexgen map`: a request for each row of a table, written into the job's folder."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.base.steps import counted_lines
from flexgen.chat import Chat
from flexgen.cli.defaults import bare_defaults
from flexgen.cli.map_flags import MapFlags, TaskFlags, naming_flags
from flexgen.cli.reading import Conversations
from flexgen.errors import JobError, OptionError, RequestError
from flexgen.tables.answers import Answers
from flexgen.tables.batch import Table
from flexgen.tables.checks import check_columns, check_constraint, check_shots, matching
from flexgen.tables.form import TableForm
from flexgen.tables.formats import check_writable, format_of
from flexgen.tables.prompts import Prompts, Shot, takes_messages
from flexgen.tables.task import Task

if TYPE_CHECKING:
    from flexgen.jobs.folder import JobFolder
    from flexgen.jobs.serving import Judge
    from flexgen.llm import LLM
    from flexgen.request import SamplingParams

_SHOWN_PROMPTS = 3
_MOST_COMPLAINTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLines:
    """The lines of a table, see `JobLines`.

    Attributes:
        table: The table.
        task: What is asked of each row.
        shots: The labelled examples.
        flags: The flags of the command.
        asked: The flags that say what is asked.
        conversations: The flags that say how texts and conversations become tokens.
        output_form: The form of the output, as JSON.
    """

    table: Table
    task: Task
    shots: Sequence[Shot]
    flags: MapFlags
    asked: TaskFlags
    conversations: Conversations
    output_form: str | None

    @classmethod
    def of(cls, table: Table, form: str, *, flags: MapFlags, asked: TaskFlags, conversations: Conversations) -> TableLines:
        """Make the lines of a table that is open, after checks of its columns.

        Raises:
            OptionError: A column is missing or would be overwritten, or flags contradict each other.
            JobError: The columns have types that the output cannot hold.
        """
        task = asked.task()
        check_columns(task, Prompts(task).columns, table.columns, str(table.path))
        assert flags.output is not None
        check_writable(table, asked.output_format or format_of(flags.output, "--output"))
        kept = TableForm.of(table, form, asked.output_format, task)
        return cls(
            table=table, task=task, shots=asked.shots(task), flags=flags, asked=asked, conversations=conversations,
            output_form=kept.to_json(),
        )  # fmt: skip

    @property
    def name(self) -> str | None:
        return str(self.table.path)

    @property
    def form(self) -> str:
        return "jsonl"

    @property
    def keywords(self) -> Mapping[str, Any]:
        return self.conversations.keywords

    def defaults(self, llm: LLM) -> SamplingParams:
        """Return the sampling parameters of all rows."""
        from flexgen.tables.task import DEFAULT_MAX_TOKENS

        stops = self._prompts(llm).default_stop if self.asked.stops is None else self.asked.stops
        return bare_defaults(llm, {"max_tokens": self.asked.max_tokens or DEFAULT_MAX_TOKENS, "stop": stops, **self.flags.sampling})

    def judge(self, llm: LLM) -> Judge | None:
        """Return what says which answers do not follow the schema or the pattern."""
        return Answers(self.task, matching(llm.model, self.task)).fault

    @contextmanager
    def to_measure(self, llm: LLM, show: Callable[[str], None]) -> Iterator[Path]:
        """Yield a temporary file with the lines, after showing the first prompts as the model gets them."""
        with tempfile.TemporaryDirectory(prefix="flexgen-map-") as folder:
            path = Path(folder) / "requests.jsonl"
            with path.open("wb") as file:
                file.writelines(self._lines(llm))
            with path.open("rb") as file:
                for line in itertools.islice(file, _SHOWN_PROMPTS):
                    show(self._shown(llm, json.loads(line)))
            yield path

    def to_answer(self, folder: JobFolder, llm: LLM) -> Path:
        """Write the lines into the job's folder, remove earlier runs for `--fresh`, and return the file."""
        from flexgen.jobs.export import remove_job
        from flexgen.jobs.input_file import copy_input

        if self.flags.fresh:
            for _ in self._lines(llm):  # checked before anything is removed
                pass
            remove_job(folder)
        return copy_input(folder, self._lines(llm))

    def _prompts(self, llm: LLM) -> Prompts:
        """Return what writes the lines for this model.

        Raises:
            OptionError: The model cannot do what is asked.
        """
        return Prompts(self.task, self.shots, chat=takes_messages(self.asked.chat, llm.chat_template))

    def _lines(self, llm: LLM) -> Iterator[bytes]:
        """Yield the line of every row.

        Raises:
            JobError: Rows have no prompt, and there is no --keep-going; or the table is damaged.
            OptionError: See `_prompts`; or what is asked cannot be served for any row.
        """
        prompts = self._prompts(llm)
        faults: list[tuple[int, RequestError]] = []
        checked = False
        rows = (row for batch in self.table.batches(prompts.columns) for row in batch.rows())
        for number, row in enumerate(counted_lines(rows, f"writing a prompt for each row of {self.name}"), start=1):
            try:
                line = prompts.line(row)
            except RequestError as error:
                faults.append((number, error))
                line = {}
            if line and not checked:
                self._check(llm, line)
                checked = True
            yield json.dumps({"id": number, **line}).encode() + b"\n"
            if len(faults) >= _MOST_COMPLAINTS and not self.flags.keep_going:
                break
        if faults and not self.flags.keep_going:
            raise JobError(_complaint(str(self.name), faults))

    def _check(self, llm: LLM, line: Mapping[str, Any]) -> None:
        """Refuse what no row can have, such as a constraint that cannot be served, and examples that contradict it."""
        asked = {name: value for name, value in line.items() if name not in ("prompt", "messages")}
        form = PlainForm(defaults=self.defaults(llm))
        try:
            params = form.parse(JobRequest(line_number=1, digest=1, form=form), {"prompt": "x", **asked}).params
        except RequestError as error:
            flag = next((name for name in ("choices", "schema", "regex") if getattr(self.task, name)), "prompt")
            raise OptionError(f"--{flag}: {error}") from error
        with naming_flags():
            check_constraint(llm.model, self.task, params)
        check_shots(llm.model, self.task, self.shots, params, name=f"--examples {self.asked.examples}")

    def _shown(self, llm: LLM, line: Mapping[str, Any]) -> str:
        """Return the prompt of a line as the model gets it, with the possible answers."""
        form = PlainForm(defaults=self.defaults(llm))
        head = f"-- row {line['id']} " + "-" * 40
        try:
            request = form.parse(JobRequest(line_number=line["id"], digest=1, form=form), line)
            prompt: object = next(llm.model.render_chats([request.prompt])) if isinstance(request.prompt, Chat) else request.prompt
        except RequestError as error:
            return f"{head}\nno prompt: {self._fault(llm, line['id']) or error}"
        if isinstance(prompt, RequestError):
            return f"{head}\nno prompt: {prompt}"
        choices = f"\n-- answers: {', '.join(map(repr, request.choices))}" if request.choices else ""
        return f"{head}\n{prompt}{choices}"

    def _fault(self, llm: LLM, number: int) -> str | None:
        rows: Iterable[Mapping[str, Any]] = (row for batch in self.table.batches() for row in batch.rows())
        return next((self._prompts(llm).fault(row) for row in itertools.islice(rows, number - 1, number)), None)


def _complaint(name: str, faults: Sequence[tuple[int, RequestError]]) -> str:
    listed = "\n".join(f"row {number}: {error}" for number, error in faults)
    return f"{name}: rows have no prompt, and nothing was answered; the first are\n{listed}\n--keep-going gives such rows their errors"
