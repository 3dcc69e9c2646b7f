"""The lines that the model is answering: the requests for each, the tokens generated so far, and the record at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexgen.api.job_request import JobRequest
from flexgen.base.isolation import for_one_request
from flexgen.errors import RequestError
from flexgen.jobs.model import JobModel
from flexgen.jobs.reading import line_and_choice
from flexgen.jobs.results import Results
from flexgen.jobs.saved_progress import ProgressRow, since
from flexgen.outputs import RequestOutput
from flexgen.request import Generated, PartialAnswer, TokenRequest, TokenResult
from flexgen.text.choices import classified

MAX_RECORD_BYTES = 900_000_000  # SQLite's own limit is 10^9
Judge = Callable[[Mapping[str, Any]], str | None]  # says why the answer in a record is not what was asked for; None if it is


class Serving:
    """The lines that the model is answering.

    Args:
        model: The model.
        store: What takes the results, and has the tokens that earlier runs generated.
        judge: Says which answers are errors of their lines; None where every answer counts.

    Attributes:
        num_taken: Number of lines taken so far, refused ones included.
        num_resumed: Number of answers that went on from the tokens of an earlier run.
        tokens_kept: Number of tokens of those answers that are not generated again.
    """

    def __init__(self, model: JobModel, store: Results, judge: Judge | None = None) -> None:
        self._model, self._store, self._judge = model, store, judge
        # Line number -> the line, the engine's request for each of its choices, and the results of finished choices, by choice.
        self._lines: dict[int, tuple[JobRequest, Sequence[TokenRequest], dict[int, TokenResult]]] = {}
        self._stored: dict[int, int] = {}  # index -> tokens of a choice that are stored
        self.num_taken = self.num_resumed = self.tokens_kept = 0

    @property
    def num_unfinished(self) -> int:
        """The number of lines that were handed to the model and have no result."""
        return len(self._lines)

    @property
    def num_awaited(self) -> int:
        """The number of answers that are awaited from the model."""
        return sum(len(token_requests) - len(results) for _, token_requests, results in self._lines.values())

    def requests(self, request: JobRequest, token_requests: Sequence[TokenRequest]) -> Iterator[TokenRequest]:
        """Yield the engine's requests for a line, which go on after the tokens that earlier runs have stored."""
        self.num_taken += 1
        kept = self._store.kept(request.line_number, request.digest)
        of_choice = {line_and_choice(each.index)[1]: each for each in token_requests}
        finished = ((choice, each.result(of_choice[choice].index)) for choice, each in kept.items() if choice in of_choice)
        results = {choice: result for choice, result in finished if result is not None}
        self._lines[request.line_number] = request, token_requests, results
        left = [choice for choice in of_choice if choice not in results]
        if not left:
            self._finish(request.line_number)
        for choice in left:  # the first choice may be finished before the last is pulled
            yield self._resumed(of_choice[choice], kept[choice].generated) if choice in kept else of_choice[choice]

    def refuse(self, request: JobRequest, error: RequestError) -> None:
        """Store the error of a line that the model is not asked to answer."""
        self.num_taken += 1
        add_failure(self._store, request, error)

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
        line_number, choice = line_and_choice(index)
        return ProgressRow(
            line_number=line_number,
            digest=self._lines[line_number][0].digest,
            choice=choice,
            start=stored,
            generated=since(generated, stored),
            result=result,
        )

    def take(self, result: TokenResult) -> None:
        """Take the result of a choice, which may be the last of its line."""
        line_number, choice = line_and_choice(result.index)
        _, token_requests, results = self._lines[line_number]
        results[choice] = result
        if len(results) == len(token_requests):
            self._finish(line_number)
        elif result.error is None:  # an error is not stored, because a later run may have more memory
            generated = Generated(token_ids=result.token_ids, logprobs=result.logprobs)
            self._store.keep(self._row(result.index, generated, result))

    def _finish(self, line_number: int) -> None:
        """Store the record of a line whose choices are all finished: an error where it cannot be made or is too large to store."""
        request, token_requests, results = self._lines.pop(line_number)
        for each in token_requests:
            self._stored.pop(each.index, None)
        error = next((result.error for _, result in sorted(results.items()) if result.error is not None), None)
        made = error or for_one_request(self._record, request, token_requests, {each.index: each for each in results.values()})
        if isinstance(made, RequestError):
            add_failure(self._store, request, made)
            return
        record, failed = made
        self._store.add(
            line_number,
            request.digest,
            record,
            failed=failed,
            prompt_tokens=_num_prompt_tokens(request, token_requests),
            output_tokens=sum(len(result.token_ids) for result in results.values()),
        )

    def _record(
        self, request: JobRequest, token_requests: Sequence[TokenRequest], results: Mapping[int, TokenResult]
    ) -> tuple[bytes, bool]:
        """Return the record of an answer, and whether it is an error, which then stands beside the answer."""
        if request.choices:
            text = request.prompt if isinstance(request.prompt, str) else None
            answer = request.form.scored(request, classified(token_requests, results, text))
        else:
            n = request.params.n
            groups = [token_requests[start : start + n] for start in range(0, len(token_requests), n)]
            outputs = [self._output(one, group, results) for one, group in zip(request.of_each_prompt(), groups, strict=True)]
            answer = request.form.success(request, outputs)
        fault = None if self._judge is None else self._judge(answer)
        if fault is not None:
            answer |= request.form.failure(request, RequestError(fault, code="invalid_answer"))
        record = _encoded(answer)
        if len(record) > MAX_RECORD_BYTES:
            message = f"the answer has {len(record):,} bytes, more than the {MAX_RECORD_BYTES:,} of a record: ask for less at once"
            raise RequestError(message, code="answer_too_large")
        return record, fault is not None

    def _output(self, request: JobRequest, token_requests: Sequence[TokenRequest], results: Mapping[int, TokenResult]) -> RequestOutput:
        """Return the answers to one prompt of a line, with the text of the prompt where the line asks for it."""
        ids, text = token_requests[0].prompt_token_ids, request.prompt if isinstance(request.prompt, str) else None
        if request.echo and text is None and self._model.tokenizer is not None:
            text = self._model.text_of(ids)
        return self._model.output([results[each.index] for each in token_requests], request.params, ids, text, request.tools)


def _num_prompt_tokens(request: JobRequest, token_requests: Sequence[TokenRequest]) -> int:
    if request.choices:
        return token_requests[0].first_scored
    return sum(len(each.prompt_token_ids) for each in token_requests[:: request.params.n])


def add_failure(store: Results, request: JobRequest, error: RequestError) -> None:
    """Store the record of a line that ended in an error."""
    store.add(request.line_number, request.digest, _encoded(request.form.failure(request, error)), failed=True)


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
