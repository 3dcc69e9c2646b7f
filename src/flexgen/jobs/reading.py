"""From lines to what the engine is asked, a few lines at a time.  Keeps nothing of a line that it has handed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flexgen.errors import RequestError
from flexgen.jobs.fields import Form, JobRequest, Origin
from flexgen.jobs.lines import Line, parse_object
from flexgen.jobs.openai import OpenAIForm, is_batch_line
from flexgen.jobs.plain import PlainForm
from flexgen.llm import LLM
from flexgen.request import SamplingParams, TokenRequest

_BATCH_LINES = 256  # tokenised together
_BATCH_BYTES = 4 << 20
_CHOICE_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A line that can be answered.

    Attributes:
        token_requests: one for every choice.
    """

    origin: Origin
    form: Form
    request: JobRequest
    token_requests: Sequence[TokenRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A line that cannot."""

    origin: Origin
    form: Form
    error: RequestError


def index_of(line_number: int) -> int:
    """The engine's index of a line's first choice; the others follow.  Seeds that are not given depend on it."""
    return line_number << _CHOICE_BITS


def place_of(index: int) -> tuple[int, int]:
    """(line number, choice) of an index."""
    return index >> _CHOICE_BITS, index & ((1 << _CHOICE_BITS) - 1)


class Reader:
    """Reads lines for a model.

    Args:
        model: the name that answers carry. created: seconds since 1970 that answers carry.
        defaults: of bare lines (OpenAI lines have the hosted API's).
    """

    def __init__(self, llm: LLM, *, model: str, created: int, defaults: SamplingParams) -> None:
        self._llm = llm
        self._plain = PlainForm(defaults=defaults)
        self._openai = OpenAIForm(model=model, created=created)

    def read(self, lines: Iterable[Line]) -> Iterator[Served | Refused]:
        """Every line, in order."""
        for batch in _batches(lines):
            yield from self._tokenised([self._parse(line) for line in batch])

    def _parse(self, line: Line) -> tuple[Origin, Form, JobRequest | RequestError]:
        form: Form = self._plain
        identity = None
        request: JobRequest | RequestError
        try:
            fields = parse_object(line)
            form = self._openai if is_batch_line(fields) else self._plain
            identity = form.identity(fields)
            request = form.parse(fields)
        except RequestError as error:
            request = error
        return Origin(line_number=line.number, digest=line.digest, id=identity), form, request

    def _tokenised(self, batch: list[tuple[Origin, Form, JobRequest | RequestError]]) -> Iterator[Served | Refused]:
        prompts = [request.prompt for _, _, request in batch if isinstance(request, JobRequest)]
        has_tokenizer = self._llm.tokenizer is not None
        encoded = iter(self._llm.encode([prompt for prompt in prompts if isinstance(prompt, str)]) if has_tokenizer else ())
        for origin, form, request in batch:
            try:
                if isinstance(request, RequestError):
                    raise request
                prompt = request.prompt
                ids = prompt if isinstance(prompt, tuple) else next(encoded) if has_tokenizer else self._llm.encode([prompt])[0]
                token_requests = self._token_requests(origin.line_number, tuple(ids), request)
                yield Served(origin=origin, form=form, request=request, token_requests=token_requests)
            except RequestError as error:
                yield Refused(origin=origin, form=form, error=error)

    def _token_requests(self, line_number: int, ids: tuple[int, ...], request: JobRequest) -> list[TokenRequest]:
        token_requests = self._llm.token_requests(index_of(line_number), ids, request.params)
        asked = request.params.max_tokens
        if request.states_max_tokens and asked is not None and token_requests[0].max_tokens < asked:
            context = self._llm.max_model_len
            message = f"the prompt's {len(ids)} tokens and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")
        return token_requests


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """A few lines at a time, fewer where they are long."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.content or b"")
        if len(batch) >= _BATCH_LINES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
