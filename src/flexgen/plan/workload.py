"""Workload: the number of requests, the lengths of their prompts, how much they may generate, and what is scored. No text, no ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths of a job's requests, in input order.

    Attributes:
        prompt_lens: The tokens of each prompt, without those that need not be computed.
        output_lens: The most tokens of each answer (max_tokens); 0 for a prompt that is only scored.
        least_lens: The fewest tokens of each answer, where answers may end early: those that may not have their most. If it is empty, one.
        expected_lens: The tokens that each answer is expected to have. If it is empty, each is expected to have the most it may.
        reserved_lens: The answer tokens for which room is kept when a request enters. If it is empty, room is kept for the most.
        shared_lens: The leading tokens of each prompt, in whole pages, that an earlier request computes as well. If it is empty, none.
        scored_lens: The positions of each prompt at which known tokens are scored. If it is empty, none.
        may_end_early: Whether any answer may end before it reaches its most tokens.
        num_likeliest: The most likeliest tokens that are returned at a scored position; -1 for all.
    """

    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    least_lens: tuple[int, ...] = ()
    expected_lens: tuple[int, ...] = ()
    reserved_lens: tuple[int, ...] = ()
    shared_lens: tuple[int, ...] = ()
    scored_lens: tuple[int, ...] = ()
    may_end_early: bool = False
    num_likeliest: int = 0

    def __post_init__(self) -> None:
        if len(self.prompt_lens) != len(self.output_lens):
            raise ValueError("prompt_lens and output_lens differ in length")
        if wrong := [name for name, each in self._lengths().items() if len(each) != len(self)]:
            raise ValueError(f"the lengths of each kind are of all requests or of none: {', '.join(wrong)}")
        for name in ("least_lens", "shared_lens", "scored_lens"):
            if not any(getattr(self, name)) or (name == "least_lens" and not self.may_end_early):
                object.__setattr__(self, name, ())

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def answer_lens(self) -> tuple[int, ...]:
        """The passes that each request is expected to take: one per token of its answer, or one for a prompt that is only scored."""
        return tuple(max(n, 1) for n in self.expected_lens or self.output_lens)

    @property
    def sampled_lens(self) -> tuple[int, ...]:
        """The tokens that each answer is expected to have: at least one, but none where a prompt is only scored."""
        return tuple(n if most else 0 for n, most in zip(self.answer_lens, self.output_lens, strict=True))

    @property
    def found_lens(self) -> tuple[int, ...]:
        """The tokens of each prompt that are already computed when it enters, at most all but one."""
        return tuple(min(c, s - 1) for c, s in zip(self.shared_lens or (0,) * len(self), self.prompt_lens, strict=True))

    @property
    def output_tokens(self) -> int:
        return sum(self.sampled_lens)

    @property
    def scored_tokens(self) -> int:
        """The positions at which known tokens are scored."""
        return sum(self.scored_lens)

    @property
    def paced_tokens(self) -> int:
        """The tokens whose number per second tells how fast a plan is: those of answers, or of prompts where nothing is generated."""
        return self.output_tokens or self.prompt_tokens

    def take(self, places: Sequence[int]) -> Workload:
        """Return the workload of the requests at these indices."""
        lengths = {name: tuple(values[place] for place in places) for name, values in self._lengths().items()}
        return dataclasses.replace(self, **lengths)

    def rows(self) -> list[tuple[int, ...]]:
        """Return one tuple per request, with its lengths."""
        return list(zip(*self._lengths().values(), strict=True))

    def averaged(self, spans: Sequence[tuple[int, int]]) -> Workload:
        """Return the workload in which all requests of a span of indices have the span's mean lengths."""
        lengths = {
            name: tuple(mean for start, end in spans for mean in [round(sum(values[start:end]) / (end - start))] * (end - start))
            for name, values in self._lengths().items()
        }
        return dataclasses.replace(self, **lengths)

    def _lengths(self) -> dict[str, tuple[int, ...]]:
        """Return the lengths that are given, by the name of their field."""
        names = (field.name for field in dataclasses.fields(self) if field.name.endswith("_lens"))
        return {name: values for name in names if (values := getattr(self, name))}
