"""The choice of a model's chat template and its variables.  Knows neither tokenizers nor what becomes of the prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen.base.scalars import shown_in_python
from flexgen.chat.messages import Chat, check_template_kwargs
from flexgen.chat.process import DEFAULT_LIMITS, TemplateProcess
from flexgen.errors import OptionError, RequestError

_SIGNS_OF_A_TEMPLATE = "{}\n"  # vLLM's rule: what has none of them is a path


class Templates:
    """Renders a model's conversations.

    Args:
        model: The model's name, for messages.
        own: The tokenizer's `chat_template` as transformers found it: a text, texts by name, or None.
        special_tokens: Special tokens as text, by name (bos_token, eos_token, ...).
        given: What replaces the model's default: a template, the file that holds one, or the name of one of the model's.
        kwargs: Variables of all templates, unless a chat gives them another value.
        max_chars: Length of the longest prompt that can be used; None is as long as templates may make it.

    Attributes:
        text: The template; None if there is none.

    Raises:
        OptionError: `given` or `kwargs` cannot be used.
    """

    def __init__(
        self,
        model: str,
        own: object,
        special_tokens: Mapping[str, str],
        *,
        given: str | os.PathLike[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
    ) -> None:
        try:
            check_template_kwargs(kwargs or {})
            json.dumps(kwargs)
        except (RequestError, TypeError, ValueError) as error:
            raise OptionError(f"chat_template_kwargs: {error}") from error
        self._model, self._own = model, own
        self._variables = {**special_tokens, **(kwargs or {})}
        self.text = choose_template(given, own) if given is not None else default_template(own)
        most = DEFAULT_LIMITS.output_chars
        self._limits = dataclasses.replace(DEFAULT_LIMITS, output_chars=most if max_chars is None else min(most, max_chars))
        self._process = self._open(self.text) if self.text is not None else None

    def render(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation, or its error (see `TemplateProcess.render_each`)."""
        if self._process is not None:
            return self._process.render_each(chats, now=now)
        message = (
            f"{self._model} has no chat template, so it is probably not a chat model: "
            "give one (--chat-template, chat_template), or write a prompt instead of messages"
        )
        return iter([RequestError(message, code="no_chat_template", param="messages")] * len(chats))

    def prompts(self, chats: Sequence[Chat], given: str | os.PathLike[str] | None) -> list[str]:
        """Return the prompts of all conversations, by another template if one is given.

        Raises:
            RequestError: A conversation has no prompt; the error is that of the first, with its number.
        """
        if given is None:
            return _unless_errors(self.render(chats))
        with self._open(choose_template(given, self._own)) as process:
            return _unless_errors(process.render_each(chats))

    def _open(self, template: str) -> TemplateProcess:
        return TemplateProcess(template, self._variables, limits=self._limits)

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process is not None:
            self._process.close()


def _unless_errors(results: Iterable[str | RequestError]) -> list[str]:
    prompts: list[str] = []
    for place, result in enumerate(results):
        if isinstance(result, RequestError):
            raise RequestError(f"conversation {place}: {result}", code=result.code, param=result.param) from result
        prompts.append(result)
    return prompts


def default_template(own: object) -> str | None:
    """Return the template that is used when none is asked for.

    The result is None if the model has no template, or several and none of them is the default.
    """
    template = own.get("default") if isinstance(own, Mapping) else own
    return template if isinstance(template, str) else None


def choose_template(given: object, own: object) -> str:
    """Return the text of a template that is given as text, as a file, or by its name among the model's.

    Raises:
        OptionError: It is none of these.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"chat_template must be a template, or a file, not {shown_in_python(given)}")
    named = own if isinstance(own, Mapping) else {}
    if isinstance(given, str):
        if isinstance(named.get(given), str):
            return named[given]
        if any(sign in given for sign in _SIGNS_OF_A_TEMPLATE):
            return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        names = f", or one of the model's: {', '.join(named)}" if named else ""
        why = (isinstance(error, OSError) and error.strerror) or error
        raise OptionError(
            f"the chat template {os.fspath(given)!r} cannot be read ({why}): give a file or the template itself{names}"
        ) from error
