"""What may be given as a prompt, by vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexgen.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_prompts(given: Prompt | Sequence[Prompt]) -> list[Any]:
    """Several prompts; a list of ids is one."""
    if isinstance(given, (str, Mapping)) or (len(given) > 0 and isinstance(given[0], int)):
        return [given]
    return list(given)


def text_and_ids(prompt: Any) -> tuple[str | None, Sequence[int] | None]:
    """Text and token ids of one prompt, whichever it has.

    Raises:
        RequestError: it has neither, or something that is not supported.
    """
    if isinstance(prompt, str):
        return prompt, None
    text, ids = None, prompt
    if isinstance(prompt, Mapping):
        if unknown := set(prompt) - {"prompt", "prompt_token_ids"}:
            raise RequestError(f"a prompt with {sorted(unknown)[0]!r} is not supported", param=sorted(unknown)[0])
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is None and isinstance(text, str):
        return text, None
    if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise RequestError("a prompt is text, a list of token ids, or a dict with prompt or prompt_token_ids", param="prompt")
    return text if isinstance(text, str) else None, ids
