"""What a plan depends on: the lengths of requests and what prompts have in common, gathered one by one in little memory."""

from __future__ import annotations

from flexgen.plan.workload import Workload
from flexgen.request import TokenRequest
from flexgen.text.common_prefixes import NO_PREFIXES, CommonPrefixes, PrefixCensus


class RequestLengths:
    """Gathers the lengths of requests, and the common prefixes of their prompts.

    Args:
        census: The census that finds what prompts have in common; None where nothing is shared.
    """

    def __init__(self, census: PrefixCensus | None) -> None:
        self._census = census
        self._same: dict[int, int] = {}  # one object per length: a tuple of a million of them stays small
        self._prompt_lens: list[int] = []
        self._output_lens: list[int] = []
        self._least_lens: list[int] = []
        self._scored_lens: list[int] = []
        self._shared_lens: list[int] = []
        self._may_end_early, self._num_likeliest = False, 0

    def add(self, request: TokenRequest, num_generated: int = 0) -> None:
        """Add a request.

        Args:
            request: The request.
            num_generated: The tokens of its answer that an earlier run has generated; they count as prompt.
        """
        self._note(self._prompt_lens, max(request.num_computed, 1) + num_generated)
        most = max(request.max_tokens - num_generated, 1) if request.max_tokens else 0
        self._note(self._output_lens, most)
        self._note(self._least_lens, max(request.least_tokens - num_generated, 0) if request.may_end_early else most)
        self._note(self._scored_lens, request.num_scored)
        self._note(self._shared_lens, 0 if self._census is None else self._census.add(request.sharable, request.offered))
        self._may_end_early = self._may_end_early or request.may_end_early
        likeliest = self._num_likeliest, request.num_prompt_logprobs or 0
        self._num_likeliest = -1 if -1 in likeliest else max(likeliest)

    def _note(self, lengths: list[int], length: int) -> None:
        lengths.append(self._same.setdefault(length, length))

    def common_prefixes(self) -> CommonPrefixes:
        """Return what prompts have in common."""
        return NO_PREFIXES if self._census is None else self._census.common()

    def workload(self) -> Workload:
        """Return the lengths of all requests so far, in their order."""
        return Workload(
            prompt_lens=tuple(self._prompt_lens), output_lens=tuple(self._output_lens), least_lens=tuple(self._least_lens),
            shared_lens=tuple(self._shared_lens), scored_lens=tuple(self._scored_lens),
            may_end_early=self._may_end_early, num_likeliest=self._num_likeliest,
        )  # fmt: skip
