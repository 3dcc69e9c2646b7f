"""The prompts of one call of an `LLM`: the engine's requests for them, the lengths of these, and an output for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from flexgen.plan.workload import Workload
from flexgen.request import (
    ClassificationRequestOutput,
    RequestOutput,
    SamplingParams,
    TokenRequest,
    TokenResult,
    most_likeliest,
)
from flexgen.text.answers import RequestTranslator
from flexgen.text.choices import Choice, classified, texts_to_encode, tokens_at_seam
from flexgen.text.common_prefixes import PrefixCensus
from flexgen.text.encoding import Encoder, ids_or_raise
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

    def workload(self, census: PrefixCensus | None) -> Workload:
        """Return the lengths of the requests; `census` counts their prompts, unless nothing is shared."""
        return Workload(
            prompt_lens=tuple(max(request.num_computed, 1) for request in self.requests),
            output_lens=tuple(request.max_tokens for request in self.requests),
            least_lens=tuple(request.least_tokens for request in self.requests),
            shared_lens=() if census is None else tuple(census.add(request.sharable, request.offered) for request in self.requests),
            scored_lens=tuple(request.num_scored for request in self.requests),
            may_end_early=any(request.may_end_early for request in self.requests),
            num_likeliest=most_likeliest(self.requests),
        )

    def outputs(self, results: Mapping[int, TokenResult]) -> list[_Output]:
        """Return the output for each prompt, from the results of all requests by their index."""
        return [output({each.index: results[each.index] for each in requests}) for requests, output in self._prompts]


def completion_batch(
    prompts: Prompt | Iterable[Prompt],
    params: SamplingParams | Iterable[SamplingParams],
    *,
    encoder: Encoder,
    translator: RequestTranslator,
    first_index: int,
) -> Batch[RequestOutput]:
    """Return the batch of prompts to continue.

    Args:
        prompts: One or several prompts, as for `LLM.generate`.
        params: One value for all prompts, or one for each.
        encoder: The encoder of prompts that are texts.
        translator: The translator between prompts, requests, results and outputs.
        first_index: The index of the first request.

    Raises:
        OptionError: There are not as many parameters as prompts.
        RequestError: A prompt or its parameters cannot be served; the message has its index.
    """
    read = texts_and_ids(prompts)
    batch: Batch[RequestOutput] = Batch(first_index)
    encoded = encoder.each([text for text, ids in read if text is not None and ids is None])
    for place, ((text, ids), own) in enumerate(zip(read, as_params(params, len(read)), strict=True)):
        with naming("prompt", place):
            found = ids if ids is not None else ids_or_raise(next(encoded))
            requests = translator.requests(batch.next_index, found, own)
        batch.add(requests, _completion_output(translator, own, found, text))
    return batch


def _completion_output(
    translator: RequestTranslator, params: SamplingParams, ids: Sequence[int], text: str | None
) -> Callable[[Mapping[int, TokenResult]], RequestOutput]:
    return lambda results: translator.shown(list(results.values()), params, ids, text)


def choice_batch(
    prompts: Prompt | Iterable[Prompt],
    choices: Iterable[Choice] | Iterable[Iterable[Choice]],
    *,
    encoder: Encoder,
    translator: RequestTranslator,
    first_index: int,
) -> Batch[ClassificationRequestOutput]:
    """Return the batch of prompts with choices to score.

    Args:
        prompts: One or several prompts, as for `LLM.classify`.
        choices: The choices of all prompts, or a list of them for each.
        encoder: The encoder of prompts and choices that are texts.
        translator: The translator between prompts, requests, results and outputs.
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
        with naming("prompt", place):
            texts.append(texts_to_encode(prompt, own))
    encoded = encoder.each([text for each in texts for text in each])
    batch: Batch[ClassificationRequestOutput] = Batch(first_index)
    for place, (prompt, own) in enumerate(zip(prompted, given, strict=True)):
        with naming("prompt", place):
            tokens = tokens_at_seam(prompt, own, [next(encoded) for _ in texts[place]])
            requests = translator.choice_requests(batch.next_index, *tokens)
        batch.add(requests, _choice_output(requests, read[place][0]))
    return batch


def _choice_output(requests: list[TokenRequest], text: str | None) -> Callable[[Mapping[int, TokenResult]], ClassificationRequestOutput]:
    return lambda results: classified(requests, results, text)
