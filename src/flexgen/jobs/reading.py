"""Turns lines into requests of the engine, a few lines at a time.  Keeps nothing of a line that it has yielded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flexgen.api.job_request import JobRequest
from flexgen.base.isolation import for_one_request
from flexgen.base.parameters import MAX_CHOICES
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.jobs.forms import Forms
from flexgen.jobs.lines import Line
from flexgen.jobs.model import JobModel
from flexgen.request import TokenRequest

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
            prompts = encode_prompts(self._model, requests, now=self._now)
            for request, ids in zip(requests, prompts, strict=True):
                found = ids if isinstance(ids, RequestError) else for_one_request(self._token_requests, request, ids)
                yield (request.refused(found), ()) if isinstance(found, RequestError) else (request, found)

    def _token_requests(self, request: JobRequest, ids: Sequence[int]) -> list[TokenRequest]:
        token_requests = self._model.token_requests(index_of(request.line_number), ids, request.params)
        self._check_length(request, token_requests[0])
        return token_requests

    def _check_length(self, request: JobRequest, first: TokenRequest) -> None:
        """Refuse a request whose answer would be cut below the `max_tokens` that the line states."""
        asked = request.params.max_tokens
        if request.states_max_tokens and asked is not None and first.max_tokens < asked:
            length, context = len(first.prompt_token_ids), self._model.max_model_len
            message = f"the prompt's {length} tokens and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")


def encode_prompts(model: JobModel, requests: Sequence[JobRequest], *, now: float | None = None) -> list[Sequence[int] | RequestError]:
    """Return the prompt of each request as token ids, or its error.

    Only a few texts are held at a time: rendered conversations are encoded before more are rendered.

    Args:
        model: The model, which renders conversations and encodes texts.
        requests: The requests, some of which may have an error already.
        now: The time that chat templates see, see `LLM.render_chats`.
    """
    prompts = [each.error or each.prompt for each in requests]
    ids: list[Sequence[int] | RequestError] = [() if isinstance(prompt, (str, Chat)) else prompt for prompt in prompts]
    texts = {at: prompt for at, prompt in enumerate(prompts) if isinstance(prompt, str)}
    chats = {at: prompt for at, prompt in enumerate(prompts) if isinstance(prompt, Chat)}
    for at, each in zip(texts, model.encode_each(texts.values()), strict=True):
        ids[at] = each
    rendered = model.render_chats(list(chats.values()), now=now)
    for at, each in zip(chats, model.encode_each(rendered, add_special_tokens=False), strict=True):
        ids[at] = each
    return ids


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
