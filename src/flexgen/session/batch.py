"""The prompts of one call of `LLM.generate`: the engine's requests for them, the lengths of these, and vLLM's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexgen.plan.workload import Workload
from flexgen.request import RequestOutput, SamplingParams, TokenRequest, TokenResult
from flexgen.text.answers import RequestTranslator
from flexgen.text.common_prefixes import PrefixCensus
from flexgen.text.encoding import Encoder, ids_or_raise
from flexgen.text.prompts import Prompt, as_params, naming, texts_and_ids


class Batch:
    """Prompts that are answered together.

    Args:
        prompts: One or several prompts, as for `LLM.generate`.
        params: One value for all prompts, or one for each.
        encoder: The encoder of prompts that are texts.
        translator: The translator between prompts, requests, results and outputs.
        first_index: The index of the first request.

    Attributes:
        requests: The requests for all answers, in the order of the prompts.

    Raises:
        OptionError: There are not as many parameters as prompts.
        RequestError: A prompt or its parameters cannot be served; the message has its index.
    """

    def __init__(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams],
        *,
        encoder: Encoder,
        translator: RequestTranslator,
        first_index: int,
    ) -> None:
        read = texts_and_ids(prompts)
        self._texts, self._params, self._translator = [text for text, _ in read], as_params(params, len(read)), translator
        self._of_prompt: list[list[TokenRequest]] = []
        self.requests: list[TokenRequest] = []
        encoded = encoder.each([text for text, ids in read if text is not None and ids is None])
        for place, (_, ids) in enumerate(read):
            with naming("prompt", place):
                found = ids if ids is not None else ids_or_raise(next(encoded))
                self._of_prompt.append(translator.requests(first_index + len(self.requests), found, self._params[place]))
            self.requests += self._of_prompt[-1]

    def workload(self, census: PrefixCensus | None) -> Workload:
        """Return the lengths of the requests; `census` counts their prompts, unless nothing is shared."""
        return Workload(
            prompt_lens=tuple(len(request.prompt_token_ids) for request in self.requests),
            output_lens=tuple(request.max_tokens for request in self.requests),
            may_end_early=any(request.may_end_early for request in self.requests),
            shared_lens=() if census is None else tuple(census.add(request.sharable) for request in self.requests),
        )

    def outputs(self, results: Mapping[int, TokenResult]) -> list[RequestOutput]:
        """Return the output for each prompt, from the results by the index of their request."""
        return [
            RequestOutput(
                request_id=str(requests[0].index),
                prompt=text,
                prompt_token_ids=requests[0].prompt_token_ids,
                outputs=self._translator.shown([results[each.index] for each in requests], params, requests[0].prompt_token_ids),
            )
            for requests, text, params in zip(self._of_prompt, self._texts, self._params, strict=True)
        ]
