"""The flags that say how a file of requests is read, and the lengths of its requests for `flexgen plan`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flexgen.base.from_json import parsed_json
from flexgen.base.quantities import counted
from flexgen.cli.options import load
from flexgen.errors import ModelError, OptionError
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """The flags that say how texts and conversations become tokens."""

    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another tokenizer than the model's: a folder, a GGUF file or a hub id.")
    ] = None
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Jinja template, or the name of one of the model's. Default: the model's own.")
    ] = None
    chat_template_kwargs: Annotated[
        list[str] | None, typer.Option(metavar="JSON", help='More variables for chat templates, such as {"enable_thinking": false}.')
    ] = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables for chat templates; a flag that is repeated adds to them.

        Raises:
            OptionError: A flag is not a JSON object, or two have the same variable.
        """
        variables: dict[str, Any] = {}
        for text in self.chat_template_kwargs or ():
            said = f"--chat-template-kwargs {text[:80]!r}"
            value = parsed_json(text or "{}", f"{said} is not valid JSON")
            if not isinstance(value, dict):
                raise OptionError(f"{said} is not a JSON object")
            if twice := [name for name in cast("dict[str, Any]", value) if name in variables]:
                raise OptionError(f"{said}: an earlier --chat-template-kwargs has {twice[0]!r}, too")
            variables |= value
        return variables

    @property
    def keywords(self) -> dict[str, Any]:
        """The flags as keywords of `LLM`."""
        return {"tokenizer": self.tokenizer, "chat_template": self.chat_template, "chat_template_kwargs": self.template_kwargs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Conversations):
    """The flags that say how a file of requests is read, shared by `flexgen run` and `flexgen plan`."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest answer of chats and bare lines that set none. Default: that of generation_config, else up to the context.",
        ),
    ] = None
    input_format: Annotated[
        str | None, typer.Option(metavar="jsonl|text", help="Input form; text takes every line as a prompt. Default: jsonl.")
    ] = None

    @property
    def form(self) -> str:
        """The format of the input."""
        return self.input_format or "jsonl"

    def check(self) -> None:
        """Check the values of the flags.

        Raises:
            OptionError: The input format is unknown, or the variables for templates are not a JSON object.
        """
        from flexgen.jobs.forms import INPUT_FORMATS

        if self.form not in INPUT_FORMATS:
            raise OptionError(f"--input-format {self.form!r} is unknown; known: {', '.join(INPUT_FORMATS)}")
        _ = self.template_kwargs


def check_source(source: Path | None, reading: Reading) -> None:
    """Check `--input` and the flags for its lines.

    Raises:
        OptionError: `--input` is not a file, flags for its lines are given without it, or their values are wrong.
    """
    if source is None:
        given = [field.name for field in dataclasses.fields(reading) if getattr(reading, field.name) is not None]
        if given:
            also = ": use --gen-len" * ("max_tokens" in given)
            raise OptionError(f"--{given[0].replace('_', '-')} is for the lines of an --input{also}")
    elif not source.is_file():
        raise OptionError(f"--input {source}: {'this is a folder' if source.is_dir() else 'there is no such file'}")
    reading.check()


def lengths_of(source: Path, reading: Reading, model: str, options: EngineOptions) -> Workload:
    """Return the lengths of a file's requests by the model's tokenizer and template.

    Args:
        source: The file of requests.
        reading: The flags that say how the file is read.
        model: The name of the model.
        options: The options of the engine.

    Raises:
        OptionError: No line can be answered.
        ModelError: There is no tokenizer.
    """
    from flexgen.cli.defaults import bare_defaults
    from flexgen.jobs.mistaken import check_input
    from flexgen.jobs.runner import Job

    check_input(source, input_format=reading.form)
    with _opened(reading, model, options) as llm:
        defaults = bare_defaults(llm, {"max_tokens": reading.max_tokens})
        job = Job(llm.model, source, None, defaults=defaults, input_format=reading.form)
        workload = job.scan()
    if not job.num_lines:
        raise OptionError(f"--input {source}: it has no lines")
    if not len(workload):
        raise OptionError(f"--input {source}: none of its {counted(job.num_lines, 'line')} can be answered ({job.first_bad})")
    if job.num_bad_lines:
        lines = counted(job.num_lines, "line")
        found = counted(job.num_bad_lines, f"of {lines} is bad and left out", f"of {lines} are bad and left out")
        logger.warning("%s: %s (%s)", source, found, job.first_bad)
    return workload


@contextlib.contextmanager
def _opened(reading: Reading, model: str, options: EngineOptions) -> Iterator[LLM]:
    """Open the model without its weights; one of the catalogue needs no files if `--tokenizer` names another tokenizer."""
    from flexgen.llm import LLM
    from flexgen.plan.known.models import catalogue_spec
    from flexgen.session.lookup import shipped_name

    # only the lengths of texts are asked for, which do not depend on how weights are stored
    options = dataclasses.replace(options, load_format="dummy", weight_format="auto", allow_formats=None)
    name = shipped_name(model) if options.revision is None else None
    if name is None:
        with load(model, options, "none", **reading.keywords) as llm:
            yield llm
        return
    if reading.tokenizer is not None:
        with _shipped(name) as files, LLM(files, **reading.keywords, **dataclasses.asdict(options)) as llm:
            yield llm
        return
    repository = model if "/" in model else catalogue_spec(name).name
    try:
        llm = load(repository, options, "none", **reading.keywords)
    except ModelError as error:
        raise ModelError(f"--input needs the tokenizer of {model}; give --tokenizer, or --prompt-len and --gen-len: {error}") from error
    with llm:
        yield llm


@contextlib.contextmanager
def _shipped(name: str) -> Iterator[Any]:
    """Yield the files of a model of the catalogue: its config only, in a temporary folder."""

    from flexgen.hub.model_files import ModelFiles, read_json
    from flexgen.plan.known.models import catalogue_fields
    from flexgen.session.shipped import catalogue_config

    with tempfile.TemporaryDirectory(prefix="flexgen-plan-") as folder:
        path = Path(folder)
        catalogue_config(name).save_pretrained(path)
        config = read_json(path / "config.json")
        source = catalogue_fields(name)["source"]
        yield ModelFiles(name=source, folder=path, config=config, generation_config={}, commit=None, has_tokenizer=False)
