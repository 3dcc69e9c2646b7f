"""The sampling parameters of lines that set none, and the summary that the user reads before a job begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen.base.quantities import counted
from flexgen.base.scalars import in_json
from flexgen.errors import OptionError, RequestError

if TYPE_CHECKING:
    from flexgen.jobs.runner import Job
    from flexgen.llm import LLM
    from flexgen.plan.workload import Workload
    from flexgen.request import SamplingParams

_LONG_ANSWER = 256  # tokens


def bare_defaults(llm: LLM, given: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters of lines that set none.

    Flags come first, then generation_config.json, then vLLM's defaults.  Answers may fill the context unless a flag or `max_new_tokens` in
    generation_config.json bounds them.

    Args:
        llm: The model.
        given: The values of flags, by name of the sampling parameter; None where a flag is not given.

    Raises:
        OptionError: The value of a flag is out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    limit = llm.files.generation_config.get("max_new_tokens")
    try:
        return dataclasses.replace(llm.get_default_sampling_params(), **{"max_tokens": limit, **given})
    except RequestError as error:
        if error.param not in given:
            raise
        raise OptionError(f"--{error.param.replace('_', '-')} {given[error.param]}: {error}") from error


def describe(job: Job, workload: Workload) -> str:
    """Describe the lines that are about to be answered, and the defaults of their sampling parameters."""
    from flexgen.api.openai import COMPLETIONS_MAX_TOKENS

    found = job.store.num_found if job.store is not None else 0
    bare = job.defaults
    limit = counted(bare.max_tokens, "token") if bare.max_tokens is not None else f"up to the context of {job.model.max_model_len:,}"
    sampling = "greedy" if bare.temperature == 0 else f"temperature {bare.temperature:g}, top_p {bare.top_p:g}, top_k {bare.top_k}"
    sampling = ", ".join([sampling, *_unusual(bare)])
    bad = f"{job.num_bad_lines:,} of them bad" + (f" ({job.first_bad})" if job.first_bad else "")
    requests = f" by {counted(len(workload), 'request')}" if len(workload) != job.num_left else ""  # one for each of several choices
    told = (
        f"{job.name}: {counted(job.num_lines, 'line')}, {bad}, {found:,} done before, {job.num_left:,} to answer{requests}: "
        f"{workload.prompt_tokens:,} prompt and at most {counted(sum(workload.output_lens), 'output token')}"
        + (f", {counted(workload.scored_tokens, 'position')} to score\n" if workload.scored_tokens else "\n")
        + f"defaults of lines that leave them out: {sampling}, {limit} (/v1/completions: {COMPLETIONS_MAX_TOKENS} tokens)"
    )
    return "\n".join([told, *job.remarks.lines()])


def warnings_about(job: Job, workload: Workload) -> list[str]:
    """Return a warning if lines without `max_tokens` may get long answers, which may be unintended; otherwise nothing."""
    longest = max(workload.output_lens, default=0)
    if not job.remarks.num_unbounded or longest < _LONG_ANSWER:
        return []
    return [
        f"warning: {counted(job.remarks.num_unbounded, 'line sets', 'lines set')} no max_tokens, and there is no --max-tokens: "
        f"an answer may have up to {longest:,} tokens, sampled at temperature {job.defaults.temperature:g} where a line sets none; "
        "--max-tokens N bounds them, and --temperature T changes the default (0 is greedy)"
    ]


def _unusual(defaults: SamplingParams) -> list[str]:
    """Return the defaults that differ from vLLM's, without those that are always shown."""
    from flexgen.request import SamplingParams

    told = ("temperature", "top_p", "top_k", "max_tokens")
    usual = dataclasses.asdict(SamplingParams())
    return [f"{name} {in_json(value)}" for name, value in dataclasses.asdict(defaults).items() if name not in told and value != usual[name]]
