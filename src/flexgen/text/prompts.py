"""Reads the forms in which prompts and their parameters may be given, by vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from flexgen.base.quantities import counted
from flexgen.base.scalars import as_int, as_list, shown_in_python
from flexgen.errors import OptionError, RequestError
from flexgen.request import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


@runtime_checkable
class _Table(Protocol):
    """A data frame: iterating over one yields its column names, which are never the prompts that were meant."""

    columns: Any


def as_prompts(given: Prompt | Iterable[Prompt]) -> list[Any]:
    """Return the prompts as a list; a single prompt, such as a sequence of token ids, becomes a list of one.

    Raises:
        RequestError: The value holds no prompts.
    """
    if isinstance(given, (str, Mapping)):
        return [given]
    prompts = None if isinstance(given, _Table) else as_list(given)
    if prompts is None:
        wanted = "a text, token ids, a dict with prompt or prompt_token_ids, or several of these"
        message = f"prompts must be {wanted}, not {shown_in_python(given)}"
        raise RequestError(f"{message}; of a table give one column" if isinstance(given, _Table) else message, param="prompt")
    return [prompts] if prompts and as_int(prompts[0]) is not None else prompts


@contextmanager
def naming(which: str) -> Iterator[None]:
    """Make errors of requests name the one of several that they belong to, such as "prompt 3" or "choices[0]"."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{which}: {error}", code=error.code, param=error.param) from error


def texts_and_ids(given: Prompt | Iterable[Prompt]) -> list[tuple[str | None, list[int] | None]]:
    """Return the text and the token ids of every prompt; None for the one that it does not have.

    Raises:
        RequestError: A prompt has neither, or something that is not supported; the message has its index.
    """
    read: list[tuple[str | None, list[int] | None]] = []
    for index, prompt in enumerate(as_prompts(given)):
        with naming(f"prompt {index}"):
            read.append(text_and_ids(prompt))
    return read


def text_and_ids(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Return the text and the token ids of one prompt; None for the one that it does not have.

    Raises:
        RequestError: The prompt has neither, or something that is not supported.
    """
    text, given = prompt, prompt
    if isinstance(prompt, Mapping):
        if unknown := set(prompt) - {"prompt", "prompt_token_ids"}:
            name = str(min(unknown, key=str))
            raise RequestError(f"a prompt with {name!r} is not supported", param=name)
        text, given = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if isinstance(text, str) and (given is None or given is text):
        return str(text), None
    ids = _ids(given)
    if ids is None:
        message = f"a prompt is text, a list of token ids, or a dict with prompt or prompt_token_ids, not {shown_in_python(prompt)}"
        raise RequestError(message, param="prompt")
    return str(text) if isinstance(text, str) else None, ids


def _ids(given: object) -> list[int] | None:
    listed = as_list(given)
    if listed is None or all(type(each) is int for each in listed):
        return listed
    ids = [token_id for each in listed if (token_id := as_int(each)) is not None]
    return ids if len(ids) == len(listed) else None


def as_texts(given: str | Iterable[str]) -> list[str]:
    """Return the texts as a list; a single text becomes a list of one.

    Raises:
        RequestError: An item is not a text; the message has its index.
    """
    texts = [given] if isinstance(given, str) else None if isinstance(given, _Table) else as_list(given)
    if texts is None:
        raise RequestError(f"texts must be a text or several texts, not {shown_in_python(given)}", param="prompt")
    for index, each in enumerate(texts):
        if not isinstance(each, str):
            raise RequestError(f"text {index} must be a text, not {shown_in_python(each)}", param="prompt")
    return [str(each) for each in texts]


def as_params(given: SamplingParams | Iterable[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    """Return the sampling parameters of each prompt.

    Raises:
        OptionError: Their number differs from that of the prompts, or an item is not a SamplingParams.
    """
    if isinstance(given, SamplingParams):
        return [given] * num_prompts
    params = as_list(given)
    if params is None:
        raise OptionError(f"sampling_params must be a SamplingParams, or one for each prompt, not {shown_in_python(given)}")
    if len(params) != num_prompts:
        raise OptionError(f"{len(params):,} sampling_params for {counted(num_prompts, 'prompt')}")
    for index, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise OptionError(f"sampling_params {index} must be a SamplingParams, not {shown_in_python(each)}")
    return params


def as_choices(given: Any, num_prompts: int) -> list[list[str | list[int]]]:
    """Return the choices of each prompt: texts, or token ids.

    Args:
        given: Choices for all prompts, or a list of choices for each.
        num_prompts: The number of prompts.

    Raises:
        OptionError: There are as many lists as neither one nor the prompts, or an item is not a choice.
    """
    listed = None if isinstance(given, (str, _Table)) else as_list(given)
    if not listed:
        raise OptionError(f"choices must be a list of texts, or such a list for each prompt, not {shown_in_python(given)}")
    own = [_choices(each) for each in listed]
    if all(each is not None for each in own):  # lists of choices
        if len(own) != num_prompts:
            raise OptionError(f"{counted(len(own), 'list')} of choices for {counted(num_prompts, 'prompt')}")
        return [each for each in own if each is not None]
    found = _choices(listed)
    if found is None:
        raise OptionError(f"choices must be texts, or lists of token ids, not {shown_in_python(given)}")
    return [found] * num_prompts


def _choices(given: object) -> list[str | list[int]] | None:
    """Return choices as texts and lists of token ids; None if an item is neither, or there are none."""
    listed = None if isinstance(given, str) else as_list(given)
    choices = [str(each) if isinstance(each, str) else _ids(each) for each in listed or ()]
    found = [each for each in choices if each]
    return found if found and len(found) == len(choices) else None


def as_conversations(given: object) -> object:
    """Return a conversation, or several, with lists in place of other sequences; a value that is not a sequence is returned as it is."""
    conversations = None if isinstance(given, _Table) else as_list(given)
    if conversations is None:
        return given
    return [each if isinstance(each, Mapping) or (listed := as_list(each)) is None else listed for each in conversations]
