"""A live sequence: its request, its tokens so far, where its KV is, what of that it shares, and what ends its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen.base.isolation import for_one_request
from flexgen.errors import RequestError
from flexgen.kv.cache import SequenceKV
from flexgen.request import Generated, PartialAnswer, TokenLogprobs, TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefix


@dataclass(slots=True, eq=False)
class StoredPrefix:
    """The KV of a beginning that several prompts have.

    Attributes:
        kv: Its pages, which it shares with the sequences that use it.
        length: Its tokens.
        writer: The sequence that computes it; None when it no longer matters which.
        num_users: The live sequences that begin with it, the writer included.
    """

    kv: SequenceKV
    length: int
    writer: LiveSequence | None
    num_users: int

    @property
    def is_stored(self) -> bool:
        """Whether all of it has been computed."""
        return self.writer is None or self.writer.num_stored >= self.length

    def pages(self) -> list[list[int]]:
        """The page ids that it holds, per layer group."""
        return [table[freed:] for table, freed in zip(self.kv.tables, self.kv.freed, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Why an answer is finished.

    Attributes:
        reason: "stop" (by a stop token or string), "length", or "error".
        stop_string: The stop string that was found, if that is the reason.
        error: What went wrong, for the reason "error".
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
        request: What is to be answered.
        expected_tokens: Generated tokens after which it probably ends, at most `max_tokens`.
        tokens: The ids of the prompt and of the generated tokens.
        generated: The generated ids alone.
        logprobs: One entry for each generated token, if the request asks for them.
        num_stored: Leading tokens whose KV is stored, or will be by what the sequence runs behind.
        kv: Its pages; None while it waits (again).
        deferred: Trailing prompt tokens that this pass leaves to the next.
        num_preemptions: How often its KV was dropped.
        num_found: Prompt tokens that were stored already when it first entered.
        num_lost: Tokens whose KV was computed before and is gone: by an earlier run, or before a preemption.
        path: What its prompt has in common with those of others, shortest first.
        prefixes: What of `path` is stored where the sequence lives, shortest first.
        source: The stored prefix that it began with instead of computing it.
    """

    request: TokenRequest
    expected_tokens: int
    tokens: list[int] = field(init=False)
    generated: list[int] = field(init=False)
    logprobs: list[TokenLogprobs] = field(init=False)
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
        self.logprobs = list(earlier.logprobs or ())
        self.num_lost = len(self.tokens) - 1 if self.generated else 0  # the last one's is never computed before its successor is

    # -- the answer -----------------------------------------------------------------------------------------------------------------

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take a generated token."""
        self.tokens.append(token_id)
        self.generated.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def finish(self) -> Finish | None:
        """How the last generated token finishes the answer, if it does; an exception of the request's own code finishes it, too."""
        found = for_one_request(self._finish)
        return Finish.failed(found) if isinstance(found, RequestError) else found

    def _finish(self) -> Finish | None:
        request, generated = self.request, self.generated
        if not generated:
            return None
        if generated[-1] in request.stop_token_ids:
            return Finish(reason="stop")
        stop_string = request.stops(generated) if request.stops is not None else None
        if stop_string is not None:
            return Finish(reason="stop", stop_string=stop_string)
        return Finish(reason="length") if len(generated) >= request.max_tokens else None

    def so_far(self) -> PartialAnswer:
        """What was generated, earlier runs included."""
        logprobs = None if self.request.num_logprobs is None else tuple(self.logprobs)
        return PartialAnswer(index=self.id, generated=Generated(token_ids=tuple(self.generated), logprobs=logprobs))

    def result(self, finish: Finish) -> TokenResult:
        generated = self.so_far().generated
        return TokenResult(
            index=self.id, token_ids=generated.token_ids, finish_reason=finish.reason, stop_string=finish.stop_string,
            logprobs=generated.logprobs, error=finish.error, num_preemptions=self.num_preemptions,
        )  # fmt: skip

    # -- counts ---------------------------------------------------------------------------------------------------------------------

    @property
    def id(self) -> int:
        """The request's index, by which plans of passes name the sequence."""
        return self.request.index

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_resumed(self) -> int:
        """Generated tokens that an earlier run brought."""
        return len(self.request.generated.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.generated)

    @property
    def num_new(self) -> int:
        """Tokens that the next pass must compute."""
        return len(self.tokens) - self.num_stored

    @property
    def num_own(self) -> int:
        """Tokens that it must compute if all that it has in common with others is stored."""
        return len(self.tokens) - max(self.num_stored, self.path[-1].length if self.path else 0)

    @property
    def num_shared(self) -> int:
        """Leading tokens whose pages belong to stored prefixes."""
        return self.prefixes[-1].length if self.prefixes else 0

    @property
    def behind(self) -> LiveSequence | None:
        """The sequence that computes the beginning of this one, as long as that is not stored."""
        return None if self.source is None or self.source.is_stored else self.source.writer

    @property
    def remaining(self) -> int:
        """Tokens that it will probably still generate, at least one."""
        return max(self.expected_tokens - self.num_generated, 1)

    @property
    def final_len(self) -> int:
        """Tokens that are stored when it ends as expected (the last generated one is not)."""
        return len(self.tokens) + self.remaining - 1
