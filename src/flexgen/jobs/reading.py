"""Turns lines into requests of the engine, a few lines at a time.  Keeps nothing of a line that it has yielded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from flexgen.api.job_request import JobRequest
from flexgen.api.prompt_tokens import Tokens, encode_prompts
from flexgen.base.isolation import for_one_request
from flexgen.base.parameters import MAX_CHOICES
from flexgen.base.quantities import counted
from flexgen.errors import RequestError
from flexgen.jobs.forms import Forms
from flexgen.jobs.lines import Line
from flexgen.jobs.model import JobModel
from flexgen.request import TokenRequest
from flexgen.text.prompts import naming

_BATCH_LINES = 256  # lines that are tokenised together, at most
_BATCH_BYTES = 4 << 20
_CHOICE_BITS = MAX_CHOICES.bit_length()


def index_of(line_number: int) -> int:
    """Return the engine's index of a line's first choice; those of the others follow.  Derived seeds depend on it."""
    return line_number << _CHOICE_BITS


def line_and_choice(index: int) -> tuple[int, int]:
    """Return the line number and the choice that belong to an index of the engine."""
    return index >> _CHOICE_BITS, index & ((1 << _CHOICE_BITS) - 1)


class Reader:
    """Turns lines into requests of the engine.

    Args:
        model: The model, which encodes prompts and resolves parameters.
        forms: The parser of lines.
        now: The time that chat templates see, in seconds since 1970; None for the current time.
    """

    def __init__(self, model: JobModel, forms: Forms, *, now: float | None = None) -> None:
        self._model, self._forms, self._now = model, forms, now

    def read(self, lines: Iterable[Line]) -> Iterator[tuple[JobRequest, Sequence[TokenRequest]]]:
        """Yield every line in order, with the engine's requests for its choices: none where the line ends in an error."""
        for batch in _batches(lines):
            requests = [self._forms.parse(line) for line in batch]
            parts = [request.of_each_prompt() for request in requests]
            prompts = iter(encode_prompts(self._model, list(itertools.chain(*parts)), now=self._now))
            for request, alone in zip(requests, parts, strict=True):
                found = for_one_request(self._for_engine, request, list(itertools.islice(prompts, len(alone))))
                yield (request.refused(found), ()) if isinstance(found, RequestError) else found

    def _for_engine(self, request: JobRequest, prompts: Sequence[Tokens | RequestError]) -> tuple[JobRequest, list[TokenRequest]]:
        """Return a line whose parameters are complete, and the engine's requests for its prompts, one prompt after another."""
        if request.tools is not None:
            request = dataclasses.replace(request, params=self._model.tool_params(request.params, request.tools))
        if len(prompts) == 1:
            return request, self._of_prompt(request, index_of(request.line_number), prompts[0])
        token_requests: list[TokenRequest] = []
        for place, tokens in enumerate(prompts):
            with naming(f"prompt[{place}]"):
                token_requests += self._of_prompt(request, index_of(request.line_number) + len(token_requests), tokens)
        return request, token_requests

    def _of_prompt(self, request: JobRequest, index: int, tokens: Tokens | RequestError) -> list[TokenRequest]:
        if isinstance(tokens, RequestError):
            raise tokens
        prompt, choices = tokens
        if choices:
            return self._model.choice_requests(index, prompt, choices)
        token_requests = self._model.token_requests(index, prompt, request.params)
        self._check_length(request, prompt)
        return token_requests

    def _check_length(self, request: JobRequest, prompt: Sequence[int]) -> None:
        """Refuse a request whose answer would be cut below the `max_tokens` that the line states."""
        asked = request.params.max_tokens
        length, context = len(prompt), self._model.max_model_len
        if request.states_max_tokens and asked is not None and length + asked > context:
            message = f"the prompt's {counted(length, 'token')} and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Yield a few lines at a time, fewer where they are long."""
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
