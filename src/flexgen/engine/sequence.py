"""A live sequence: its request, its tokens so far, its KV, the prefixes that it shares, and what finishes its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flexgen.base.isolation import for_one_request
from flexgen.errors import RequestError
from flexgen.kv.cache import SequenceKV
from flexgen.request import Generated, PartialAnswer, TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefix


@dataclass(slots=True, eq=False)
class StoredPrefix:
    """The KV of a prefix that several prompts have in common.

    Attributes:
        kv: The pages of the prefix, which it shares with the sequences that use it.
        length: The number of its tokens.
        writer: The sequence that computes it; None when that no longer matters.
        num_users: The number of live sequences that begin with it, the writer included.
    """

    kv: SequenceKV
    length: int
    writer: LiveSequence | None
    num_users: int

    @property
    def is_stored(self) -> bool:
        """Whether the whole prefix has been computed."""
        return self.writer is None or self.writer.num_stored >= self.length

    def pages(self) -> list[list[int]]:
        """Return the page ids that the prefix holds, for each layer group."""
        return [table[freed:] for table, freed in zip(self.kv.tables, self.kv.freed, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The reason why an answer is finished.

    Attributes:
        reason: "stop" (by a stop token or string), "length", or "error".
        stop_string: The stop string that was found, if that is the reason.
        error: The error, if the reason is "error".
    """

    reason: str
    stop_string: str | None = None
    error: RequestError | None = None

    @classmethod
    def failed(cls, error: RequestError) -> Finish:
        return cls(reason="error", error=error)


@dataclass(slots=True, eq=False)
class LiveSequence:
    """The state of one request between its arrival and its end.

    Attributes:
        request: The request that is answered.
        expected_tokens: The number of generated tokens after which the answer is expected to end, at most `max_tokens`.
        tokens: The ids of the prompt and of the generated tokens, without those of the prompt on which nothing depends.
        generated: The generated ids alone.
        logprobs: One entry for each generated token, if the request asks for them.
        prompt_logprobs: One entry for each token that the request wants scored, as far as they have been computed.
        error: The error with which the answer will finish once the prompt has been computed; None if there is none.
        num_stored: The number of leading tokens whose KV is stored, or will be by a sequence that runs before this one.
        kv: The pages of the sequence; None while it waits.
        deferred: The number of trailing prompt tokens that this pass leaves to the next.
        num_preemptions: The number of times that its KV was dropped.
        num_found: The number of prompt tokens whose KV was already stored when it was first admitted.
        num_lost: The number of tokens whose KV was computed before and is lost: by an earlier run, or before a preemption.
        path: The prefixes that its prompt has in common with others, shortest first.
        prefixes: The prefixes of `path` that are stored where the sequence lives, shortest first.
        source: The stored prefix that it began with instead of computing it.
    """

    request: TokenRequest
    expected_tokens: int
    tokens: list[int] = field(init=False)
    generated: list[int] = field(init=False)
    logprobs: list[TokenLogprobs] = field(init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: RequestError | None = None
    num_stored: int = 0
    kv: SequenceKV | None = None
    num_preemptions: int = 0
    num_found: int = 0
    deferred: int = 0
    num_lost: int = field(init=False)
    path: tuple[CommonPrefix, ...] = ()
    prefixes: list[StoredPrefix] = field(default_factory=list)
    source: StoredPrefix | None = None

    def __post_init__(self) -> None:
        earlier = self.request.generated
        self.generated = list(earlier.token_ids)
        self.tokens = [*self.request.prompt_token_ids, *self.generated]
        if not self.request.max_tokens and self.request.num_prompt_logprobs is None:
            self.tokens.clear()  # nothing is wanted of it
        elif not self.request.max_tokens and not self.request.alternatives:
            self.tokens.pop()  # it is only scored
        self.logprobs = list(earlier.logprobs or ())
        self.num_lost = len(self.tokens) - 1 if self.generated else 0  # the KV of the last one was not computed yet

    # -- the answer -----------------------------------------------------------------------------------------------------------------

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a generated token."""
        self.tokens.append(token_id)
        self.generated.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def take_scores(self, entries: Iterable[TokenLogprobs | RequestError]) -> None:
        """Append the log probabilities of the next tokens to be scored, or remember their error."""
        for each in entries:
            if isinstance(each, RequestError):
                self.error = self.error or each
            else:
                self.prompt_logprobs.append(each)

    def finish(self) -> Finish | None:
        """Return how the last generated token finishes the answer, or None; an exception in the request's own code finishes it, too."""
        found = for_one_request(self._finish)
        return Finish.failed(found) if isinstance(found, RequestError) else found

    def _finish(self) -> Finish | None:
        request, generated = self.request, self.generated
        if self.error is not None and (generated or not self.num_new):
            return Finish.failed(self.error)
        if not generated:
            return None if request.max_tokens or self.num_new else Finish(reason="length")
        if generated[-1] in request.stop_token_ids:
            return Finish(reason="stop")
        stop_string = request.stops(generated) if request.stops is not None else None
        if stop_string is not None:
            return Finish(reason="stop", stop_string=stop_string)
        return Finish(reason="length") if len(generated) >= request.max_tokens else None

    def so_far(self) -> PartialAnswer:
        """Return the answer so far, including what earlier runs generated."""
        logprobs = None if self.request.num_logprobs is None else tuple(self.logprobs)
        return PartialAnswer(index=self.id, generated=Generated(token_ids=tuple(self.generated), logprobs=logprobs))

    def result(self, finish: Finish) -> TokenResult:
        generated = self.so_far().generated
        prompt_logprobs = None if self.request.num_prompt_logprobs is None else tuple(self.prompt_logprobs)
        return TokenResult(
            index=self.id, token_ids=generated.token_ids, finish_reason=finish.reason, stop_string=finish.stop_string,
            logprobs=generated.logprobs, prompt_logprobs=prompt_logprobs, error=finish.error, num_preemptions=self.num_preemptions,
        )  # fmt: skip

    # -- counts ---------------------------------------------------------------------------------------------------------------------

    @property
    def id(self) -> int:
        """The request's index, by which plans of passes refer to the sequence."""
        return self.request.index

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_resumed(self) -> int:
        """The number of generated tokens that come from an earlier run."""
        return len(self.request.generated.token_ids)

    def scored(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the positions in [start, stop) at which known tokens are still to be scored, each with such a token."""
        request, prompt = self.request, self.request.prompt_token_ids
        if request.num_prompt_logprobs is None:
            return
        first = request.first_scored + len(self.prompt_logprobs)
        for position in range(max(start, first - 1), min(stop, len(prompt) - 1)):
            yield position, prompt[position + 1]
        if start < len(prompt) <= stop and first <= len(prompt):
            for token in request.alternatives:
                yield len(prompt) - 1, token

    @property
    def num_generated(self) -> int:
        return len(self.generated)

    @property
    def num_new(self) -> int:
        """The number of tokens that the next pass must compute."""
        return len(self.tokens) - self.num_stored

    @property
    def num_own(self) -> int:
        """The number of tokens that the sequence must compute if all its common prefixes are stored."""
        return len(self.tokens) - max(self.num_stored, self.path[-1].length if self.path else 0)

    @property
    def num_shared(self) -> int:
        """The number of leading tokens whose pages belong to stored prefixes."""
        return self.prefixes[-1].length if self.prefixes else 0

    @property
    def behind(self) -> LiveSequence | None:
        """The sequence that computes the prefix of this one, until that is stored."""
        return None if self.source is None or self.source.is_stored else self.source.writer

    @property
    def remaining(self) -> int:
        """The number of tokens that are expected to be generated yet, at least one."""
        return max(self.expected_tokens - self.num_generated, 1)

    @property
    def final_len(self) -> int:
        """The number of tokens whose KV is stored when the answer ends as expected (the last generated one's is not)."""
        return len(self.tokens) + self.remaining - 1
