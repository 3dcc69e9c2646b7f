"""The lines that the model is answering: the requests for each, the tokens generated so far, and the record at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen.api.job_request import JobRequest
from flexgen.base.isolation import for_one_request
from flexgen.errors import RequestError
from flexgen.jobs.model import JobModel
from flexgen.jobs.reading import place_of
from flexgen.jobs.saved_progress import ProgressRow, since
from flexgen.jobs.store import ResultRow, Store
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult

MAX_RECORD_BYTES = 900_000_000  # SQLite's own limit is 10^9


@dataclass(frozen=True, slots=True)
class _OpenLine:
    """A line in progress.

    Attributes:
        request: The line.
        token_requests: The engine's request for each choice of the line.
        results: The results of finished choices, by choice.
    """

    request: JobRequest
    token_requests: Sequence[TokenRequest]
    results: dict[int, TokenResult] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.token_requests)


class Serving:
    """The lines that the model is answering.

    Args:
        model: The model.
        store: The state of the job, which takes results and has the tokens that earlier runs generated.

    Attributes:
        num_taken: Number of lines taken so far, refused ones included.
        num_resumed: Number of answers that went on from the tokens of an earlier run.
        tokens_kept: Number of tokens of those answers that are not generated again.
    """

    def __init__(self, model: JobModel, store: Store) -> None:
        self._model, self._store = model, store
        self._lines: dict[int, _OpenLine] = {}  # by line number
        self._stored: dict[int, int] = {}  # index -> tokens of a choice that are stored
        self.num_taken = self.num_resumed = self.tokens_kept = 0

    @property
    def num_unfinished(self) -> int:
        """The number of lines that were handed to the model and have no result."""
        return len(self._lines)

    def requests(self, request: JobRequest, token_requests: Sequence[TokenRequest]) -> Iterator[TokenRequest]:
        """Yield the engine's requests for a line, which go on after the tokens that earlier runs have stored."""
        self.num_taken += 1
        line = self._lines[request.line_number] = _OpenLine(request, token_requests)
        kept = self._store.kept(request.line_number, request.digest)
        for choice, each in kept.items():
            if (result := each.result(token_requests[choice].index)) is not None:
                line.results[choice] = result
        if line.done:
            self._finish(line)
            return
        left = [choice for choice in range(len(token_requests)) if choice not in line.results]
        for choice in left:  # the first choice may be finished before the last is pulled
            yield self._resumed(token_requests[choice], kept[choice].generated) if choice in kept else token_requests[choice]

    def refuse(self, request: JobRequest, error: RequestError) -> None:
        """Store the error of a line that the model is not asked to answer."""
        self.num_taken += 1
        self._store.add(failure(request, error))

    def _resumed(self, request: TokenRequest, generated: Generated) -> TokenRequest:
        self._stored[request.index] = len(generated.token_ids)
        self.num_resumed += 1
        self.tokens_kept += len(generated.token_ids)
        return dataclasses.replace(request, generated=generated)

    def progress(self, live: Iterable[PartialAnswer]) -> list[ProgressRow]:
        """Return the new tokens of choices in progress since the last call."""
        return [self._row(each.index, each.generated) for each in live if len(each.generated.token_ids) > self._stored.get(each.index, 0)]

    def _row(self, index: int, generated: Generated, result: TokenResult | None = None) -> ProgressRow:
        stored = self._stored.get(index, 0)
        self._stored[index] = len(generated.token_ids)
        line_number, choice = place_of(index)
        return ProgressRow(
            line_number=line_number,
            digest=self._lines[line_number].request.digest,
            choice=choice,
            start=stored,
            generated=since(generated, stored),
            result=result,
        )

    def take(self, result: TokenResult) -> None:
        """Take the result of a choice, which may be the last of its line."""
        line_number, choice = place_of(result.index)
        line = self._lines[line_number]
        line.results[choice] = result
        if line.done:
            self._finish(line)
        elif result.error is None:  # an error is not stored, because a later run may have more memory
            generated = Generated(token_ids=result.token_ids, logprobs=result.logprobs)
            self._store.keep(self._row(result.index, generated, result))

    def _finish(self, line: _OpenLine) -> None:
        del self._lines[line.request.line_number]
        for request in line.token_requests:
            self._stored.pop(request.index, None)
        error = next((result.error for _, result in sorted(line.results.items()) if result.error is not None), None)
        self._store.add(failure(line.request, error) if error is not None else self._answered(line))

    def _answered(self, line: _OpenLine) -> ResultRow:
        """Return the result of a line whose choices are all finished: an error where the record cannot be made or is too large to store."""
        result = for_one_request(self._success, line)
        if isinstance(result, RequestError):
            return failure(line.request, result)
        if len(result.record) <= MAX_RECORD_BYTES:
            return result
        message = f"the answer has {len(result.record):,} bytes, more than the {MAX_RECORD_BYTES:,} of a record: ask for less at once"
        return failure(line.request, RequestError(message, code="answer_too_large"))

    def _success(self, line: _OpenLine) -> ResultRow:
        request, prompt = line.request, line.token_requests[0].prompt_token_ids
        completions = self._model.completions(line.results.values(), request.body.params, prompt)
        return ResultRow(
            line_number=request.line_number,
            digest=request.digest,
            record=_encoded(request.form.success(request, completions, len(prompt))),
            failed=False,
            prompt_tokens=len(prompt),
            output_tokens=sum(len(result.token_ids) for result in line.results.values()),
        )


def failure(request: JobRequest, error: RequestError) -> ResultRow:
    """Return the result of a line that ended in an error."""
    record = _encoded(request.form.failure(request, error))
    return ResultRow(line_number=request.line_number, digest=request.digest, record=record, failed=True)


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
