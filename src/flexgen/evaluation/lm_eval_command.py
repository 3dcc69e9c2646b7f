"""lm-evaluation-harness's own command with a model of ours: its arguments, and what of them has no meaning here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flexgen.errors import FlexGenError, JobError, OptionError
from flexgen.evaluation.lm_eval import FlexGenLM

# Arguments of lm-eval that describe its own backends -> what to do instead.
_INSTEAD = {
    "model": "MODEL is the model",
    "batch_size": "flexgen plans its batches itself (--max-num-seqs bounds them)",
    "max_batch_size": "flexgen plans its batches itself (--max-num-seqs bounds them)",
    "device": "give --device before lm-eval's arguments",
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `lm-eval run`; its own parser ends the process where they are wrong, and names the wrong one.

    Raises:
        OptionError: There are no tasks, or an argument has no meaning with a model of ours.
    """
    from lm_eval._cli import HarnessCLI

    if not arguments:
        raise OptionError("which tasks? flexgen eval lm-eval MODEL --tasks NAME ... (`lm-eval ls tasks` lists them)")
    with _command_line("lm-eval", "run", *arguments):
        parsed = HarnessCLI().parse_args()
    for name, instead in _INSTEAD.items():
        if getattr(parsed, name, None) is not None:
            raise OptionError(f"--{name} of lm-eval has no meaning here: {instead}")
    return parsed


def evaluate(lm: FlexGenLM, pretrained: str, parsed: argparse.Namespace) -> None:
    """Do what `lm-eval run` does with a model that is open; it prints and writes the results.

    Args:
        lm: The model.
        pretrained: Its name, which lm-eval writes into results.
        parsed: The arguments.

    Raises:
        JobError: lm-eval refuses the tasks or their data; the message is lm-eval's.
        FlexGenError: The model failed.
    """
    parsed.model, parsed.model_args = lm, {"pretrained": pretrained, **(parsed.model_args or {})}
    parsed.device = lm.llm.options.device  # only written into results
    try:
        parsed.func(parsed)
    except FlexGenError:
        raise
    except (ValueError, OSError, ImportError, KeyError) as error:  # unknown tasks, data that is not there, packages that tasks need
        raise JobError(f"lm-eval: {error}") from error


def model_arguments(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `FlexGenLM` that `--model_args` gives.

    Raises:
        OptionError: One of them is not such a keyword.
    """
    known = ("add_bos_token", "prefix_token_id", "max_gen_toks", "chat_template_args", "enable_thinking", "think_end_token")
    given: dict[str, Any] = parsed.model_args or {}
    if unknown := sorted(set(given) - set(known)):
        raise OptionError(f"--model_args {unknown[0]} is unknown; known: {', '.join(known)}; other options are flexgen's own")
    return given


@contextmanager
def _command_line(*words: str) -> Iterator[None]:
    """Let `sys.argv` be these words, which is where lm-eval looks for its arguments."""
    before, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = before
