"""Workload: the number of requests, the lengths of their prompts, and how much they may generate. No text, no ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths of a job's requests, in input order.

    Attributes:
        prompt_lens: The tokens of each prompt.
        output_lens: The most tokens of each answer (max_tokens).
        expected_lens: The tokens that each answer is expected to have. If it is empty, each is expected to have the most it may.
        reserved_lens: The answer tokens for which room is kept when a request enters. If it is empty, room is kept for the most.
        shared_lens: The leading tokens of each prompt, in whole pages, that an earlier request computes as well. If it is empty, none.
        may_end_early: Whether answers may end before they reach their most tokens.
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
        """The tokens that each answer is expected to have, at least one."""
        return tuple(max(n, 1) for n in self.expected_lens or self.output_lens)

    @property
    def found_lens(self) -> tuple[int, ...]:
        """The tokens of each prompt that are already computed when it enters, at most all but one."""
        return tuple(min(c, s - 1) for c, s in zip(self.shared_lens or (0,) * len(self), self.prompt_lens, strict=True))

    @property
    def output_tokens(self) -> int:
        return sum(self.answer_lens)

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
