"""Scores given continuations of a prompt: the tokens of each where it meets the prompt, the engine's requests, and the result.

A choice is what may follow a prompt, such as a label.  Its log probability is the sum over its tokens.  The prompt is computed once: its
request scores the first tokens of all choices as alternatives of each other, and each choice of several tokens has a request of its own,
which shares the prompt's pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flexgen.errors import RequestError
from flexgen.request import ClassificationOutput, ClassificationRequestOutput, TokenRequest, TokenResult

Choice = str | Sequence[int]


def texts_to_encode(prompt: str | Sequence[int], choices: Sequence[Choice]) -> list[str]:
    """Return the texts whose token ids `tokens_at_seam` needs: the prompt, then the prompt with each choice.

    Spaces at the end of the prompt count as the beginning of each choice, because most tokenizers join a space with the word after it
    (lm-evaluation-harness does the same, `TemplateLM._encode_pair`).

    Args:
        prompt: The prompt, text or token ids.
        choices: The choices, all of them texts or all of them token ids.

    Raises:
        RequestError: The choices are texts and the prompt is not, or only some of them are texts.
    """
    words = [choice for choice in choices if isinstance(choice, str)]
    if words and (len(words) < len(choices) or not isinstance(prompt, str)):
        raise RequestError("choices are texts after a prompt that is text, or token ids", param="choices")
    if not isinstance(prompt, str):
        return []
    return [prompt.rstrip(), *(prompt + word for word in words)] if words else [prompt]


def tokens_at_seam(
    prompt: str | Sequence[int], choices: Sequence[Choice], encoded: Sequence[Sequence[int]]
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """Return the tokens of a prompt and of each choice: those of the whole text beyond as many as the prompt has.

    Args:
        prompt: The prompt, text or token ids.
        choices: The choices.
        encoded: The token ids of `texts_to_encode`.

    Raises:
        RequestError: A choice adds no token to the prompt.
    """
    assert encoded or not isinstance(prompt, str)
    context: Sequence[int] = encoded[0] if encoded else prompt  # pyright: ignore[reportAssignmentType]
    found = [whole[len(context) :] for whole in encoded[1:]] or [choice for choice in choices if not isinstance(choice, str)]
    for index, each in enumerate(found):
        if not each:
            raise RequestError(f"choice {index} adds no token to the prompt", param="choices")
    return context, found


def choice_requests(index: int, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
    """Return the engine's requests for the choices after a prompt.

    Args:
        index: The index of the prompt's own request; that of choice i has the index `index + 1 + i`.
        context: The token ids of the prompt, at least one.
        choices: The token ids of each choice, at least one.
    """
    prompt = tuple(context)
    own = TokenRequest(
        index=index, prompt_token_ids=prompt, max_tokens=0, num_prompt_logprobs=1, first_scored=len(prompt),
        alternatives=tuple(choice[0] for choice in choices),
    )  # fmt: skip
    longer = [
        TokenRequest(
            index=index + 1 + place, prompt_token_ids=(*prompt, *choice), max_tokens=0, num_prompt_logprobs=1, first_scored=len(prompt) + 1
        )
        for place, choice in enumerate(choices)
        if len(choice) > 1
    ]
    return [own, *longer]


def classified(
    requests: Sequence[TokenRequest], results: Mapping[int, TokenResult], prompt: str | None = None
) -> ClassificationRequestOutput:
    """Return the scores of the choices after a prompt.

    Args:
        requests: The requests of `choice_requests`.
        results: The results of all of them, by index.
        prompt: The text of the prompt, if it was given as text.

    Raises:
        RequestError: A request failed.
    """
    for _, result in sorted(results.items()):
        if result.error is not None:
            raise result.error
    own = requests[0]
    scores = _scores(requests, results)
    return ClassificationRequestOutput(request_id=str(own.index), prompt=prompt, prompt_token_ids=own.prompt_token_ids, outputs=scores)


def _scores(requests: Sequence[TokenRequest], results: Mapping[int, TokenResult]) -> ClassificationOutput:
    own = requests[0]
    parts = [[first] for first in results[own.index].prompt_logprobs or ()]
    for each in requests[1:]:
        parts[each.index - own.index - 1] += results[each.index].prompt_logprobs or ()
    logprobs = [sum(token.logprobs[0] for token in tokens) for tokens in parts]
    largest = max(logprobs)
    weights = [math.exp(each - largest) for each in logprobs]
    return ClassificationOutput(
        probs=[weight / sum(weights) for weight in weights],
        logprobs=logprobs,
        num_tokens=[len(tokens) for tokens in parts],
        is_greedy=[all(token.token_ids[1] == token.token_ids[0] for token in tokens) for tokens in parts],
    )
