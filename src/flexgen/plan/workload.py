"""Workload: how many requests, how long their prompts are, how much they may generate.  No text, no ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths of a job's requests, in input order.

    Attributes:
        prompt_lens: tokens of each prompt.
        output_lens: expected tokens of each answer (max_tokens is the bound, a forecast may be less).
    """

    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.prompt_lens) != len(self.output_lens):
            raise ValueError("prompt_lens and output_lens differ in length")

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)
