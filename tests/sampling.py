"""A pytest plugin: the default run takes a sample of each large matrix of tests, another one for every commit.

A test that is parametrised over a matrix says how much of it one run needs:

    @pytest.mark.matrix(12, always=["llama", "gpt_oss"])

Each run takes the cases in `always`, which together touch what the test promises, and at most 12 of the others.  Those that are left out
are marked `slow`.  The others are cut into slices of 12, and the seed of the run says which slice is taken: as many consecutive seeds as
there are slices run all of them.  `by="device"` names the parameter that decides how long a case takes: each slice then takes about the
same share of each of its values, so that all samples last about equally long.  The seed is the hash of the commit unless `--sample-seed`
gives another one, so that the tests of a commit are the same ones on every machine and on every day: a failure in CI comes back wherever
it is repeated, and a commit that has passed does not fail tomorrow because a clock went on.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_COMMIT = "0"  # outside a checkout, for instance in an archive of the sources


def sample(groups: Mapping[str, str], always: Collection[str], size: int, seed: int) -> set[str]:
    """The names that are in `always`, and one slice of at most `size` of the others; `groups` gives the group of each name."""
    kept = groups.keys() & set(always)
    others = sorted(groups.keys() - kept, key=lambda name: (groups[name], hashlib.sha256(name.encode()).hexdigest()))
    num_slices = max(1, -(-len(others) // size))
    return kept | set(others[seed % num_slices :: num_slices])


def commit() -> str:
    """The short hash of the commit that is checked out."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=8", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return NO_COMMIT
    return done.stdout.strip() if done.returncode == 0 else NO_COMMIT


def hexadecimal(text: str) -> str:
    """The text, if it is a hexadecimal number."""
    int(text, 16)
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample-seed", metavar="HEX", type=hexadecimal, help="which sample of the matrices to run (default: that of the commit's hash)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.sample_seed is None:
        config.option.sample_seed = commit()  # worker processes inherit the options


def pytest_report_header(config: pytest.Config) -> str:
    return f"sample of the matrices: --sample-seed={config.option.sample_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"to run the same sample again: --sample-seed={terminalreporter.config.option.sample_seed}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what the sample leaves out, before pytest deselects by marks; not where tests are asked for by name."""
    if config.option.keyword or any("::" in argument for argument in config.args):
        return
    matrices: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("matrix"):
            matrices[item.nodeid.split("[")[0]].append(item)
    for name, cases in matrices.items():
        leave_out(name, cases, int(config.option.sample_seed, 16))


def leave_out(name: str, cases: list[pytest.Function], seed: int) -> None:
    mark = next(mark for mark in cases[0].iter_markers("matrix"))
    always = mark.kwargs.get("always", ())
    by_id = {case.callspec.id: case for case in cases}
    if unknown := set(always) - set(by_id):
        raise pytest.UsageError(f"{name}: `always` names cases that are not there: {', '.join(sorted(unknown))}")
    by = mark.kwargs.get("by")
    groups = {case_id: str(case.callspec.params[by]) if by else "" for case_id, case in by_id.items()}
    kept = sample(groups, always, mark.args[0], seed)
    for case_id, case in by_id.items():
        if case_id not in kept:
            case.add_marker(pytest.mark.slow)
