"""Scores given continuations of a prompt: the tokens of each where it meets the prompt, the engine's requests, and the result.

A choice is what may follow a prompt, such as a label.  Its log probability is the sum over its tokens.  The prompt is computed once: its
request ends with the tokens that all choices begin with, and scores the next token of each as alternatives of each other.  A choice that
has more tokens than that has a request of its own, which shares the prompt's pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flexgen.errors import RequestError
from flexgen.outputs import ClassificationOutput, ClassificationRequestOutput
from flexgen.request import TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.encoding import ids_or_raise
from flexgen.text.prompts import naming

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
    prompt: str | Sequence[int], choices: Sequence[Choice], encoded: Sequence[list[int] | RequestError]
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """Return the tokens of a prompt and of each choice: those of the whole text beyond as many as the prompt has.

    Args:
        prompt: The prompt, text or token ids.
        choices: The choices.
        encoded: The token ids of `texts_to_encode`, or the errors of those that have none.

    Raises:
        RequestError: A text has no token ids, or a choice adds no token to the prompt.
    """
    context = prompt if not isinstance(prompt, str) else ids_or_raise(encoded[0])
    found: list[Sequence[int]] = [choice for choice in choices if not isinstance(choice, str)]
    for place, whole in enumerate(encoded[1:]):
        with naming(f"with choices[{place}]"):
            found.append(ids_or_raise(whole)[len(context) :])
    for index, each in enumerate(found):
        if not each:
            raise RequestError(f"choices[{index}] adds no token to the prompt", param="choices")
    return context, found


def choice_requests(index: int, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
    """Return the engine's requests for the choices after a prompt.

    Args:
        index: The index of the first request, which has the tokens that all choices begin with; that of choice i alone is `index + 1 + i`.
        context: The token ids of the prompt, at least one.
        choices: The token ids of each choice, at least one.
    """
    prompt, common = tuple(context), _common_beginning(choices)
    place = len(common)
    own = TokenRequest(
        index=index, prompt_token_ids=(*prompt, *common), max_tokens=0, num_prompt_logprobs=1, first_scored=len(prompt),
        alternatives=tuple(choice[place] for choice in choices),
    )  # fmt: skip
    longer = [
        TokenRequest(
            index=index + 1 + number, prompt_token_ids=(*prompt, *choice), max_tokens=0, num_prompt_logprobs=1,
            first_scored=len(prompt) + place + 1,
        )
        for number, choice in enumerate(choices)
        if len(choice) > place + 1
    ]  # fmt: skip
    return [own, *longer]


def _common_beginning(choices: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens that all choices begin with, as many as leave each choice at least one more."""
    most = min(map(len, choices)) - 1
    place = next((place for place in range(most) if len({choice[place] for choice in choices}) > 1), most)
    return choices[0][:place]


def classified(
    requests: Sequence[TokenRequest], results: Mapping[int, TokenResult], prompt: str | None = None
) -> ClassificationRequestOutput:
    """Return the scores of the choices after a prompt, or the error if a request failed.

    Args:
        requests: The requests of `choice_requests`.
        results: The results of all of them, by index.
        prompt: The text of the prompt, if it was given as text.
    """
    own = requests[0]
    error = next((result.error for _, result in sorted(results.items()) if result.error is not None), None)
    none = ClassificationOutput(probs=[], logprobs=[], num_tokens=[], is_greedy=[])
    return ClassificationRequestOutput(
        request_id=str(own.index),
        prompt=prompt,
        prompt_token_ids=own.prompt_token_ids[: own.first_scored],
        outputs=_scores(requests, results) if error is None else none,
        error=error,
    )


def _scores(requests: Sequence[TokenRequest], results: Mapping[int, TokenResult]) -> ClassificationOutput:
    own = requests[0]
    entries = results[own.index].prompt_logprobs or ()
    place = len(entries) - len(own.alternatives)
    # Equal choices have equal scores: the first result counts, because others may differ from it in their last digits.
    next_tokens: dict[int, TokenLogprobs] = {}
    tokens = [[*entries[:place], next_tokens.setdefault(each.token_ids[0], each)] for each in entries[place:]]  # of each choice
    rests: dict[tuple[int, ...], Sequence[TokenLogprobs]] = {}
    for each in requests[1:]:
        tokens[each.index - own.index - 1] += rests.setdefault(each.prompt_token_ids, results[each.index].prompt_logprobs or ())
    logprobs = [sum(token.logprobs[0] for token in choice) for choice in tokens]
    largest = max(logprobs)
    weights = [math.exp(each - largest) for each in logprobs]
    total = sum(weights)
    return ClassificationOutput(
        probs=[weight / total for weight in weights],
        logprobs=logprobs,
        num_tokens=list(map(len, tokens)),
        is_greedy=[all(token.token_ids[1] == token.token_ids[0] for token in choice) for choice in tokens],
    )
