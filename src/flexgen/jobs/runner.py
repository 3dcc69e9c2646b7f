"""One job: every line of the input that is not blank ends in exactly one record of the output.

Two scans of the input, both streaming.  The first answers bad lines with errors and measures the others, because the plan depends
on their lengths; the second feeds them to the model as it asks for them.  Knows lines and answers; nothing of how the model runs.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.engine.progress import Progress
from flexgen.errors import EngineError, RequestError, StorageError
from flexgen.jobs.fields import Answer, Form, JobRequest, Origin
from flexgen.jobs.forms import Forms, Remarks
from flexgen.jobs.lines import Line, read_lines
from flexgen.jobs.prompts import encode_prompts
from flexgen.jobs.store import Store
from flexgen.llm import LLM
from flexgen.plan.workload import Workload
from flexgen.request import SamplingParams, TokenRequest, TokenResult

_BATCH_LINES = 256  # tokenised together
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parsed:
    """A line as its form understands it."""

    origin: Origin
    form: Form
    request: JobRequest | RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """What is kept of a request while the model has it."""

    origin: Origin
    form: Form
    params: SamplingParams
    num_prompt_tokens: int
    shows_ids: bool


class Job:
    """A file of requests on its way through a model.

    Args:
        llm: the model.
        source: the input file; it must not change while the job runs.
        store: where records go; None only measures (`--dry-run`).
        defaults: of lines that do not say how they are sampled.

    Attributes:
        num_lines: lines that are not blank.
        num_bad_lines: those that the scan answered with an error.
        started: whether the model has taken requests.
        defaults: as given.
        remarks: on the lines that the scan left for the model.
    """

    def __init__(self, llm: LLM, source: Path, store: Store | None, *, defaults: SamplingParams) -> None:
        self.llm, self.source, self.store = llm, source, store
        self.num_lines = self.num_bad_lines = 0
        self.started = False
        self.defaults = defaults
        self._created = store.created if store is not None else 0
        self._forms = Forms(model=llm.files.name, created=self._created, defaults=defaults)
        self.remarks = Remarks(llm.files.name)
        self._pending = array("Q")  # digests of the lines that the scan left for the model, in order
        self._live: dict[int, _Live] = {}  # by line number

    def scan(self) -> Workload:
        """Answer bad lines, and measure the good ones that have no answer yet.

        Raises:
            StorageError: the input cannot be read, or the output belongs to another input.
        """
        same: dict[int, int] = {}  # one object per length: a tuple of a million of them stays small
        prompt_lens: list[int] = []
        output_lens: list[int] = []
        for parsed, request in self._requests(self._unanswered()):
            if isinstance(request, RequestError):
                self.num_bad_lines += 1
                self._record(parsed.origin, parsed.form.failure(parsed.origin, request), failed=True)
            else:
                assert isinstance(parsed.request, JobRequest)  # a RequestError has no token request
                self.remarks.note(parsed.request)
                self._pending.append(parsed.origin.digest)
                prompt_lens.append(same.setdefault(len(request.prompt_token_ids), len(request.prompt_token_ids)))
                output_lens.append(same.setdefault(request.max_tokens, request.max_tokens))
        return Workload(prompt_lens=tuple(prompt_lens), output_lens=tuple(output_lens))

    def run(self, workload: Workload, *, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Have the model answer what the scan left for it; records are written as answers finish.

        Raises:
            StorageError: the input changed since the scan, or the output cannot be written.
            FlexGenError: whatever stops the engine; what was answered is kept.
        """
        if not len(workload):
            return
        num_answered = 0
        for result in self.llm.stream(self._token_requests(), workload, on_progress=on_progress):
            self._finish(result)
            num_answered += 1
        if num_answered != len(self._pending):
            raise EngineError(f"the engine answered {num_answered} of {len(self._pending)} requests")

    # -- reading --------------------------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[Line]:
        if not self.source.is_file():
            raise StorageError(f"{self.source} is not a file; the input is read twice, so it must be one")
        try:
            with self.source.open("rb") as file:
                yield from read_lines(file)
        except OSError as error:
            raise StorageError(f"{self.source} cannot be read: {error}") from error

    def _unanswered(self) -> Iterator[Line]:
        """The lines of the first scan."""
        last = 0
        for line in self._lines():
            self.num_lines += 1
            last = line.number
            if self.store is None or not self.store.is_done(line.number, line.digest):
                yield line
        if self.store is not None:
            self.store.check_last_line(last)

    def _left_by_scan(self) -> Iterator[Line]:
        """The same lines again, less those that the scan answered."""
        num_left = 0
        for line in self._lines():
            if num_left == len(self._pending):
                return
            if self.store is not None and self.store.is_done(line.number, line.digest):
                continue
            if line.digest != self._pending[num_left]:
                break
            num_left += 1
            yield line
        if num_left < len(self._pending):
            raise StorageError(f"{self.source} changed while it was being answered")

    def _requests(self, lines: Iterable[Line]) -> Iterator[tuple[_Parsed, TokenRequest | RequestError]]:
        for batch in _batches(lines):
            parsed = [self._parse(line) for line in batch]
            yield from zip(parsed, self._tokenised(parsed), strict=True)

    def _parse(self, line: Line) -> _Parsed:
        origin, form, request = self._forms.parse(line)
        return _Parsed(origin=origin, form=form, request=request)

    def _tokenised(self, batch: list[_Parsed]) -> Iterator[TokenRequest | RequestError]:
        prompts = encode_prompts(self.llm, [parsed.request for parsed in batch], now=self._created or None)
        for parsed, ids in zip(batch, prompts, strict=True):
            try:
                if isinstance(ids, RequestError):
                    raise ids
                assert isinstance(parsed.request, JobRequest)  # errors have no ids
                yield self._token_request(parsed.origin.line_number, ids, parsed.request)
            except RequestError as error:
                yield error

    def _token_request(self, line_number: int, ids: Iterable[int], request: JobRequest) -> TokenRequest:
        if request.params.n > 1:
            raise RequestError("n is not supported yet (only 1 is)", code="unsupported_field", param="n")
        (token_request,) = self.llm.token_requests(line_number, tuple(ids), request.params)
        asked = request.params.max_tokens
        if request.states_max_tokens and asked is not None and token_request.max_tokens < asked:
            length, context = len(token_request.prompt_token_ids), self.llm.max_model_len
            message = f"the prompt's {length} tokens and max_tokens {asked} exceed the context of {context}"
            raise RequestError(message, code="context_length_exceeded", param="max_tokens")
        return token_request

    # -- answering ------------------------------------------------------------------------------------------------------------------

    def _token_requests(self) -> Iterator[TokenRequest]:
        """What the model pulls: the second scan."""
        for parsed, token_request in self._requests(self._left_by_scan()):
            assert isinstance(parsed.request, JobRequest)  # bad lines have been answered
            assert isinstance(token_request, TokenRequest)
            self._live[token_request.index] = _Live(
                origin=parsed.origin,
                form=parsed.form,
                params=parsed.request.params,
                num_prompt_tokens=len(token_request.prompt_token_ids),
                shows_ids=parsed.request.return_token_ids or isinstance(parsed.request.prompt, tuple) or self.llm.tokenizer is None,
            )
            self.started = True
            yield token_request

    def _finish(self, result: TokenResult) -> None:
        live = self._live.pop(result.index)
        if result.error is not None:
            self._record(live.origin, live.form.failure(live.origin, result.error), failed=True)
            return
        (completion,) = self.llm.completions([result], live.params)
        answer = Answer(
            num_prompt_tokens=live.num_prompt_tokens,
            completions=[completion],
            params=live.params,
            shows_ids=live.shows_ids,
            has_text=self.llm.tokenizer is not None,
        )
        self._record(live.origin, live.form.success(live.origin, answer), failed=False)

    def _record(self, origin: Origin, record: dict[str, Any], *, failed: bool) -> None:
        if self.store is not None:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            self.store.append(origin.line_number, origin.digest, line, failed=failed)


def identity(llm: LLM, defaults: SamplingParams) -> dict[str, str | int | None]:
    """What must stay the same between the runs of a job, because it changes answers."""
    return {
        "model": llm.files.name if llm.files.commit is not None else str(llm.files.folder.resolve()),
        "commit": llm.files.commit,
        "dtype": llm.options.dtype,
        "load_format": llm.options.load_format,
        "max_model_len": llm.max_model_len,
        "max_tokens": defaults.max_tokens,
        "seed": llm.options.seed,
    }


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """A few lines at a time, fewer where they are long."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.content or b"")
        if len(batch) >= _BATCH_LINES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
