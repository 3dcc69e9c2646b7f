"""Options in messages: the library names them as Python has them, everywhere, and the command shows flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexgen
from flexgen.cli.spelling import ENGINE_FLAGS, in_flags

ROOMS = Path(flexgen.__file__).parent
# What only the command shows, or what writes a command.
OF_THE_COMMAND = ("cli/", "evaluation/lm_eval_command.py", "hub/diagnose.py")
# Flags of commands for what Python's callers have parameters, functions or values of their own for.
MORE_FLAGS = ("--state", "--accept-changes", "--fresh", "--retry-errors", "--machine", "--progress", "--device-mem", "--metrics")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("dtype='int3' is unknown; known: auto", "--dtype 'int3' is unknown; known: auto"),
        ("raise host_mem to 4GiB, or lower max_num_seqs", "raise --host-mem to 4GiB, or lower --max-num-seqs"),
        ("raise disk= to 4GiB; or give disk='4GiB'", "raise --disk to 4GiB; or give --disk '4GiB'"),
        ("give host a smaller share in weights=, or in kv=", "give host a smaller share in --weights, or in --kv"),
        ("max_model_len=1000 is more than the context", "--max-model-len 1000 is more than the context"),
        ("lower max_tokens or raise host_mem (--host-mem)", "lower max_tokens or raise --host-mem"),
        ("give another as tokenizer=", "give another as --tokenizer"),
        ("max_job_seconds=60 and max_request_seconds=1e-06: no", "--max-job-seconds 60 and --max-request-seconds 1e-06: no"),
        ("weights='host=.5,disk=.6': the shares add up to 1.1", "--weights 'host=.5,disk=.6': the shares add up to 1.1"),
        ("write shares, such as device=.2,host=.3,disk=.5", "write shares, such as device=.2,host=.3,disk=.5"),
        ("the disk is full, the device is lost, and a seed is a number", "the disk is full, the device is lost, and a seed is a number"),
        ("/data/host_mem/kv_format.json: max_num_seqs.txt is missing", "/data/host_mem/kv_format.json: max_num_seqs.txt is missing"),
        ("unknown field 'max_model_len'; `LLM(host_mem=...)`", "unknown field 'max_model_len'; `LLM(--host-mem ...)`"),
        ("--host-mem '10' is 10 B", "--host-mem '10' is 10 B"),
        ("takes in its life; disk='0' forbids it", "takes in its life; --disk '0' forbids it"),
        ("less than 20%); disk= with a size allows it", "less than 20%); --disk with a size allows it"),
        ("1 GiB more of device memory (device_mem): +0.2%", "1 GiB more of device memory (--device-mem): +0.2%"),
    ],
)
def test_names_become_flags(message: str, wanted: str) -> None:
    assert in_flags(message) == wanted == in_flags(wanted)


def test_the_command_s_own_flags() -> None:
    flags = {**ENGINE_FLAGS, "shard_size": "--shard-size", "eight_bits": "--int8", "top_p": "--top-p"}
    assert in_flags("eight_bits='a' matches nothing", flags) == "--int8 'a' matches nothing"
    assert in_flags("--top-p 2.0: top_p must be a number", flags) == "--top-p 2.0: top_p must be a number"


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file that are not docstrings, and the lines that they begin in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    told = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.lineno, node.value


def test_messages_of_the_library_name_no_flag_alone() -> None:
    """A flag stands behind the name, as in `host_mem (--host-mem)`, where records of jobs and Python's callers have the same message."""
    flags = "|".join(map(re.escape, (*ENGINE_FLAGS.values(), *MORE_FLAGS)))
    flag = re.compile(rf"(?<![\w-])({flags})(?![\w-])|[\s(]--$")  # at the end of a part of an f-string, the rest may be a value
    both = re.compile("|".join(re.escape(f"{name} ({flag})") for name, flag in ENGINE_FLAGS.items()))
    found: list[str] = []
    for path in sorted(ROOMS.rglob("*.py")):
        place = path.relative_to(ROOMS).as_posix()
        if not place.startswith(OF_THE_COMMAND):
            told = ((line, both.sub("", re.sub(r"`flexgen [^`]*(`|$)", "", text))) for line, text in texts(path))
            found += [f"{place}:{line}: {text}" for line, text in told if flag.search(text)]
    assert not found
