"""From lines to what the engine is asked, a few lines at a time.  Keeps nothing of a line that it has handed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flexgen.api.fields import Form, JobRequest, Origin
from flexgen.base.isolation import for_one_request
from flexgen.base.parameters import MAX_CHOICES
from flexgen.errors import RequestError
from flexgen.jobs.forms import Forms
from flexgen.jobs.lines import Line
from flexgen.jobs.prompts import encode_prompts
from flexgen.llm import LLM
from flexgen.request import TokenRequest

_BATCH_LINES = 256  # tokenised together
_BATCH_BYTES = 4 << 20
_CHOICE_BITS = MAX_CHOICES.bit_length()


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
        forms: how lines are understood.
        now: the time that chat templates are told, in seconds since 1970; None is the clock's.
    """

    def __init__(self, llm: LLM, forms: Forms, *, now: float | None = None) -> None:
        self._llm, self._forms, self._now = llm, forms, now

    def read(self, lines: Iterable[Line]) -> Iterator[Served | Refused]:
        """Every line, in order."""
        for batch in _batches(lines):
            parsed = [self._forms.parse(line) for line in batch]
            prompts = encode_prompts(self._llm, [request for _, _, request in parsed], now=self._now)
            for (origin, form, request), ids in zip(parsed, prompts, strict=True):
                yield self._served(origin, form, request, ids)

    def _served(
        self, origin: Origin, form: Form, request: JobRequest | RequestError, ids: Sequence[int] | RequestError
    ) -> Served | Refused:
        if isinstance(request, RequestError):
            return Refused(origin=origin, form=form, error=request)
        if isinstance(ids, RequestError):
            return Refused(origin=origin, form=form, error=ids)
        asked = for_one_request(self._token_requests, origin, request, ids)
        if isinstance(asked, RequestError):
            return Refused(origin=origin, form=form, error=asked)
        return Served(origin=origin, form=form, request=request, token_requests=asked)

    def _token_requests(self, origin: Origin, request: JobRequest, ids: Sequence[int]) -> list[TokenRequest]:
        token_requests = self._llm.token_requests(index_of(origin.line_number), ids, request.params)
        self._check_length(request, token_requests[0])
        return token_requests

    def _check_length(self, request: JobRequest, first: TokenRequest) -> None:
        """A length that the line states is never cut."""
        asked = request.params.max_tokens
        if request.states_max_tokens and asked is not None and first.max_tokens < asked:
            length, context = len(first.prompt_token_ids), self._llm.max_model_len
            message = f"the prompt's {length} tokens and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")


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
