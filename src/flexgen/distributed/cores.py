"""Divides the cores of a machine between processes, so that each has its own and, where possible, memory beside them."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from flexgen.distributed.place import Place

_NODES = Path("/sys/devices/system/node")
_CORES = Path("/sys/devices/system/cpu")


def divide_cores(
    cores: Collection[int], nodes: Sequence[Collection[int]], siblings: Sequence[Collection[int]], size: int
) -> list[set[int]]:
    """Return the cores of each of `size` processes.

    Neighbours of one memory go to one process where there are enough of them, and threads of one core stay together.  Where there are
    more processes than cores, all share all.

    Args:
        cores: The cores to divide.
        nodes: The cores of each memory (NUMA node).
        siblings: The numbers that are threads of one core, for each core.
        size: The number of processes.
    """
    if len(cores) < size:
        return [set(cores)] * size
    left = set(cores)
    ordered = list[list[int]]()  # the threads of one core, memory by memory
    for node in (*nodes, cores):
        for each in (*siblings, *({core} for core in sorted(left))):
            threads = sorted(left & set(each) & set(node))
            if threads:
                ordered.append(threads)
                left -= set(threads)
    if len(ordered) < size:  # more processes than cores, but not than threads
        ordered = [[thread] for threads in ordered for thread in threads]
    bounds = _bounds([sum(core[0] in node for core in ordered) for node in nodes], len(ordered), size)
    return [{thread for core in ordered[begin:end] for thread in core} for begin, end in bounds]


def cores_of_machine(size: int) -> list[set[int]]:
    """Return the cores of each of `size` processes on this machine, out of those that this process may use."""
    nodes = [_listed(path) for path in sorted(_NODES.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))]
    cores = os.sched_getaffinity(0)
    siblings = [_listed(_CORES / f"cpu{core}" / "topology" / "thread_siblings_list") for core in sorted(cores)]
    return divide_cores(cores, [node for node in nodes if node & cores], siblings, size)


def own_cores(place: Place) -> OwnCores | None:
    """Keep this process on its share of the cores of its machine until that is closed; None where it has a machine, or cores, of its own.

    torchrun starts all processes of a machine alike; whoever has given them cores has divided these already.
    """
    if place.local_size == 1 or len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        return None
    return OwnCores(cores_of_machine(place.local_size)[place.local_rank])


class OwnCores:
    """Keeps the threads of this process, and those that they start, on some cores until it is closed."""

    def __init__(self, cores: Collection[int]) -> None:
        self._before = os.sched_getaffinity(0)
        _set_all(cores)

    def close(self) -> None:
        """Let the threads run where they could before."""
        _set_all(self._before)


def _bounds(per_node: Sequence[int], num_cores: int, size: int) -> list[tuple[int, int]]:
    """Return the range of cores of each process: whole memories where each process can have one, equal parts otherwise."""
    if len(per_node) > 1 and sum(per_node) == num_cores and (len(per_node) % size == 0 or size % len(per_node) == 0):
        nodes_each, shares = max(len(per_node) // size, 1), max(size // len(per_node), 1)
        if min(per_node) >= shares:
            bounds, begin = list[tuple[int, int]](), 0
            for index in range(0, len(per_node), nodes_each):
                count = sum(per_node[index : index + nodes_each])
                bounds += [(begin + part * count // shares, begin + (part + 1) * count // shares) for part in range(shares)]
                begin += count
            return bounds
    return [(part * num_cores // size, (part + 1) * num_cores // size) for part in range(size)]


def _listed(path: Path) -> set[int]:
    """Return the numbers of a file such as "0-3,8-11"; none where it cannot be read."""
    found = set[int]()
    with suppress(OSError, ValueError):
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _set_all(cores: Collection[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended, or the system forbids it
            os.sched_setaffinity(int(task.name), cores)
