"""The prompts of one call of an `LLM`: the engine's requests for them, their results, and an output for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flexgen.outputs import ClassificationRequestOutput, RequestOutput
from flexgen.request import SamplingParams, TokenRequest, TokenResult
from flexgen.session.lengths import RequestLengths
from flexgen.session.served import ServedModel
from flexgen.text.answers import RequestTranslator
from flexgen.text.choices import Choice, classified, texts_to_encode, tokens_at_seam
from flexgen.text.encoding import ids_or_raise
from flexgen.text.prompts import Prompt, as_choices, as_params, naming, texts_and_ids

_Output = TypeVar("_Output")


class Batch(Generic[_Output]):
    """Prompts that are answered together.

    Args:
        first_index: The index of the first request.

    Attributes:
        requests: The requests for all prompts, in their order.
        next_index: The index of the next request, after those of the batch.
    """

    def __init__(self, first_index: int) -> None:
        self.requests: list[TokenRequest] = []
        self.next_index = first_index
        self._prompts: list[tuple[list[TokenRequest], Callable[[Mapping[int, TokenResult]], _Output]]] = []

    def add(self, requests: list[TokenRequest], output: Callable[[Mapping[int, TokenResult]], _Output]) -> None:
        """Add a prompt.

        Args:
            requests: The engine's requests for the prompt.
            output: A function that makes the output from the results of these requests by their index.
        """
        self.requests += requests
        self.next_index = requests[-1].index + 1
        self._prompts.append((requests, output))

    def answer(self, model: ServedModel, use_tqdm: bool | Callable[..., Any] = False) -> list[_Output]:
        """Answer the prompts in a turn that the caller has taken, and return the output for each of them.

        Args:
            model: The model.
            use_tqdm: Whether to draw a progress bar on stderr; a callable is called in place of tqdm.
        """
        if not self.requests:
            return []
        lengths = RequestLengths(model.prefix_census())
        for request in self.requests:
            lengths.add(request)
        workload = lengths.workload()
        run = model.run(self.requests, workload, prefixes=lengths.common_prefixes())
        results = {result.index: result for result in _with_bar(run, len(workload), use_tqdm)}
        return [output({each.index: results[each.index] for each in requests}) for requests, output in self._prompts]


def completion_batch(
    prompts: Prompt | Iterable[Prompt],
    params: SamplingParams | Iterable[SamplingParams],
    model: ServedModel,
    *,
    first_index: int,
) -> Batch[RequestOutput]:
    """Return the batch of prompts to continue.

    Args:
        prompts: One or several prompts, as for `LLM.generate`.
        params: One value for all prompts, or one for each.
        model: The model.
        first_index: The index of the first request.

    Raises:
        OptionError: There are not as many parameters as prompts.
        RequestError: A prompt or its parameters cannot be served; the message has its index.
    """
    read = texts_and_ids(prompts)
    batch: Batch[RequestOutput] = Batch(first_index)
    encoded = model.encode_each([text for text, ids in read if text is not None and ids is None])
    for place, ((text, ids), own) in enumerate(zip(read, as_params(params, len(read)), strict=True)):
        with naming(f"prompt {place}"):
            found = ids if ids is not None else ids_or_raise(next(encoded))
            requests = model.token_requests(batch.next_index, found, own)
        batch.add(requests, _completion_output(model.translator, own, found, text))
    return batch


def _completion_output(
    translator: RequestTranslator, params: SamplingParams, ids: Sequence[int], text: str | None
) -> Callable[[Mapping[int, TokenResult]], RequestOutput]:
    return lambda results: translator.shown(list(results.values()), params, ids, text)


def choice_batch(
    prompts: Prompt | Iterable[Prompt],
    choices: Iterable[Choice] | Iterable[Iterable[Choice]],
    model: ServedModel,
    *,
    first_index: int,
) -> Batch[ClassificationRequestOutput]:
    """Return the batch of prompts with choices to score.

    Args:
        prompts: One or several prompts, as for `LLM.classify`.
        choices: The choices of all prompts, or a list of them for each.
        model: The model.
        first_index: The index of the first request.

    Raises:
        OptionError: There are not as many lists of choices as prompts.
        RequestError: A prompt or a choice cannot be served; the message has the index of the prompt.
    """
    read = texts_and_ids(prompts)
    prompted = [text if ids is None and text is not None else ids or () for text, ids in read]
    given = as_choices(choices, len(read))
    texts: list[list[str]] = []
    for place, (prompt, own) in enumerate(zip(prompted, given, strict=True)):
        with naming(f"prompt {place}"):
            texts.append(texts_to_encode(prompt, own))
    encoded = model.encode_each([text for each in texts for text in each])
    batch: Batch[ClassificationRequestOutput] = Batch(first_index)
    for place, (prompt, own) in enumerate(zip(prompted, given, strict=True)):
        with naming(f"prompt {place}"):
            tokens = tokens_at_seam(prompt, own, [next(encoded) for _ in texts[place]])
            requests = model.choice_requests(batch.next_index, *tokens)
        batch.add(requests, _choice_output(requests, read[place][0]))
    return batch


def _choice_output(requests: list[TokenRequest], text: str | None) -> Callable[[Mapping[int, TokenResult]], ClassificationRequestOutput]:
    return lambda results: classified(requests, results, text)


def _with_bar(results: Iterator[TokenResult], count: int, use_tqdm: bool | Callable[..., Any]) -> Iterator[TokenResult]:
    if not use_tqdm:
        return results
    from tqdm.auto import tqdm  # a dependency of transformers and of the hub library

    make = use_tqdm if callable(use_tqdm) else tqdm
    return iter(make(results, total=count, desc="Processed prompts", unit="request"))
