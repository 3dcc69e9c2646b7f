"""What a job needs of a model: `LLM` has it, and so may whatever runs a model elsewhere or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from flexgen.chat import Chat
from flexgen.errors import RequestError
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import CompletionOutput, PartialAnswer, SamplingParams, TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefixes, PrefixCensus


class JobModel(Protocol):
    """A model that answers the lines of a job.  Every member means what it means in `LLM`, which says more about it."""

    @property
    def name(self) -> str:
        """The name that answers carry, and that lines may ask for."""
        ...

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its answer have together."""
        ...

    @property
    def tokenizer(self) -> object | None:
        """None where the model has none, so that answers are token ids only."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What of the model changes its answers, as JSON values by name."""
        ...

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """The prompt of each conversation, or why it has none."""
        ...

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """The token ids of each text, or why it has none."""
        ...

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """The engine's requests for the `n` answers to one prompt; raises RequestError where it cannot be served."""
        ...

    def prefix_census(self) -> PrefixCensus | None:
        """Finds what prompts have in common; None where that is not shared."""
        ...

    def open(self, workload: Workload) -> Plan:
        """Get ready for this work."""
        ...

    def stream(
        self,
        requests: Iterable[TokenRequest],
        workload: Workload,
        *,
        prefixes: CommonPrefixes = ...,
        on_progress: Callable[[Progress], None] | None = None,
        on_pass: Callable[[Iterable[PartialAnswer]], None] | None = None,
    ) -> Iterator[TokenResult]:
        """The results of the requests, as they finish."""
        ...

    def completions(
        self, results: Iterable[TokenResult], params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> list[CompletionOutput]:
        """The answers to one prompt, in order, with their texts."""
        ...
