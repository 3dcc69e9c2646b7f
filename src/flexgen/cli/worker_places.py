"""Divides this host among the workers of a run: cores by NUMA node, host memory and disk in equal parts, a device for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.quantities import MIB, format_size
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions

_CUDA = "cuda:"
_LEAST_HOST_BYTES = 64 * MIB  # of a worker, as for any process


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The workers that a run starts on its own host.

    Attributes:
        count: Their number; 0 where all workers are started by hand, on whatever host.
        devices: The number of the GPU of each worker; empty where they are not given.
    """

    count: int
    devices: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Crew:
        """Return what `--workers` asks for: a number, or devices with commas between them.

        Raises:
            OptionError: It is neither.
        """
        given = text.replace(" ", "")
        if given.isdigit():
            return cls(count=int(given))
        names = given.split(",")
        numbers = [name.removeprefix(_CUDA) for name in names]
        if not all(name.startswith(_CUDA) and number.isdigit() for name, number in zip(names, numbers, strict=True)):
            raise OptionError(f"--workers {text!r} is neither a number nor a list of devices such as cuda:0,cuda:1")
        if len(set(numbers)) < len(numbers):
            raise OptionError(f"--workers {text!r} names a device twice")
        return cls(count=len(numbers), devices=tuple(int(number) for number in numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """What one worker may use.

    Attributes:
        flags: The flags that say so.
        cores: Its cores; empty for those of the run.
        device: The number of its GPU; None where no device was given.
    """

    flags: tuple[str, ...]
    cores: tuple[int, ...] = ()
    device: int | None = None


def places_of(crew: Crew, options: EngineOptions, own_bytes: int, *, root: Path = Path("/")) -> list[WorkerPlace]:
    """Divide what the options grant, or what this host has, among the workers of a run.

    Args:
        crew: The workers.
        options: The options of the run; budgets are those of all workers together, but on devices, of which each has its own.
        own_bytes: The host memory that the run itself takes.
        root: The folder below which the files of the system are read.

    Raises:
        CapacityError: A worker would have too little memory.
    """
    from flexgen.profile.limits import find_limits

    if not crew.count:
        return []
    given = EngineOptions(device="cpu", host_mem=options.host_mem, disk=options.disk, offload_dir=options.offload_dir)
    limits = find_limits(given, root=root)
    host_bytes = max(limits.host_bytes - own_bytes, 0) // crew.count
    if host_bytes < _LEAST_HOST_BYTES:
        raise CapacityError(
            f"{format_size(limits.host_bytes)} of host memory for {crew.count} workers, beside {format_size(own_bytes)} of the run itself, "
            f"is {format_size(host_bytes)} for each: give fewer --workers or more --host-mem"
        )
    flags = ["--host-mem", str(host_bytes), "--disk", str(_most(limits.disk_bytes // crew.count))]
    if crew.devices:
        flags += ["--device", "cuda"]
    cores = divide_cores(crew.count, cores_by_node(root))
    devices: Sequence[int | None] = crew.devices or [None] * crew.count
    return [WorkerPlace(flags=tuple(flags), cores=each, device=device) for each, device in zip(cores, devices, strict=True)]


def check_crew(crew: Crew, options: EngineOptions) -> None:
    """Check that options can be honoured by several workers.

    Raises:
        OptionError: They cannot.
    """
    if options.trace is not None:
        raise OptionError("--trace draws one engine: leave it out, or give no --workers")
    if crew.devices and options.device not in ("auto", "cuda"):
        raise OptionError(f"--workers names GPUs, and --device is {options.device}: leave one of them out")
    if crew.count > 1 and not crew.devices and _may_use_gpu(options.device):
        raise OptionError("several workers would share one GPU: name one for each, such as --workers cuda:0,cuda:1, or give --device cpu")


def _may_use_gpu(device: str) -> bool:
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device == "cuda"


def _most(size_bytes: int) -> int:
    """Return a disk budget that an option takes: none instead of less than the least."""
    return size_bytes if size_bytes >= MIB else 0


def cores_by_node(root: Path = Path("/")) -> list[list[int]]:
    """Return the cores that this process may use, by NUMA node."""
    allowed = os.sched_getaffinity(0)
    nodes: list[list[int]] = []
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist")):
        cores = sorted(_listed(path.read_text()) & allowed)
        if cores:
            nodes.append(cores)
    return nodes if sum(map(len, nodes)) == len(allowed) else [sorted(allowed)]


def divide_cores(count: int, nodes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Give every worker cores of one node where that is possible; none of its own where there are fewer cores than workers."""
    if sum(map(len, nodes)) < count:
        return [()] * count
    if count < len(nodes):  # whole nodes for each
        return [tuple(core for node in nodes[each::count] for core in node) for each in range(count)]
    shares = [1] * len(nodes)
    while sum(shares) < count:  # the next worker goes where a worker has most cores
        shares[max(range(len(nodes)), key=lambda each: len(nodes[each]) / (shares[each] + 1))] += 1
    return [tuple(node[len(node) * each // share : len(node) * (each + 1) // share]) for node, share in zip(nodes, shares, strict=True)
            for each in range(share)]  # fmt: skip


def _listed(text: str) -> set[int]:
    """Return the numbers of a list like "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
