"""The form of each line, and what the line asks for in it.  Knows every form; nothing of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flexgen.api.bodies import parse_completion
from flexgen.api.fields import Form, JobRequest, Origin
from flexgen.api.openai import OpenAIForm, is_batch_line
from flexgen.api.plain import PlainForm
from flexgen.base.isolation import for_one_request
from flexgen.errors import OptionError, RequestError
from flexgen.jobs.lines import Line, parse_object, parse_text
from flexgen.request import SamplingParams

INPUT_FORMATS = ("jsonl", "text")
_MOST_NAMES = 8  # kept of each kind of remark


class Forms:
    """Reads lines.

    Args:
        model: the name of the model, which answers carry. created: seconds since 1970, which answers carry.
        defaults: of lines that do not say how they are sampled.
        input_format: "jsonl" recognises the form line by line; "text" takes every line as a prompt.
        strict: refuse lines that name another model.

    Raises:
        OptionError: an unknown input format.
    """

    def __init__(self, *, model: str, created: int, defaults: SamplingParams, input_format: str = "jsonl", strict: bool = False) -> None:
        if input_format not in INPUT_FORMATS:
            raise OptionError(f"input_format {input_format!r} is unknown; known: {', '.join(INPUT_FORMATS)}")
        self._model, self._created, self._defaults = model, created, defaults
        self._is_text, self._strict = input_format == "text", strict
        self._plain = PlainForm(defaults=defaults)

    def parse(self, line: Line) -> tuple[Origin, Form, JobRequest | RequestError]:
        """Never raises: a line that cannot be served has its error in place of a request."""
        form: Form = self._plain
        identity = None
        if self._is_text:
            request = for_one_request(self._parse_text, line)
        elif isinstance(fields := for_one_request(parse_object, line), RequestError):
            request = fields
        else:
            form = self._form(fields)
            identity = form.identity(fields)
            request = for_one_request(self._parse, form, fields)
        return Origin(line_number=line.number, digest=line.digest, id=identity), form, request

    def _parse_text(self, line: Line) -> JobRequest:
        return parse_completion({"prompt": parse_text(line)}, self._defaults)

    def _parse(self, form: Form, fields: Mapping[str, Any]) -> JobRequest:
        request = form.parse(fields)
        self._check_model(request)
        return request

    def _form(self, fields: Mapping[str, Any]) -> Form:
        if is_batch_line(fields):
            return OpenAIForm(url=fields.get("url"), model=self._model, created=self._created, defaults=self._defaults)
        return self._plain

    def _check_model(self, request: JobRequest) -> None:
        if self._strict and names_another(request.model, self._model):
            message = f"the line asks for the model {request.model!r}, this job has {self._model!r}"
            raise RequestError(message, code="model_not_found", param="model")


def names_another(asked: str | None, model: str) -> bool:
    """Whether a line asks for another model than this one; the last part of a path or hub id is name enough."""
    return asked is not None and asked not in (model, PurePath(model).name)


class Remarks:
    """What the author of a file should be told once, not once per line.

    Args:
        model: the name of the job's model.

    Attributes:
        num_unbounded: lines whose answers nothing bounds but the context.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.num_unbounded = 0
        self._ignored: Counter[str] = Counter()
        self._others: Counter[str] = Counter()

    def note(self, request: JobRequest) -> None:
        """Count what a line gives in vain."""
        self.num_unbounded += request.params.max_tokens is None
        self._ignored.update(request.ignored)
        if request.model is not None and names_another(request.model, self._model):
            known = request.model in self._others or len(self._others) < _MOST_NAMES
            self._others[request.model if known else "others"] += 1

    def lines(self) -> list[str]:
        """Remarks, if there are any."""
        remarks: list[str] = []
        if self._ignored:
            remarks.append(f"fields that have no effect here, with the number of lines that have them: {_counts(self._ignored)}")
        if self._others:
            remarks.append(f"lines that name another model, and are answered by {self._model} all the same: {_counts(self._others)}")
        return remarks


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name[:80]} {count:,}" for name, count in counter.most_common())
