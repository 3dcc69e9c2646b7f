"""A live sequence: its request, its tokens so far, and where its KV is.  Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen.memory.kv_cache import SequenceKV
from flexgen.request import TokenRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request between its admission and its end.

    Attributes:
        tokens: prompt and generated ids. num_stored: leading tokens whose KV is stored.
        kv: its pages, None while it waits (again).
        deferred: trailing prompt tokens that this pass leaves to the next.
        expected_tokens: generated tokens after which it probably ends (at most max_tokens).
    """

    request: TokenRequest
    expected_tokens: int
    tokens: list[int] = field(default_factory=list)
    num_stored: int = 0
    kv: SequenceKV | None = None
    num_preemptions: int = 0
    deferred: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

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
