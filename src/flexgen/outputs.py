"""What a caller gets for a prompt, as values with vLLM's names.  Knows nothing of text, files or engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen.base.tool_calls import AnswerMessage
from flexgen.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The log probability of one token at one position (vLLM's fields, and one more).

    Attributes:
        logprob: The natural log probability.
        rank: Rank of the token, 1 is the likeliest; None for a token of a prompt that is not among the likeliest ones returned.
        decoded_token: The token's text as it appears within a text, with its leading space.
        token_bytes: The token's own bytes where it is a part of a character, whose text is a replacement character; None where the
            bytes are those of the text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer to one prompt (vLLM's fields, and two more).

    Attributes:
        index: Number of the answer among those of its prompt.
        text: The text of the answer.
        token_ids: The generated ids.
        finish_reason: "stop", "length" or "error".
        stop_reason: The stop token or string that ended the answer; None for the model's own end; the code of an error.
        cumulative_logprob: Log probability of the generated tokens together, if logprobs were asked for.
        logprobs: For each generated token, token id -> log probability; the generated token comes first.
        text_offsets: Offset of each generated token's text in that of the answer (before anything is cut off), if logprobs were asked for
            and there is a tokenizer.
        message: The answer as a message, if its request has tools and it could be parsed.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: tuple[int, ...] | None = None
    message: AnswerMessage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt (vLLM's fields).

    Attributes:
        request_id: Number of the request, as text.
        prompt: Text of the prompt; None where it was given as token ids.
        prompt_token_ids: The prompt's token ids.
        prompt_logprobs: For each token of the prompt, token id -> log probability, the prompt's own token first; None for the first token,
            which nothing predicts.  None as a whole unless the parameters have `prompt_logprobs`.
        outputs: The answers, `SamplingParams.n` of them.
        finished: Always True, because outputs are never partial.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationOutput:
    """The scores of the choices after one prompt; every list has an entry per choice, and none if the prompt failed.

    Attributes:
        probs: The probabilities of the choices, normalised so that they sum to 1 (vLLM's field).
        logprobs: The natural log probability of each choice after the prompt, which is the sum over its tokens.
        num_tokens: The number of tokens of each choice.
        is_greedy: Whether greedy generation would begin with the choice.
    """

    probs: list[float]
    logprobs: list[float]
    num_tokens: list[int]
    is_greedy: list[bool]

    @property
    def num_classes(self) -> int:
        """The number of choices."""
        return len(self.probs)

    @property
    def best(self) -> int:
        """The index of the likeliest choice, the first among equals.

        Raises:
            RequestError: There are no scores, because the prompt failed.
        """
        if not self.logprobs:
            raise RequestError("there are no scores, because the prompt failed: its output has the error")
        return max(range(len(self.logprobs)), key=self.logprobs.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRequestOutput:
    """The scores of the choices after one prompt, with the prompt (vLLM's fields, and one more).

    Attributes:
        request_id: Number of the request, as text.
        prompt: Text of the prompt; None where it was given as token ids.
        prompt_token_ids: The prompt's token ids, without spaces at its end, which belong to the choices.
        outputs: The scores.
        finished: Always True.
        error: The error with which the prompt failed alone while the others were scored; None otherwise.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: ClassificationOutput
    finished: bool = True
    error: RequestError | None = None
