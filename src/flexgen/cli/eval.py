"""`flexgen eval`: perplexity, LAMBADA, and lm-evaluation-harness with a model of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen.base.steps import step
from flexgen.cli.evaluating import CommonFlags, log_of, run_evaluation
from flexgen.cli.options import Model, check_apart, check_file, engine_command, is_there, takes, write_asked
from flexgen.cli.streams import check_stdout
from flexgen.errors import OptionError
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.cli.evaluating import Evaluation
    from flexgen.evaluation.answers import Answers
    from flexgen.evaluation.encoding import Encoding
    from flexgen.llm import LLM
    from flexgen.report.show import Display

# Arguments that are not ours are lm-eval's.
LM_EVAL_CONTEXT = {"ignore_unknown_options": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFlags:
    """The flags of evaluations whose result is printed here."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as a JSON object (docs/evaluation.md).")] = False
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Take only so many texts of each file.")] = None


@engine_command
@takes("common", CommonFlags)
@takes("result", ResultFlags)
def perplexity(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE ...", help='Texts, or JSON lines {"text": ...} in files named .jsonl.')],
    result: ResultFlags,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """Perplexity of texts: per word, byte and token.

    A text is scored in windows of the model's context, as
    lm-evaluation-harness does it (loglikelihood_rolling).
    """
    for file in files:
        _check_file_to_read(file)
    check_apart(options.trace, *files)

    def read() -> list[str]:
        from flexgen.evaluation.documents import read_documents

        return [text for file in files for text in read_documents(file, result.limit)]

    def figures(answers: Answers, encoding: Encoding, texts: Sequence[str]) -> Mapping[str, Any]:
        from flexgen.evaluation.perplexity import perplexity as measured

        return measured(answers, encoding, texts).to_json()

    return _evaluation(model, options, common, result, read, figures)


@engine_command
@takes("common", CommonFlags)
@takes("result", ResultFlags)
def lambada(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Passages, JSON lines {"text": ...}, such as lambada_test.jsonl.')],
    result: ResultFlags,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """How often the last word of a passage is predicted.

    Accuracy and perplexity of the last words, as lm-evaluation-harness's
    lambada_openai has them.
    """
    _check_file_to_read(file)
    check_apart(options.trace, file)

    def read() -> list[str]:
        from flexgen.evaluation.lambada import read_passages

        return read_passages(file, result.limit)

    def figures(answers: Answers, encoding: Encoding, passages: Sequence[str]) -> Mapping[str, Any]:
        from flexgen.evaluation.lambada import lambada as measured

        return measured(answers, encoding, passages).to_json()

    return _evaluation(model, options, common, result, read, figures)


@engine_command
@takes("common", CommonFlags)
def lm_eval(
    model: Model,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="LM_EVAL_ARGUMENTS ...", help="Arguments of `lm-eval run`, after the options below; all of them after --."),
    ] = None,
    *,
    common: CommonFlags,
    options: EngineOptions,
) -> int:
    """Any task of lm-evaluation-harness (extra: eval).

    Its own arguments follow: --tasks, --num_fewshot, --limit, --include_path,
    --output_path, --log_samples, --apply_chat_template, --gen_kwargs and so on.
    """
    if model.startswith("-"):
        raise OptionError(f"the model comes first, {model} of lm-eval after it: flexgen eval lm-eval MODEL --tasks ...")

    def begin() -> Evaluation:
        step("loading lm-evaluation-harness")
        from flexgen.evaluation.lm_eval import FlexGenLM
        from flexgen.evaluation.lm_eval_command import evaluate, model_arguments, parse_arguments

        parsed = parse_arguments(arguments or [])
        own = model_arguments(parsed)

        def run(display: Display, llm: LLM, answers: Answers) -> None:
            with log_of("lm_eval", display):
                display.close()  # lm-eval writes to the terminal itself until there is something to compute
                made = FlexGenLM(llm, state=answers.state, on_progress=answers.on_progress, stop=answers.stop, **own)
                with made as lm:
                    evaluate(lm, model, parsed)

        return run

    return run_evaluation(model, options, common, begin)


def _evaluation(
    model: str,
    options: EngineOptions,
    common: CommonFlags,
    result: ResultFlags,
    read: Callable[[], Sequence[str]],
    figures: Callable[[Answers, Encoding, Sequence[str]], Mapping[str, Any]],
) -> int:
    """Run an evaluation of the texts that `read` returns, and print and write what `figures` returns.

    Raises:
        OptionError: Sparse attention was asked for, which texts that are scored do not meet.
    """
    if options.kept_share is not None:
        raise OptionError("sparse_attention changes how generated tokens attend, and this evaluation generates none: leave it out")
    check_file(result.metrics, "--metrics")
    check_apart(options.trace, result.metrics)
    check_stdout()
    found: dict[str, Any] = {}

    def begin() -> Evaluation:
        step("reading texts")
        texts = read()

        def run(display: Display, llm: LLM, answers: Answers) -> None:
            from flexgen.evaluation.encoding import Encoding

            found.update(figures(answers, Encoding(llm.get_tokenizer()), texts))
            display.close()

        return run

    code = run_evaluation(model, options, common, begin)
    if code:
        return code
    whole = {"model": model, **found}
    print(json.dumps(whole, indent=2) if result.as_json else _table(found))
    if result.metrics is not None:
        return write_asked(result.metrics, "--metrics", json.dumps(whole, indent=2) + "\n")
    return code


def _check_file_to_read(path: Path) -> None:
    if not is_there(path, "FILE", Path.is_file):
        kind = "this is a folder; give files" if path.is_dir() else "there is no such file"
        raise OptionError(f"FILE {path}: {kind}")


def _table(figures: Mapping[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_number(value)}" for name, value in figures.items())


def _number(value: object) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
