"""Answers HELM's requests in a durable job, so that a run that was killed goes on.  Plain values: HELM itself is not needed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen.errors import RequestError
from flexgen.evaluation.helm_requests import Echo, HelmRequest, completions_of, digest_of, error_of, lead_of, line_of, num_hidden
from flexgen.jobs.durable import answer_lines
from flexgen.jobs.export import read_records
from flexgen.jobs.folder import JobPaths
from flexgen.llm import LLM
from flexgen.report.progress import Progress

_ANY_TEXT = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyed:
    """A request and its key in HELM's cache."""

    request: HelmRequest
    key: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """The id of the line that asks for it."""
        return digest_of(self.key)


class Answerer:
    """Answers requests by a model.

    Args:
        llm: The model, which must have a tokenizer.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        plain, special = (llm.encode([_ANY_TEXT], add_special_tokens=add)[0] for add in (False, True))
        self.lead = lead_of(plain, special)

    def answer(
        self, requests: Sequence[Keyed], folder: Path, *, on_progress: Callable[[Progress], None] | None = None
    ) -> dict[str, dict[str, Any] | RequestError]:
        """Return the response, or the error, of each request by its id.

        A response is a JSON object with the completions (see `completions_of`) and times.  What interrupted calls have answered in the
        folder is not answered again, whatever other requests there were.

        Args:
            requests: The requests; of several with the same key one is answered.
            folder: The folder of the jobs, which is created.
            on_progress: A callback that is called with the progress of the run.

        Raises:
            FlexGenError: The engine failed, or another process answers in the folder; what was answered is kept.
        """
        wanted = {each.identity: each for each in requests}
        jobs = folder / digest_of(self._llm.model.fingerprint())  # another model begins anew
        jobs.mkdir(parents=True, exist_ok=True)
        own = jobs / digest_of(sorted(wanted))
        records = {key: record for key, record in _earlier(jobs, own) if key in wanted}
        left = [each for key, each in wanted.items() if key not in records]
        started = time.time()
        if left:
            answered = answer_lines(self._llm, self._lines(left), own, on_progress=on_progress)
            records |= {each.identity: record for each, record in zip(left, answered, strict=True)}
        times = _times(started, max(len(left), 1))
        return {key: self._response(wanted[key], record, times) for key, record in records.items()}

    def _lines(self, requests: Sequence[Keyed]) -> Iterator[dict[str, Any]]:
        encoded = self._llm.model.encode_each((each.request.prompt for each in requests), add_special_tokens=False)
        for each, ids in zip(requests, encoded, strict=True):
            # A text that cannot be encoded becomes the prompt as it is, so that its record has the error.
            failed = isinstance(ids, RequestError)
            yield line_of(each.request, each.key, each.request.prompt if failed else self._read(ids))

    def _read(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens that the model reads for a prompt."""
        return [*self.lead[: num_hidden(self.lead, ids)], *ids]

    def _response(self, each: Keyed, record: Mapping[str, Any], times: Mapping[str, Any]) -> dict[str, Any] | RequestError:
        if (error := error_of(record)) is not None:
            return error
        echo = self._echo(each.request) if each.request.echo_prompt else None
        return {"completions": completions_of(record, echo), **times}

    def _echo(self, request: HelmRequest) -> Echo:
        ids = self._llm.encode([request.prompt], add_special_tokens=False)[0]
        return Echo(text=request.prompt, first=self._llm.model.text_of(ids[:1]), hidden=num_hidden(self.lead, ids))


def _earlier(jobs: Path, own: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the answers that other jobs in the folder have, by their ids."""
    for job in sorted(jobs.iterdir()):
        paths = JobPaths(folder=job, output=None)
        if job != own and paths.database.is_file():
            yield from ((record["id"], record) for record in read_records(paths) if error_of(record) is None)


def _times(started: float, size: int) -> dict[str, Any]:
    """Return the times of a batch under HELM's names."""
    seconds = time.time() - started
    return {"request_time": seconds / size, "request_datetime": int(started), "batch_size": size, "batch_request_time": seconds}
