"""The default run takes its sample of a matrix as `sampling` says: fixed cases always, the others in turn, and none is never run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from sampling import NO_COMMIT, commit, sample

pytest_plugins = ["pytester"]

NAMES = {f"case-{number}": "" for number in range(100)}
ALWAYS = ["case-3", "case-71"]


@pytest.mark.parametrize("size", [1, 7, 49, 98, 200])
def test_the_sample_of_a_matrix(size: int) -> None:
    num_slices = -(-98 // size)
    slices = [sample(NAMES, ALWAYS, size, seed) - set(ALWAYS) for seed in range(1000, 1000 + num_slices)]
    assert all(set(ALWAYS) <= sample(NAMES, ALWAYS, size, seed) for seed in range(num_slices))
    assert set().union(*slices) == set(NAMES) - set(ALWAYS), "consecutive seeds run all of it"
    assert sum(map(len, slices)) == 98, "and each case once"
    assert max(map(len, slices)) <= min(size, 98)
    assert min(map(len, slices)) >= max(map(len, slices)) - 1, "in slices of about the same size"


def test_neighbours_are_not_in_one_slice() -> None:
    """Cases that stand side by side are alike: a sample takes some of each kind."""
    numbers = sorted(int(name.removeprefix("case-")) for name in sample(NAMES, (), 20, 0))
    assert numbers[0] < 25
    assert numbers[-1] >= 75
    assert numbers != list(range(numbers[0], numbers[0] + 20))


@pytest.mark.parametrize("seed", range(5))
def test_every_slice_has_its_share_of_each_group(seed: int) -> None:
    """The slices of 20 take every fifth case: 2 of 10 on one device, 18 of 90 on the other."""
    groups = {name: "cpu" if number % 10 else "sim" for number, name in enumerate(NAMES)}
    taken = [groups[name] for name in sample(groups, (), 20, seed)]
    assert (taken.count("cpu"), taken.count("sim")) == (18, 2)


def test_the_same_seed_gives_the_same_sample() -> None:
    assert sample(NAMES, ALWAYS, 9, 0xABC) == sample(dict(reversed(NAMES.items())), ALWAYS, 9, 0xABC) != sample(NAMES, ALWAYS, 9, 0xABD)


def test_the_seed_is_the_commit() -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(commit()) if done.returncode == 0 else commit() == NO_COMMIT


MATRIX = """
import pytest

@pytest.mark.matrix(4, always=["11"])
@pytest.mark.parametrize("number", range(12))
def test_matrix(number):
    assert number != 11

def test_other():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_it=MATRIX)
    pytester.makeini("[pytest]\nmarkers =\n    slow: s\n    matrix(size, always): m\n")
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> tuple[set[str], list[str]]:
    """The tests that ran, and the lines that were printed."""
    done = suite.runpytest_inprocess("-p", "sampling", "-p", "no:cacheprovider", "-v", *arguments)
    return set(re.findall(r"(test_\w+(?:\[\d+\])?) (?:PASSED|FAILED)", done.stdout.str())), [*done.outlines, *done.errlines]


def test_what_the_sample_leaves_out_is_slow(suite: pytest.Pytester) -> None:
    everything = {"test_other", *(f"test_matrix[{number}]" for number in range(12))}
    assert run(suite, "--sample-seed=5")[0] == everything
    union: set[str] = set()
    for seed in "5", "6", "7":
        default, _ = run(suite, "-m", "not slow", f"--sample-seed={seed}")
        slow, _ = run(suite, "-m", "slow", f"--sample-seed={seed}")
        assert default | slow == everything
        assert not default & slow
        assert {"test_other", "test_matrix[11]"} <= default
        assert len(default) <= 6
        union |= default
    assert union == everything


def test_the_seed_is_printed(suite: pytest.Pytester) -> None:
    assert "sample of the matrices: --sample-seed=5f" in run(suite, "--sample-seed=5f")[1]
    assert "to run the same sample again: --sample-seed=5f" in run(suite, "--sample-seed=5f")[1]
    assert not [line for line in run(suite, "--sample-seed=5f", "-k", "test_other")[1] if "sample again" in line], "nothing failed"
    assert any("invalid hexadecimal value: 'xyz'" in line for line in run(suite, "--sample-seed=xyz")[1])


def test_what_is_asked_for_by_name_is_run(suite: pytest.Pytester) -> None:
    for number in range(12):
        assert run(suite, "-m", "not slow", f"test_it.py::test_matrix[{number}]")[0] == {f"test_matrix[{number}]"}
    assert len(run(suite, "-m", "not slow", "-k", "matrix")[0]) == 12


def test_a_fixed_case_that_is_not_there_is_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it=MATRIX.replace('"11"', '"12"'))
    ran, lines = run(suite)
    assert not ran
    assert any("`always` names cases that are not there: 12" in line for line in lines)
