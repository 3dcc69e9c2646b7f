"""Turns lines into requests of the engine, a few lines at a time.  Keeps nothing of a line that it has yielded."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
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
from flexgen.text.choices import Choice, texts_to_encode, tokens_at_seam
from flexgen.text.encoding import ids_or_raise

Tokens = tuple[Sequence[int], Sequence[Sequence[int]]]  # the token ids of a prompt, and of each of its choices
_BATCH_LINES = 256  # lines that are tokenised together, at most
_BATCH_BYTES = 4 << 20
_CHOICE_BITS = MAX_CHOICES.bit_length()
_NO_TEXT = RequestError("there is no text to encode")


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
            for request, tokens in zip(requests, prompts, strict=True):
                found = tokens if isinstance(tokens, RequestError) else for_one_request(self._for_engine, request, tokens)
                yield (request.refused(found), ()) if isinstance(found, RequestError) else found

    def _for_engine(self, request: JobRequest, tokens: Tokens) -> tuple[JobRequest, list[TokenRequest]]:
        """Return a line whose parameters are complete, and the engine's requests for it."""
        index, (prompt, choices) = index_of(request.line_number), tokens
        if request.choices:
            return request, self._model.choice_requests(index, prompt, choices)
        if request.tools is not None:
            request = dataclasses.replace(request, params=self._model.tool_params(request.params, request.tools))
        token_requests = self._model.token_requests(index, prompt, request.params)
        self._check_length(request, prompt)
        return request, token_requests

    def _check_length(self, request: JobRequest, prompt: Sequence[int]) -> None:
        """Refuse a request whose answer would be cut below the `max_tokens` that the line states."""
        asked = request.params.max_tokens
        length, context = len(prompt), self._model.max_model_len
        if request.states_max_tokens and asked is not None and length + asked > context:
            message = f"the prompt's {length} tokens and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")


def encode_prompts(model: JobModel, requests: Sequence[JobRequest], *, now: float | None = None) -> list[Tokens | RequestError]:
    """Return the prompt of each request as token ids, with the token ids of its choices, or its error.

    Only a few texts are held at a time: rendered conversations are encoded before more are rendered.

    Args:
        model: The model, which renders conversations and encodes texts.
        requests: The requests, some of which may have an error already.
        now: The time that chat templates see, see `LLM.render_chats`.
    """
    found: list[Tokens | RequestError] = [each.error or ((), ()) for each in requests]
    chats = {at: each for at, each in enumerate(requests) if each.error is None and isinstance(each.prompt, Chat)}
    others = {at: each for at, each in enumerate(requests) if each.error is None and not isinstance(each.prompt, Chat)}
    rendered = model.render_chats([each.prompt for each in chats.values() if isinstance(each.prompt, Chat)], now=now)
    given = (each.prompt for each in others.values() if not isinstance(each.prompt, Chat))
    found_others = _encoded(model, list(others.values()), given, add_special_tokens=True)
    found_chats = _encoded(model, list(chats.values()), rendered, add_special_tokens=False)
    for at, each in itertools.chain(zip(others, found_others, strict=True), zip(chats, found_chats, strict=True)):
        found[at] = each
    return found


def _encoded(
    model: JobModel, requests: Sequence[JobRequest], prompts: Iterable[str | tuple[int, ...] | RequestError], *, add_special_tokens: bool
) -> Iterator[Tokens | RequestError]:
    """Yield the tokens of each request, whose prompts are pulled a few at a time."""
    pulled: deque[tuple[str | tuple[int, ...], list[str] | RequestError]] = deque()  # prompts, each with the texts to encode for it

    def texts() -> Iterator[str | RequestError]:
        for request, prompt in zip(requests, prompts, strict=True):
            own = prompt if isinstance(prompt, RequestError) else for_one_request(texts_to_encode, prompt, request.choices)
            pulled.append(("" if isinstance(prompt, RequestError) else prompt, own))
            yield from [own] if isinstance(own, RequestError) else own or [_NO_TEXT]  # at least one item for each request

    encoded = model.encode_each(texts(), add_special_tokens=add_special_tokens)
    for request, first in zip(requests, encoded, strict=False):
        prompt, own = pulled.popleft()
        if isinstance(own, RequestError):
            yield own
        else:
            rest = list(itertools.islice(encoded, max(len(own) - 1, 0)))
            yield for_one_request(_tokens, prompt, request.choices, [first, *rest] if own else [])


def _tokens(prompt: str | tuple[int, ...], choices: Sequence[Choice], encoded: Sequence[list[int] | RequestError]) -> Tokens:
    return tokens_at_seam(prompt, choices, [ids_or_raise(each) for each in encoded])


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
