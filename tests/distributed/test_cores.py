"""Cores are divided whole, by memory, and given back."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from flexgen.distributed.cores import OwnCores, divide_cores

TWO_NODES = [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]
SIBLINGS = [{core, core + 8} for core in range(8)]


def test_each_process_has_a_memory() -> None:
    assert divide_cores(range(16), TWO_NODES, SIBLINGS, 2) == TWO_NODES


def test_processes_share_a_memory_but_no_core() -> None:
    assert divide_cores(range(16), TWO_NODES, SIBLINGS, 4) == [{0, 8, 1, 9}, {2, 10, 3, 11}, {4, 12, 5, 13}, {6, 14, 7, 15}]


def test_a_process_has_several_memories() -> None:
    nodes = [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert divide_cores(range(8), nodes, [], 2) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_where_there_are_more_processes_than_cores_all_share_all() -> None:
    assert divide_cores({3, 5}, [{3, 5}], [], 3) == [{3, 5}] * 3


@given(
    st.sets(st.integers(0, 31), min_size=1), st.integers(1, 8), st.integers(1, 4),
    st.sampled_from([(), tuple({core, core + 16} for core in range(16))]),
)  # fmt: skip
def test_cores_are_divided_evenly(cores: set[int], size: int, num_nodes: int, siblings: tuple[set[int], ...]) -> None:
    nodes = [{core for core in range(32) if core % num_nodes == node} for node in range(num_nodes)]
    shares = divide_cores(cores, nodes, siblings, size)
    assert len(shares) == size
    assert set().union(*shares) == cores
    if len(cores) >= size:
        assert all(shares)
        assert sum(map(len, shares)) == len(cores)


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    own = OwnCores({min(before)})
    assert os.sched_getaffinity(0) == {min(before)}
    own.close()
    assert os.sched_getaffinity(0) == before
