"""A model's chat templates: which one renders, with which variables.  Knows neither tokenizers nor what becomes of the prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen.chat.messages import Chat, check_template_kwargs
from flexgen.chat.process import DEFAULT_LIMITS, TemplateProcess
from flexgen.errors import OptionError, RequestError

_SIGNS_OF_A_TEMPLATE = "{}\n"  # vLLM's rule: what has none of them is a path


class Templates:
    """Renders a model's conversations.

    Args:
        model: its name, for messages.
        own: the tokenizer's `chat_template`, as transformers found it: a text, texts by name, or None.
        special_tokens: bos_token, eos_token, ...
        given: in place of the model's default: a template, the file that holds one, or the name of one of the model's.
        max_chars: longest prompt that can be used; None is as long as templates may make it.
        kwargs: variables of all templates, unless a chat gives them another value.

    Attributes:
        text: the template; None where there is none.

    Raises:
        OptionError: `given` or `kwargs` are not what they should be.
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
        """The prompt of each conversation, or why it has none (see `TemplateProcess.render_each`)."""
        if self._process is not None:
            return self._process.render_each(chats, now=now)
        message = (
            f"{self._model} has no chat template, so it is probably not a chat model: "
            "give one (--chat-template, chat_template), or write a prompt instead of messages"
        )
        return iter([RequestError(message, code="no_chat_template", param="messages")] * len(chats))

    def prompts(self, chats: Sequence[Chat], given: str | os.PathLike[str] | None) -> list[str]:
        """The prompts of all conversations, by another template if one is given.

        Raises:
            RequestError: for the first that has none, by its place.
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
    """The template of a model where none is asked for; None where it has none, or several and no default."""
    template = own.get("default") if isinstance(own, Mapping) else own
    return template if isinstance(template, str) else None


def choose_template(given: str | os.PathLike[str], own: object) -> str:
    """The text of a template that is asked for: by itself, by its file, or by its name among the model's.

    Raises:
        OptionError: it is none of these.
    """
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
