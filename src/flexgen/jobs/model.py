"""The interface of a model to a job.  `ServedModel` has it, and so may anything that runs a model elsewhere or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from flexgen.chat import Chat, ToolUse
from flexgen.errors import RequestError
from flexgen.outputs import RequestOutput
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.report.progress import Progress
from flexgen.request import PartialAnswer, SamplingParams, TokenRequest, TokenResult
from flexgen.text.common_prefixes import CommonPrefixes, PrefixCensus


class JobModel(Protocol):
    """A model that answers the lines of a job.  The members are those of `ServedModel`, whose docstrings say more."""

    @property
    def name(self) -> str:
        """The name of the model, which is written into answers and which lines may ask for."""
        ...

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        ...

    @property
    def tokenizer(self) -> object | None:
        """The tokenizer; None where the model has none, so that answers are token ids only."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return the properties of the model that change its answers, as JSON values by name."""
        ...

    def resume(self, begun: Mapping[str, Any]) -> str:
        """Settle what is still to be chosen as in the fingerprint that a job was begun with; return it in words, if there was anything.

        Raises:
            OptionError: The options do not allow it.
        """
        ...

    def render_chats(self, chats: Sequence[Chat], *, now: float | None = None) -> Iterator[str | RequestError]:
        """Yield the prompt of each conversation, or the error that prevents it."""
        ...

    def encode_each(self, texts: Iterable[str | RequestError], *, add_special_tokens: bool = True) -> Iterator[list[int] | RequestError]:
        """Yield the token ids of each text, or the error that prevents them."""
        ...

    def token_requests(self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[TokenRequest]:
        """Return the engine's requests for the `n` answers to one prompt.

        Raises:
            RequestError: The prompt cannot be served.
        """
        ...

    def choice_requests(self, index: int, prompt_token_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[TokenRequest]:
        """Return the engine's requests that score choices after a prompt.

        Raises:
            RequestError: The prompt or a choice cannot be served.
        """
        ...

    def tool_params(self, params: SamplingParams, tools: ToolUse) -> SamplingParams:
        """Return the sampling parameters of a request with tools.

        Raises:
            RequestError: The model cannot answer with calls of tools, or not with required ones.
        """
        ...

    def prefix_census(self) -> PrefixCensus | None:
        """Return an object that finds the common prefixes of prompts; None where prefixes are not shared."""
        ...

    def open(self, workload: Workload) -> Plan:
        """Open the engine for this workload, and return its plan."""
        ...

    def shrink(self) -> int | None:
        """Have the next engine keep half as many sequences alive, and return their number; None if it was 1 already."""
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
        """Yield the results of the requests as they finish."""
        ...

    def output(
        self,
        results: Iterable[TokenResult],
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        prompt: str | None = None,
        tools: ToolUse | None = None,
    ) -> RequestOutput:
        """Return the answers to one prompt, in order, with their texts, and as messages where the request has tools.

        Raises:
            RequestError: An answer has no call of a tool, although one is required.
        """
        ...

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt that was given as token ids."""
        ...
