"""A live sequence: its request, its tokens so far, and where its KV is.  Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen.memory.kv_cache import SequenceKV
from flexgen.request import Generated, TokenLogprobs, TokenRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request between its admission and its end.

    Attributes:
        tokens: prompt and generated ids. num_stored: leading tokens whose KV is stored.
        generated: the generated ids alone. logprobs: one entry for each, if the request asks for them.
        kv: its pages, None while it waits (again).
        deferred: trailing prompt tokens that this pass leaves to the next.
        expected_tokens: generated tokens after which it probably ends (at most max_tokens).
        num_lost: tokens whose KV was computed before and is gone: an earlier run's, or a preempted sequence's.
    """

    request: TokenRequest
    expected_tokens: int
    tokens: list[int] = field(init=False)
    generated: list[int] = field(init=False)
    logprobs: list[TokenLogprobs] = field(init=False)
    num_stored: int = 0
    kv: SequenceKV | None = None
    num_preemptions: int = 0
    deferred: int = 0
    num_lost: int = field(init=False)

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
    def remaining(self) -> int:
        """Tokens that it will probably still generate, at least one."""
        return max(self.expected_tokens - self.num_generated, 1)

    @property
    def final_len(self) -> int:
        """Tokens that are stored when it ends as expected (the last generated one is not)."""
        return len(self.tokens) + self.remaining - 1
