"""Answers the rows of a data frame in memory, by the lines and records of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

from flexgen.api.job_request import JobRequest
from flexgen.api.plain import PlainForm
from flexgen.api.prompt_tokens import Tokens, encode_prompts
from flexgen.base.isolation import for_one_request
from flexgen.errors import OptionError, RequestError
from flexgen.outputs import ClassificationRequestOutput, RequestOutput
from flexgen.request import SamplingParams
from flexgen.session.served import ServedModel
from flexgen.tables.answers import Answers
from flexgen.tables.checks import check_columns, check_constraint, check_shots, matching
from flexgen.tables.conversations import Lines, lines_of
from flexgen.tables.formats import check_names
from flexgen.tables.frames import Frame
from flexgen.tables.prompts import read_shots
from flexgen.tables.task import DEFAULT_MAX_TOKENS, Task

Row = Mapping[str, Any]


class MapKeywords(TypedDict, total=False):
    """The keywords of `LLM.map` that say what is asked, what may be answered, and what the columns are called (see `Task`)."""

    messages: str | None
    system: str | None
    template: str
    choices: Sequence[str]
    schema: dict[str, Any] | None
    regex: str | None
    probabilities: bool
    raw: bool
    finish_reason: bool
    token_counts: bool
    answer_column: str
    error_column: str


class RowModel(Protocol):
    """A model that answers rows.  The members are those of `LLM`."""

    @property
    def model(self) -> ServedModel:
        """The model as jobs ask it."""
        ...

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of prompts that set none."""
        ...

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: Any = False) -> list[RequestOutput]:
        """Continue prompts."""
        ...

    def classify(self, prompts: Any, choices: Any, *, use_tqdm: Any = False) -> list[ClassificationRequestOutput]:
        """Score choices after prompts."""
        ...


class FrameMap:
    """Answers the rows of data frames in memory, as many frames as there are, see `LLM.map`.

    Args:
        llm: The model.
        task: What is asked of each row.
        examples: Labelled examples: a data frame, or several dicts.
        chat: Whether prompts are messages; None for messages where the model has a chat template.
        params: The sampling parameters of generated answers; None for those of `flexgen map`.

    Raises:
        OptionError: What is asked cannot be served for any row; the message names the option.
    """

    def __init__(
        self, llm: RowModel, task: Task, *, examples: Any = None, chat: bool | None = None, params: SamplingParams | None = None
    ) -> None:
        if examples is not None and task.messages is not None:
            raise OptionError("examples: conversations of a column have turns of their own: leave them out")
        shots = [] if examples is None else read_shots(task, _examples(examples))
        self._lines = lines_of(task, shots, chat=chat, chat_template=llm.model.templates.text)
        if params is None:
            own = llm.get_default_sampling_params()
            params = dataclasses.replace(own, temperature=0.0, max_tokens=DEFAULT_MAX_TOKENS, stop=self._lines.default_stop)
        else:
            _check_params(task, params)
        if task.constraint:
            constrained = dataclasses.replace(params, **task.constraint)
            check_constraint(llm.model, task, constrained)
            check_shots(llm.model, task, shots, constrained)
        self._llm, self._task, self._form = llm, task, PlainForm(defaults=params)
        self._answers = Answers(task, matching(llm.model, task))

    def __call__(self, given: Any, *, use_tqdm: bool | Callable[..., Any] = False) -> Any:
        """Return a data frame with the columns of the answers.

        Raises:
            OptionError: It is no data frame, or a column is missing or would be overwritten.
            CapacityError: The work does not fit the budgets.
        """
        frame = Frame(given)
        check_names("the table", frame.columns)
        check_columns(self._task, self._lines.columns, frame.columns, "the table")
        requests = list(_requests(self._lines, frame.rows(self._lines.columns), self._form))
        records = _records(self._llm, requests, use_tqdm)
        return frame.with_columns(self._task.columns, [self._answers.values(record) for record in records])


def _check_params(task: Task, params: SamplingParams) -> None:
    """Refuse sampling parameters that a row's one answer cannot have.

    Raises:
        OptionError: There are such; the message names them.
    """
    if task.choices:
        raise OptionError("sampling_params: the answers of choices are scored, not sampled: leave them out")
    if params.n != 1:
        raise OptionError(f"sampling_params: n is {params.n}, and a row has one answer")
    if params.max_tokens == 0:
        raise OptionError("sampling_params: max_tokens is 0, so that no row would have an answer")
    if params.structured_outputs is not None:
        raise OptionError("sampling_params: give what may be answered as schema, regex or choices of map, not as structured_outputs")


def _examples(given: Any) -> Iterable[Row]:
    """Return the rows of examples: a data frame, or several dicts."""
    if isinstance(given, (list, tuple)):
        return given
    frame = Frame(given)
    return frame.rows(frame.columns)


def make_task(prompt: str | None, keywords: MapKeywords) -> Task:
    """Return the task of a call of `LLM.map`.

    Raises:
        OptionError: A keyword is unknown, or values contradict each other.
    """
    if unknown := sorted(set(keywords) - set(MapKeywords.__annotations__)):
        known = sorted([*MapKeywords.__annotations__, "examples", "chat", "sampling_params", "use_tqdm"])
        raise OptionError(f"map has no option {unknown[0]!r}; known: {', '.join(known)}")
    if not isinstance(keywords.get("schema"), (dict, type(None))):
        raise OptionError(f"schema must be a JSON schema as a dict, not {keywords.get('schema')!r:.80}")
    if prompt is None and keywords.get("messages") is None:
        raise OptionError("give prompt, the template of a prompt, or messages, the name of a column of conversations")
    fields = dict(keywords)
    choices = keywords.get("choices") or ()
    if isinstance(choices, str):
        raise OptionError(f"choices must be a list of texts, not the text {choices!r}")
    return Task(prompt=prompt or "", **{**fields, "choices": tuple(choices)})


def _requests(lines: Lines, rows: Iterable[Row], form: PlainForm) -> Iterable[JobRequest]:
    """Yield the rows as requests, some of which have an error."""
    for number, row in enumerate(rows, start=1):
        request = JobRequest(line_number=number, digest=0, form=form)
        line = for_one_request(lines.line, row)
        parsed = line if isinstance(line, RequestError) else for_one_request(form.parse, request, line)
        yield request.refused(parsed) if isinstance(parsed, RequestError) else parsed


def _records(llm: RowModel, requests: Sequence[JobRequest], use_tqdm: bool | Callable[..., Any]) -> list[dict[str, Any]]:
    """Return the records of the requests in their order, as a job would write them."""
    found = [_checked(llm.model, each, tokens) for each, tokens in zip(requests, encode_prompts(llm.model, requests), strict=True)]
    good = [(request, tokens) for request, tokens in zip(requests, found, strict=True) if not isinstance(tokens, RequestError)]
    outputs = iter(_outputs(llm, good, use_tqdm))
    records: list[dict[str, Any]] = []
    for request, tokens in zip(requests, found, strict=True):
        failed = isinstance(tokens, RequestError)
        records.append(request.form.failure(request, tokens) if failed else _record(request, next(outputs)))
    return records


def _checked(model: ServedModel, request: JobRequest, tokens: Tokens | RequestError) -> Tokens | RequestError:
    """Return the tokens of a request that the model can serve, or its error."""
    if isinstance(tokens, RequestError):
        return tokens
    prompt, choices = tokens
    if request.choices:
        served = for_one_request(model.choice_requests, 0, prompt, choices)
    else:
        served = for_one_request(model.token_requests, 0, prompt, request.params)
    return served if isinstance(served, RequestError) else tokens


def _outputs(
    llm: RowModel, good: Sequence[tuple[JobRequest, Tokens]], use_tqdm: bool | Callable[..., Any]
) -> Sequence[RequestOutput | ClassificationRequestOutput]:
    if not good:
        return []
    ids = [{"prompt_token_ids": list(prompt)} for _, (prompt, _) in good]
    if good[0][0].choices:
        return llm.classify(ids, [[list(choice) for choice in choices] for _, (_, choices) in good], use_tqdm=use_tqdm)
    return llm.generate(ids, [request.params for request, _ in good], use_tqdm=use_tqdm)


def _record(request: JobRequest, output: RequestOutput | ClassificationRequestOutput) -> dict[str, Any]:
    if isinstance(output, ClassificationRequestOutput):
        return request.form.scored(request, output) if output.error is None else request.form.failure(request, output.error)
    (completion,) = output.outputs
    if completion.finish_reason == "error":
        return request.form.failure(request, RequestError(f"the answer failed: {completion.stop_reason}", code=str(completion.stop_reason)))
    return request.form.success(request, [output])
