"""Writes the text of `--help`: options in sections, with names that are never cut, examples, and pages of the documentation.

It is plain text, so that it can be piped and copied, and so that it appears before any library for terminals is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flexgen.cli.exit_codes import ExitCode

_WIDEST = 100  # longer lines are hard to read
_NAMES_COLUMN = 32  # longer names have their explanation on the next line
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST}

# Section -> names of the parameters in it, for options without a panel of their own.
_SECTIONS = {
    "Requests": ("source", "max_tokens", "temperature", "top_p", "input_format", "tokenizer", "chat_template", "chat_template_kwargs"),
    "Output": ("output", "to", "order", "metrics", "output_json", "as_json", "progress", "verbose"),
}

# Command -> (example, its effect).
EXAMPLES = {
    "flexgen": [
        ("flexgen run MODEL requests.jsonl -o answers.jsonl", "answer a file of requests"),
        ("flexgen map MODEL t.csv -o out.csv --prompt '{text} ...'", "ask about every row of a table"),
        ("flexgen plan MODEL --input requests.jsonl", "how long that would take"),
        ("flexgen status answers.jsonl", "how far it is"),
    ],
    "run": [
        ("flexgen run MODEL requests.jsonl -o answers.jsonl", "answer the requests; the same command again goes on where it stopped"),
        ("flexgen run MODEL requests.jsonl -o answers.jsonl --host-mem 24GiB", "use no more memory than that"),
        ("flexgen run MODEL requests.jsonl -o answers.jsonl --dry-run", "only check the requests, and show the plan"),
        ("flexgen run MODEL requests.jsonl -o answers.jsonl --retry-errors", "once more for lines that ended in an error"),
        ("flexgen run MODEL requests.jsonl -o answers.jsonl --workers 2", "divided between two processes"),
    ],
    "map": [
        ("flexgen map MODEL t.csv -o out.csv --prompt 'Summarise: {text}'", "a column `answer` with what the model says"),
        ("flexgen map MODEL t.csv -o out.csv --prompt '{text}' --choices yes,no", "the likelier of two answers"),
        ("flexgen map MODEL t.csv -o out.csv --prompt '{text}' --dry-run", "the first three prompts, and the plan"),
        ("flexgen map MODEL t.csv -o out.csv --prompt '{text}' --schema s.json", "a column for each property of the schema"),
    ],
    "work": [
        ("flexgen work /shared/answers.jsonl", "one more worker, on any host that sees the folder of the job"),
        ("flexgen work /shared/answers.jsonl --host-mem 24GiB --model /data/model", "with what this host has"),
    ],
    "plan": [
        ("flexgen plan MODEL --input requests.jsonl", "these requests, on this machine"),
        ("flexgen plan opt-175b --machine t4-gcp --prompt-len 512 --gen-len 32", "a model and a machine that are not here"),
    ],
    "profile": [
        ("flexgen profile /data/models", "the disk that this folder is on, and everything else"),
        ("flexgen profile -o box.json", "for `flexgen plan --machine box.json` somewhere else"),
    ],
    "status": [("flexgen status answers.jsonl", "from any terminal, while the job runs or afterwards")],
    "export": [
        ("flexgen export answers.jsonl", "write what is done so far into answers.jsonl"),
        ("flexgen export answers.jsonl --to - | head", "look at it"),
    ],
    "convert": [
        ("flexgen convert MODEL -o DIR --weight-format int4", "then `flexgen run DIR ...`, or any tool that reads compressed-tensors"),
        ("flexgen convert MODEL -o DIR --group-size 32 --keep '*.down_proj.*'", "more exact, and larger"),
    ],
    "cache": [
        ("flexgen cache ls", "what is kept, and what it was made from"),
        ("flexgen cache verify", "whether it is still what was written"),
    ],
    "ls": [("flexgen cache ls", "names, sizes, sources")],
    "rm": [
        ("flexgen cache rm facebook/opt-6.7b", "all conversions of this model"),
        ("flexgen cache rm --all", "everything"),
    ],
    "verify": [
        ("flexgen cache verify", "every conversion of the cache"),
        ("flexgen cache verify ./opt-int4", "a folder that `flexgen convert` has written"),
    ],
    "bench": [
        ("flexgen bench throughput MODEL --input-len 256 --output-len 32", "tokens per second over random prompts"),
        ("flexgen bench steady MODEL --input-len 512 --output-len 32", "the same in the middle of a long job, in a minute"),
    ],
    "throughput": [
        ("flexgen bench throughput MODEL --num-prompts 200", "that many random prompts of 256 tokens"),
        ("flexgen bench throughput MODEL --load-format dummy", "random weights: config.json is enough"),
    ],
    "steady": [
        ("flexgen bench steady MODEL --input-len 512 --output-len 32", "12 passes in the middle of a job of 1,000 prompts"),
        ("flexgen bench steady opt-30b --load-format dummy", "random weights; only those that stay on disk are written"),
    ],
    "eval": [
        ("flexgen eval perplexity MODEL text.txt", "perplexity per word, byte and token"),
        ("flexgen eval lm-eval MODEL --tasks hellaswag", "any task of lm-evaluation-harness"),
    ],
    "perplexity": [
        ("flexgen eval perplexity MODEL wiki.test.raw --dtype float32", "one text, in windows of the model's context"),
        ("flexgen eval perplexity MODEL texts.jsonl --state ppl", "many texts; the same command again goes on where it stopped"),
    ],
    "lambada": [
        ("flexgen eval lambada MODEL lambada_test.jsonl", "accuracy and perplexity of the last words"),
        ("flexgen eval lambada MODEL lambada_test.jsonl --limit 500 --json", "of the first 500 passages, as JSON"),
    ],
    "lm-eval": [
        ("flexgen eval lm-eval MODEL --tasks hellaswag arc_easy", "two tasks; lm-eval prints its table"),
        ("flexgen eval lm-eval MODEL --state mmlu --tasks mmlu --num_fewshot 5", "the same command again goes on where it stopped"),
        ("flexgen eval lm-eval MODEL -- --tasks mmlu --seed 1,2,3,4", "what follows -- is lm-eval's, also where both have an option"),
    ],
}  # fmt: skip
# Command -> pages of the documentation, which are in the repository and in the source distribution.
PAGES = {
    "flexgen": ("docs/index.md",),
    "run": (
        "docs/labelling.md",
        "docs/structured-output.md",
        "docs/requests.md",
        "docs/jobs.md",
        "docs/workers.md",
        "docs/metrics.md",
        "docs/trace.md",
    ),
    "map": ("docs/tables.md", "docs/jobs.md", "docs/workers.md", "docs/metrics.md", "docs/trace.md"),
    "work": ("docs/workers.md",),
    "plan": ("docs/plans.md", "docs/models.md"),
    "profile": ("docs/plans.md",),
    "status": ("docs/jobs.md",),
    "export": ("docs/jobs.md",),
    "convert": ("docs/quantization.md",),
    "cache": ("docs/quantization.md",),
    "ls": ("docs/quantization.md",),
    "rm": ("docs/quantization.md",),
    "verify": ("docs/quantization.md",),
    "bench": ("docs/metrics.md",),
    "throughput": ("docs/metrics.md", "docs/trace.md"),
    "steady": ("docs/metrics.md", "docs/benchmarks.md", "docs/trace.md"),
    "eval": ("docs/evaluation.md",),
    "perplexity": ("docs/evaluation.md",),
    "lambada": ("docs/evaluation.md",),
    "lm-eval": ("docs/evaluation.md",),
}
_WITH_EXIT_CODES = ("flexgen", "run", "map")


class _Sections:
    """The parts of a help text that commands and groups share; `formatter` is click's."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line after the command's name."""
        params = ctx.command.get_params(ctx)
        arguments = [_metavar(each) if each.required else f"[{_metavar(each)}]" for each in params if _is_argument(each)]
        needed = [f"{each.opts[-1]} {_metavar(each)}" for each in params if not _is_argument(each) and each.required]
        return ["[OPTIONS]", *arguments, *needed, *(["COMMAND ..."] if isinstance(self, TyperGroup) else [])]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole text."""
        command = ctx.command
        for part in (command.format_usage, command.format_help_text, command.format_options, command.format_epilog):
            part(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write commands, arguments, then options by section."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *_SECTIONS, "Options")}
        for param in ctx.command.get_params(ctx):
            if not param.hidden:
                rows.setdefault(_section(param), []).append((_names(param), _explanation(param)))
        rows["Options"] = rows.pop("Options")  # options of no section come last
        for title, found in {"Commands": list(_commands(ctx)), **rows}.items():
            _write(formatter, title, found)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write examples, exit codes, and pages of the documentation."""
        name = ctx.command.name if ctx.parent is not None else "flexgen"
        with formatter.section(typer.style("Examples", bold=True)):
            for typed, effect in EXAMPLES[name]:
                formatter.write(f"{'':>{formatter.current_indent}}{typed}\n")
                with formatter.indentation():
                    formatter.write_text(effect)
        if name in _WITH_EXIT_CODES:
            _write(formatter, "Exit codes", [(f"{code.value}", code.meaning) for code in ExitCode])
        _write(formatter, "Documentation (in the repository)", [(page, "") for page in PAGES[name]])


class Command(_Sections, TyperCommand):
    """A command whose help has sections."""


class Group(_Sections, TyperGroup):
    """A group of commands whose help has sections."""


def _write(formatter: Any, title: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(typer.style(title, bold=True)):
            formatter.write_dl(rows, col_max=_NAMES_COLUMN)


def _commands(ctx: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the first paragraph of the help of each command of a group."""
    group: Any = ctx.command
    for name in group.list_commands(ctx) if isinstance(group, TyperGroup) else ():
        yield name, inspect.cleandoc(str(group.commands[name].help)).partition("\n\n")[0].replace("\n", " ")


def _is_argument(param: Any) -> bool:
    return param.param_type_name == "argument"


def _section(param: Any) -> str:
    if _is_argument(param):
        return "Arguments"
    own = getattr(param, "rich_help_panel", None)
    return own or next((title for title, names in _SECTIONS.items() if param.name in names), "Options")


def _metavar(param: Any) -> str:
    return param.metavar or param.name.upper()


def _names(param: Any) -> str:
    """Return the names of an option with its metavar, such as `-o, --output OUTPUT`; a flag has no metavar."""
    if _is_argument(param):
        return _metavar(param)
    names = ", ".join(sorted([*param.opts, *param.secondary_opts], key=lambda name: (name.startswith("--"), name.startswith("--no-"))))
    return names if param.is_flag else f"{names} {_metavar(param)}"


def _explanation(param: Any) -> str:
    """Return the help of a parameter, with its default."""
    text, default = param.help or "", param.default
    if param.required:
        return text if _is_argument(param) else f"{text} [required]"
    told = default is None or isinstance(default, bool) or callable(default) or "Default:" in text or not str(default)
    return text if told or _is_argument(param) else f"{text} [default: {default}]"
