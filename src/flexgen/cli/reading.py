"""How an input is read when nothing is to be answered: the flags of `flexgen run` that decide about lengths, and what they give."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.cli.options import load
from flexgen.errors import ModelError, OptionError
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload

logger = logging.getLogger(__name__)

_JOB = "The job"

Source = Annotated[Path | None, typer.Option("--input", metavar="FILE", help="Requests, as for `flexgen run`.", rich_help_panel=_JOB)]
InputFormat = Annotated[
    str | None, typer.Option(metavar="jsonl|text", help="Of the input; text takes every line as a prompt.", rich_help_panel=_JOB)
]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer of lines that set none.", rich_help_panel=_JOB)]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="NAME", help="Another tokenizer than the model's: a folder or hub id.", rich_help_panel=_JOB)
]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="A Jinja template, or the name of one of the model's.", rich_help_panel=_JOB)
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(metavar="JSON", help='What templates are told besides messages: {"enable_thinking": false}.', rich_help_panel=_JOB),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A file of requests, and how `flexgen run` would read it; None is what that does without the flag."""

    source: Path | None
    input_format: str | None
    max_tokens: int | None
    tokenizer: str | None
    chat_template: str | None
    chat_template_kwargs: str | None

    def check(self) -> None:
        """Raises OptionError for flags that cannot be meant."""
        from flexgen.jobs.forms import INPUT_FORMATS

        if self.source is None:
            given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
            if given:
                also = ": use --gen-len" * (given[0] == "max_tokens")
                raise OptionError(f"--{given[0].replace('_', '-')} is for the lines of an --input{also}")
        elif not self.source.is_file():
            raise OptionError(f"--input {self.source}: {'this is a folder' if self.source.is_dir() else 'there is no such file'}")
        if self.input_format not in (None, *INPUT_FORMATS):
            raise OptionError(f"--input-format {self.input_format!r} is unknown; known: {', '.join(INPUT_FORMATS)}")
        self.template_kwargs()

    def template_kwargs(self) -> dict[str, Any]:
        """Raises OptionError where they are no JSON object."""
        text = self.chat_template_kwargs or "{}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"--chat-template-kwargs {text[:80]!r} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise OptionError(f"--chat-template-kwargs {text[:80]!r} is not a JSON object")
        return value


def lengths_of(reading: Reading, model: str, options: EngineOptions) -> Workload:
    """Of a file's requests, by the model's tokenizer and template.

    Raises:
        OptionError: no line can be answered. ModelError: there is no tokenizer to be had.
    """
    from flexgen.cli.job import bare_defaults
    from flexgen.jobs.mistaken import check_input
    from flexgen.jobs.runner import Job

    source = reading.source
    assert source is not None
    check_input(source, input_format=reading.input_format or "jsonl")
    with _opened(reading, model, options) as llm:
        defaults = bare_defaults(llm, {"max_tokens": reading.max_tokens})
        job = Job(llm, source, None, defaults=defaults, input_format=reading.input_format or "jsonl")
        workload = job.scan()
    if not job.num_lines:
        raise OptionError(f"--input {source}: it has no lines")
    if not len(workload):
        raise OptionError(f"--input {source}: none of its {job.num_lines:,} lines can be answered ({job.first_bad})")
    if job.num_bad_lines:
        lines = f"{job.num_bad_lines:,} of {job.num_lines:,} lines are bad and left out"
        logger.warning("%s: %s (%s)", source, lines, job.first_bad)
    return workload


@contextlib.contextmanager
def _opened(reading: Reading, model: str, options: EngineOptions) -> Iterator[LLM]:
    """The model without its weights; a shipped one is what the catalogue says where another tokenizer is given."""
    from flexgen.llm import LLM
    from flexgen.plan.known.models import catalogue_spec
    from flexgen.session.lookup import shipped_name

    options = dataclasses.replace(options, load_format="dummy")
    more = {"tokenizer": reading.tokenizer, "chat_template": reading.chat_template, "chat_template_kwargs": reading.template_kwargs()}
    name = shipped_name(model) if options.revision is None else None
    if name is None:
        with load(model, options, "none", **more) as llm:
            yield llm
        return
    if reading.tokenizer is not None:
        with _shipped(name) as files, LLM(files, **more, **dataclasses.asdict(options)) as llm:
            yield llm
        return
    repository = model if "/" in model else catalogue_spec(name).name
    try:
        llm = load(repository, options, "none", **more)
    except ModelError as error:
        raise ModelError(f"--input needs the tokenizer of {model}; give --tokenizer, or --prompt-len and --gen-len: {error}") from error
    with llm:
        yield llm


@contextlib.contextmanager
def _shipped(name: str) -> Iterator[Any]:
    """The files of a shipped model: its config, and nothing else."""
    from transformers import AutoConfig

    from flexgen.hub.folder import read_json
    from flexgen.hub.hub import ModelFiles
    from flexgen.models.catalogue import ENTRIES

    entry = ENTRIES[name]
    with tempfile.TemporaryDirectory(prefix="flexgen-plan-") as folder:
        path = Path(folder)
        AutoConfig.for_model(entry.model_type, **entry.config).save_pretrained(path)
        config = read_json(path / "config.json")
        yield ModelFiles(name=entry.source, folder=path, config=config, generation_config={}, commit=None, has_tokenizer=False)
