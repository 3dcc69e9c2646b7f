"""A live sequence: its request, its tokens so far, where its KV is, and what of that it shares.  Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen.kv.cache import SequenceKV
from flexgen.request import Generated, TokenLogprobs, TokenRequest
from flexgen.text.common_prefixes import CommonPrefix


@dataclass(slots=True, eq=False)
class StoredPrefix:
    """The KV of a beginning that several prompts have.

    Attributes:
        kv: its pages, shared. length: its tokens.
        writer: the sequence that computes it, None when it no longer matters which.
        num_users: live sequences that begin with it, the writer included.
    """

    kv: SequenceKV
    length: int
    writer: Sequence | None
    num_users: int

    @property
    def is_stored(self) -> bool:
        """Whether all of it has been computed."""
        return self.writer is None or self.writer.num_stored >= self.length

    def pages(self) -> list[list[int]]:
        """Per layer group, the page ids that it holds."""
        return [table[freed:] for table, freed in zip(self.kv.tables, self.kv.freed, strict=True)]


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request between its admission and its end.

    Attributes:
        tokens: prompt and generated ids. num_stored: leading tokens whose KV is stored, or will be by what it runs behind.
        generated: the generated ids alone. logprobs: one entry for each, if the request asks for them.
        kv: its pages, None while it waits (again).
        deferred: trailing prompt tokens that this pass leaves to the next.
        expected_tokens: generated tokens after which it probably ends (at most max_tokens).
        num_found: prompt tokens that were stored when it first entered.
        num_lost: tokens whose KV was computed before and is gone: an earlier run's, or a preempted sequence's.
        path: what its prompt has in common with others', shortest first.
        prefixes: of these, what is stored where it lives, shortest first. source: the one it began with instead of computing it.
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

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take a generated token."""
        self.tokens.append(token_id)
        self.generated.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

    def so_far(self) -> Generated:
        """What was generated, earlier runs included."""
        logprobs = None if self.request.num_logprobs is None else tuple(self.logprobs)
        return Generated(token_ids=tuple(self.generated), logprobs=logprobs)

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
    def behind(self) -> Sequence | None:
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
