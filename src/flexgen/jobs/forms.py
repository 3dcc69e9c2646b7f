"""Recognises the form of each line and parses its request.  Knows all forms, and nothing of models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flexgen.api.job_request import JobRequest, LineForm
from flexgen.api.openai import OpenAIForm, is_batch_line
from flexgen.api.plain import PlainForm
from flexgen.base.isolation import for_one_request
from flexgen.errors import OptionError, RequestError
from flexgen.jobs.lines import Line, parse_object, parse_text
from flexgen.request import SamplingParams

INPUT_FORMATS = ("jsonl", "text")
_MOST_NAMES = 8  # of other models; further ones are counted together


class Forms:
    """Parses lines as requests.

    Args:
        model: The name of the model, written into answers.
        created: The time written into answers, in seconds since 1970.
        defaults: The sampling parameters of lines that set none.
        has_text: Whether answers have text; False where the model has no tokenizer.
        input_format: The format of the file: "jsonl" recognises the form line by line, "text" takes every line as a prompt.
        strict: Whether lines that name another model are refused.

    Raises:
        OptionError: The input format is unknown.
    """

    def __init__(
        self,
        *,
        model: str,
        created: int,
        defaults: SamplingParams,
        has_text: bool = True,
        input_format: str = "jsonl",
        strict: bool = False,
    ) -> None:
        if input_format not in INPUT_FORMATS:
            raise OptionError(f"input_format {input_format!r} is unknown; known: {', '.join(INPUT_FORMATS)}")
        self._model, self._is_text, self._strict = model, input_format == "text", strict
        self._plain = PlainForm(defaults=defaults, has_text=has_text)
        self._openai = OpenAIForm(url=None, model=model, created=created, defaults=defaults, has_text=has_text)

    def parse(self, line: Line) -> JobRequest:
        """Parse a line as a request.  This never raises: for a line that cannot be served, the error takes the place of the request."""
        form: LineForm = self._plain
        identity = None
        fields = for_one_request(self._fields, line)
        if not isinstance(fields, RequestError):
            form = self._form(fields)
            identity = form.identity(fields)
        request = JobRequest(line_number=line.number, digest=line.digest, form=form, id=identity)
        parsed = fields if isinstance(fields, RequestError) else for_one_request(self._parse, request, fields)
        return request.refused(parsed) if isinstance(parsed, RequestError) else parsed

    def _fields(self, line: Line) -> dict[str, Any]:
        return {"prompt": parse_text(line)} if self._is_text else parse_object(line)

    def _parse(self, line: JobRequest, fields: Mapping[str, Any]) -> JobRequest:
        request = line.form.parse(line, fields)
        if self._strict and names_another(request.model, self._model):
            message = f"the line asks for the model {request.model!r}, this job has {self._model!r}"
            raise RequestError(message, code="model_not_found", param="model")
        return request

    def _form(self, fields: Mapping[str, Any]) -> LineForm:
        return dataclasses.replace(self._openai, url=fields.get("url")) if is_batch_line(fields) else self._plain


def names_another(asked: str | None, model: str) -> bool:
    """Return whether a line asks for another model than this one, which it may name by its full name or the last part of it."""
    return asked is not None and asked not in (model, PurePath(model).name)


class Remarks:
    """Counts what the author of a file should be informed of once, not once per line.

    Args:
        model: The name of the job's model.

    Attributes:
        num_unbounded: The number of lines whose answers are bounded only by the context.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.num_unbounded = 0
        self._ignored: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    def note(self, request: JobRequest) -> None:
        """Count the fields of a line that have no effect, an answer without a bound, and the name of another model."""
        self.num_unbounded += request.params.max_tokens is None
        self._ignored.update(request.ignored)
        if request.model is not None and names_another(request.model, self._model):
            known = request.model in self._others or len(self._others) < _MOST_NAMES
            self._others[request.model if known else "others"] += 1

    def lines(self) -> list[str]:
        """Return the remarks, one line each."""
        remarks: list[str] = []
        if self._ignored:
            remarks.append(f"fields that have no effect here, with the number of lines that have them: {_counts(self._ignored)}")
        if self._others:
            remarks.append(f"lines that name another model, and are answered by {self._model} all the same: {_counts(self._others)}")
        return remarks


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name[:80]} {count:,}" for name, count in counter.most_common())
