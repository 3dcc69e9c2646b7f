"""Recognises the form of each line and parses its request.  Knows all forms, and nothing of models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flexgen.api.job_request import Form, JobRequest, RequestBody
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
        form: Form = self._plain
        identity = None
        if self._is_text:
            asked = for_one_request(self._parse_text, line)
        elif isinstance(fields := for_one_request(parse_object, line), RequestError):
            asked = fields
        else:
            form = self._form(fields)
            identity = form.identity(fields)
            asked = for_one_request(self._parse, form, fields)
        return JobRequest(line_number=line.number, digest=line.digest, id=identity, form=form, asked=asked)

    def _parse_text(self, line: Line) -> RequestBody:
        return self._plain.parse({"prompt": parse_text(line)})

    def _parse(self, form: Form, fields: Mapping[str, Any]) -> RequestBody:
        body = form.parse(fields)
        if self._strict and names_another(body.model, self._model):
            message = f"the line asks for the model {body.model!r}, this job has {self._model!r}"
            raise RequestError(message, code="model_not_found", param="model")
        return body

    def _form(self, fields: Mapping[str, Any]) -> Form:
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

    def note(self, body: RequestBody) -> None:
        """Count the fields of a line that have no effect, an answer without a bound, and the name of another model."""
        self.num_unbounded += body.params.max_tokens is None
        self._ignored.update(body.ignored)
        if body.model is not None and names_another(body.model, self._model):
            known = body.model in self._others or len(self._others) < _MOST_NAMES
            self._others[body.model if known else "others"] += 1

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
