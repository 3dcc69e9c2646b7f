"""Prompts to token ids, many at once: conversations are rendered, texts encoded.  Knows nothing of lines."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.api.fields import JobRequest
from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.llm import LLM


def encode_prompts(
    llm: LLM, requests: Sequence[JobRequest | RequestError], *, now: float | None = None
) -> list[Sequence[int] | RequestError]:
    """The prompt of each request as token ids, or why there is none; errors stay what they are.

    A few texts are held at a time: what is rendered is encoded before more is rendered.

    Args:
        now: the time that chat templates are told (see `LLM.render_chats`).
    """
    prompts = [request if isinstance(request, RequestError) else request.prompt for request in requests]
    ids: list[Sequence[int] | RequestError] = [() if isinstance(prompt, (str, Chat)) else prompt for prompt in prompts]
    texts = {place: prompt for place, prompt in enumerate(prompts) if isinstance(prompt, str)}
    chats = {place: prompt for place, prompt in enumerate(prompts) if isinstance(prompt, Chat)}
    for place, each in zip(texts, llm.encode_each(texts.values()), strict=True):
        ids[place] = each
    rendered = llm.render_chats(list(chats.values()), now=now)
    for place, each in zip(chats, llm.encode_each(rendered, add_special_tokens=False), strict=True):
        ids[place] = each
    return ids
