"""What ends an answer, and what a run has answered.  Knows no tensors and no memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ParamSpec

from flexgen.base.isolation import for_one_request
from flexgen.engine.sequence import Sequence
from flexgen.errors import RequestError
from flexgen.report.clock import RunCounts
from flexgen.request import TokenResult

_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why an answer ends: "stop" (by `stop_string`, or by a token), "length", or "error" (then there is one)."""

    reason: str
    stop_string: str | None = None
    error: RequestError | None = None

    @classmethod
    def failed(cls, error: RequestError) -> Ending:
        """By an error."""
        return cls(reason="error", error=error)


def ending(sequence: Sequence) -> Ending | None:
    """How the last generated token ends the answer, if it does."""
    request, generated = sequence.request, sequence.generated
    if not generated:
        return None
    if generated[-1] in request.stop_token_ids:
        return Ending(reason="stop")
    try:
        stop_string = request.stops(generated) if request.stops is not None else None
    except RequestError as error:  # its text cannot be told
        return Ending(reason="error", error=error)
    if stop_string is not None:
        return Ending(reason="stop", stop_string=stop_string)
    return Ending(reason="length") if len(generated) >= request.max_tokens else None


def ending_or_error(find: Callable[_Arguments, Ending | None], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Ending | None:
    """What `find` says about one sequence; an exception in it ends that sequence only (see `for_one_request`)."""
    end = for_one_request(find, *args, **kwargs)
    return Ending.failed(end) if isinstance(end, RequestError) else end


class Answers:
    """What a run has answered so far.

    Attributes:
        counts: tokens, requests, errors.
        finish_reasons: reason -> answers.
        given, generated: tokens of every request that is finished; those of an earlier run were given. found: of these, not computed.
    """

    def __init__(self) -> None:
        self.counts = RunCounts()
        self.finish_reasons: Counter[str] = Counter()
        self.given, self.generated, self.found = array("q"), array("q"), array("q")

    def entered(self, sequence: Sequence) -> None:
        """Count what an admitted sequence computes again, and what it finds stored."""
        if not sequence.num_preemptions:
            sequence.num_found = sequence.num_stored
        self.counts = replace(
            self.counts,
            recomputed_tokens=self.counts.recomputed_tokens + max(sequence.num_lost - sequence.num_stored, 0),
            shared_prompt_tokens=self.counts.shared_prompt_tokens + sequence.num_stored,
        )

    def preempted(self) -> None:
        """Count a preemption."""
        self.counts = replace(self.counts, preemptions=self.counts.preemptions + 1)

    def finish(self, sequence: Sequence, end: Ending) -> TokenResult:
        """The result of a sequence, counted."""
        request, so_far = sequence.request, sequence.so_far()
        given, generated = len(request.prompt_token_ids) + sequence.num_resumed, sequence.num_generated - sequence.num_resumed
        self.finish_reasons[end.reason] += 1
        self.given.append(given)
        self.generated.append(generated)
        self.found.append(sequence.num_found)
        self.counts = replace(
            self.counts,
            requests=self.counts.requests + 1,
            errors=self.counts.errors + (end.error is not None),
            prompt_tokens=self.counts.prompt_tokens + len(request.prompt_token_ids),
            output_tokens=self.counts.output_tokens + generated,
        )
        return TokenResult(
            index=request.index, token_ids=so_far.token_ids, finish_reason=end.reason, stop_string=end.stop_string,
            logprobs=so_far.logprobs, error=end.error, num_preemptions=sequence.num_preemptions,
        )  # fmt: skip
