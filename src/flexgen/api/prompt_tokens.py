"""Encodes the prompts and choices of requests, a few texts at a time; a request that cannot be encoded has an error of its own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from flexgen.api.job_request import JobRequest
from flexgen.base.isolation import for_one_request
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.text.choices import texts_to_encode, tokens_at_seam

Tokens = tuple[Sequence[int], Sequence[Sequence[int]]]  # the token ids of a prompt, and of each of its choices
_NO_TEXT = RequestError("there is no text to encode")


class PromptModel(Protocol):
    """A model that renders conversations and encodes texts.  The members are those of `ServedModel`."""

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation, or the error that prevents it."""
        ...

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Yield the token ids of each text, or the error that prevents them."""
        ...


def encode_prompts(model: PromptModel, requests: Sequence[JobRequest], *, now: float | None = None) -> list[Tokens | RequestError]:
    """Return the prompt of each request as token ids, with the token ids of its choices, or its error.

    Only a few texts are held at a time: rendered conversations are encoded before more are rendered.

    Args:
        model: The model, which renders conversations and encodes texts.
        requests: The requests, some of which may have an error already.
        now: The time that chat templates see, see `ServedModel.render_chats`.
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
    model: PromptModel, requests: Sequence[JobRequest], prompts: Iterable[str | tuple[int, ...] | RequestError], *, add_special_tokens: bool
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
            yield for_one_request(tokens_at_seam, prompt, request.choices, [first, *rest] if own else [])
