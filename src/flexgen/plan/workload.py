"""Workload: how many requests, how long their prompts are, how much they may generate.  No text, no ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths of a job's requests, in input order.

    Attributes:
        prompt_lens: tokens of each prompt.
        output_lens: most tokens of each answer (max_tokens).
        expected_lens: tokens that each answer is expected to have; where empty, as many as it may have.
        reserved_lens: tokens of each answer for which room is kept when its request enters; where empty, as many as it may have.
        shared_lens: leading tokens of each prompt, in whole pages, that an earlier request computes as well; where empty, none.
        may_end_early: whether answers may end before their most tokens.
    """

    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    expected_lens: tuple[int, ...] = ()
    reserved_lens: tuple[int, ...] = ()
    shared_lens: tuple[int, ...] = ()
    may_end_early: bool = False

    def __post_init__(self) -> None:
        if len(self.prompt_lens) != len(self.output_lens):
            raise ValueError("prompt_lens and output_lens differ in length")
        if any(len(each) not in (0, len(self)) for each in (self.expected_lens, self.reserved_lens, self.shared_lens)):
            raise ValueError("expected_lens, reserved_lens and shared_lens are of all requests or of none")
        if not any(self.shared_lens):
            object.__setattr__(self, "shared_lens", ())

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def answer_lens(self) -> tuple[int, ...]:
        """Tokens that each answer should have, at least one."""
        return tuple(max(n, 1) for n in self.expected_lens or self.output_lens)

    @property
    def found_lens(self) -> tuple[int, ...]:
        """Tokens of each prompt that it finds computed, at most all but one."""
        return tuple(min(c, s - 1) for c, s in zip(self.shared_lens or (0,) * len(self), self.prompt_lens, strict=True))

    @property
    def output_tokens(self) -> int:
        return sum(self.answer_lens)

    def take(self, places: Sequence[int]) -> Workload:
        """The requests at these places."""
        lengths = {name: tuple(values[place] for place in places) for name, values in self._lengths().items()}
        return dataclasses.replace(self, **lengths)

    def rows(self) -> list[tuple[int, ...]]:
        """The lengths of each request."""
        return list(zip(*self._lengths().values(), strict=True))

    def averaged(self, spans: Sequence[tuple[int, int]]) -> Workload:
        """Requests of each span of places made alike: of its mean lengths."""
        lengths = {
            name: tuple(mean for start, end in spans for mean in [round(sum(values[start:end]) / (end - start))] * (end - start))
            for name, values in self._lengths().items()
        }
        return dataclasses.replace(self, **lengths)

    def _lengths(self) -> dict[str, tuple[int, ...]]:
        """Those that are given."""
        names = (field.name for field in dataclasses.fields(self) if field.name.endswith("_lens"))
        return {name: values for name in names if (values := getattr(self, name))}
