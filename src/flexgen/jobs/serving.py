"""Lines while the model has them: what it is asked for each, what it has generated so far, and the record at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flexgen.api.fields import Answer
from flexgen.base.isolation import for_one_request
from flexgen.errors import RequestError
from flexgen.jobs.reading import Refused, Served, place_of
from flexgen.jobs.saved_progress import Begun, Ending, since
from flexgen.jobs.store import Result, Store
from flexgen.llm import LLM
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult

MAX_RECORD_BYTES = 900_000_000  # SQLite's own limit is 10^9


@dataclass(slots=True)
class _Line:
    """A line in progress.

    Attributes:
        results: of the choices that are finished.
    """

    served: Served
    results: dict[int, TokenResult] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.served.token_requests)


class Serving:
    """The lines that the model has.

    Args:
        store: takes their results, and what there is of them before.

    Attributes:
        num_taken: lines handed to the model so far.
        num_resumed: answers that went on where an earlier run left them. tokens_kept: of theirs, not generated again.
    """

    def __init__(self, llm: LLM, store: Store) -> None:
        self._llm, self._store = llm, store
        self._lines: dict[int, _Line] = {}  # by number
        self._stored: dict[int, int] = {}  # index -> tokens of a choice that are stored
        self.num_taken = self.num_resumed = self.tokens_kept = 0

    @property
    def num_unfinished(self) -> int:
        """Lines that were handed to the model and have no result."""
        return len(self._lines)

    def requests(self, served: Served) -> Iterator[TokenRequest]:
        """What the model is asked for a line; it goes on after what earlier runs have stored."""
        self.num_taken += 1
        line = self._lines[served.origin.line_number] = _Line(served)
        kept = self._store.kept(served.origin.line_number, served.origin.digest)
        for choice, each in kept.items():
            if (result := each.result(served.token_requests[choice].index)) is not None:
                line.results[choice] = result
        if line.done:
            self._finish(line)
            return
        left = [choice for choice in range(len(served.token_requests)) if choice not in line.results]
        for choice in left:  # the first may be finished before the last is asked for
            request = served.token_requests[choice]
            yield self._resumed(request, kept[choice].generated) if choice in kept else request

    def refuse(self, refused: Refused) -> None:
        """End a line that the model is not asked for."""
        self.num_taken += 1
        self._store.add(failure(refused, refused.error))

    def _resumed(self, request: TokenRequest, generated: Generated) -> TokenRequest:
        self._stored[request.index] = len(generated.token_ids)
        self.num_resumed += 1
        self.tokens_kept += len(generated.token_ids)
        return dataclasses.replace(request, generated=generated)

    def progress(self, live: Iterable[PartialAnswer]) -> list[Begun]:
        """What choices in progress have got since it was last asked."""
        return [self._row(each.index, each.generated) for each in live if len(each.generated.token_ids) > self._stored.get(each.index, 0)]

    def _row(self, index: int, generated: Generated, ending: Ending | None = None) -> Begun:
        stored = self._stored.get(index, 0)
        self._stored[index] = len(generated.token_ids)
        line_number, choice = place_of(index)
        return Begun(
            line_number=line_number,
            digest=self._lines[line_number].served.origin.digest,
            choice=choice,
            start=stored,
            generated=since(generated, stored),
            ending=ending,
        )

    def take(self, result: TokenResult) -> None:
        """A choice is finished, and perhaps its line."""
        line_number, choice = place_of(result.index)
        line = self._lines[line_number]
        line.results[choice] = result
        if line.done:
            self._finish(line)
        elif result.error is None:  # an error is for this run; a later one may have more memory
            generated = Generated(token_ids=result.token_ids, logprobs=result.logprobs)
            self._store.keep(self._row(result.index, generated, Ending.of(result)))

    def _finish(self, line: _Line) -> None:
        served = line.served
        del self._lines[served.origin.line_number]
        for request in served.token_requests:
            self._stored.pop(request.index, None)
        results = [line.results[choice] for choice in range(len(served.token_requests))]
        error = next((result.error for result in results if result.error is not None), None)
        self._store.add(failure(served, error) if error is not None else self._answered(served, results))

    def _success(self, served: Served, results: list[TokenResult]) -> Result:
        has_text = self._llm.tokenizer is not None
        prompt = served.token_requests[0].prompt_token_ids
        answer = Answer(
            num_prompt_tokens=len(prompt),
            completions=self._llm.completions(results, served.request.params, prompt),
            params=served.request.params,
            shows_ids=served.request.return_token_ids or isinstance(served.request.prompt, tuple) or not has_text,
            has_text=has_text,
        )
        return Result(
            line_number=served.origin.line_number,
            digest=served.origin.digest,
            record=_encoded(served.form.success(served.origin, answer)),
            failed=False,
            prompt_tokens=answer.num_prompt_tokens,
            output_tokens=sum(len(result.token_ids) for result in results),
        )

    def _answered(self, served: Served, results: list[TokenResult]) -> Result:
        """The result of a line whose choices are all there; one that cannot be written, or that the database cannot hold, is an error."""
        result = for_one_request(self._success, served, results)
        if isinstance(result, RequestError):
            return failure(served, result)
        if len(result.record) <= MAX_RECORD_BYTES:
            return result
        message = f"the answer has {len(result.record):,} bytes, more than the {MAX_RECORD_BYTES:,} of a record: ask for less at once"
        return failure(served, RequestError(message, code="answer_too_large"))


def failure(read: Served | Refused, error: RequestError) -> Result:
    """The result of a line that ended in an error."""
    record = _encoded(read.form.failure(read.origin, error))
    return Result(line_number=read.origin.line_number, digest=read.origin.digest, record=record, failed=True)


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
