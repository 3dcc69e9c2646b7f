"""Prompts to token ids, many at once: conversations are rendered, texts encoded.  Knows nothing of lines."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.jobs.fields import JobRequest
from flexgen.llm import LLM


def encode_prompts(
    llm: LLM, requests: Sequence[JobRequest | RequestError], *, now: float | None = None
) -> list[Sequence[int] | RequestError]:
    """The prompt of each request as token ids, or why there is none; errors stay what they are.

    Args:
        now: the time that chat templates are told (see `LLM.render_chats`).
    """
    prompts = [request if isinstance(request, RequestError) else request.prompt for request in requests]
    rendered = iter(llm.render_chats([prompt for prompt in prompts if isinstance(prompt, Chat)], now=now))
    texts = [next(rendered) if isinstance(prompt, Chat) else prompt for prompt in prompts]
    ids: list[Sequence[int] | RequestError] = [text if not isinstance(text, str) else () for text in texts]
    for are_chats in (False, True):
        places = [place for place, text in enumerate(texts) if isinstance(text, str) and isinstance(prompts[place], Chat) == are_chats]
        encoded = _encoded(llm, [str(texts[place]) for place in places], add_special_tokens=not are_chats)
        for place, each in zip(places, encoded, strict=True):
            ids[place] = each
    return ids


def _encoded(llm: LLM, texts: list[str], *, add_special_tokens: bool) -> list[Sequence[int] | RequestError]:
    try:
        return list(llm.encode(texts, add_special_tokens=add_special_tokens))
    except RequestError as error:
        if len(texts) == 1:
            return [error]
    return [each for text in texts for each in _encoded(llm, [text], add_special_tokens=add_special_tokens)]
