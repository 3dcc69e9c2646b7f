"""The budgets of this process: host memory, device memory, and disk space for what is spilled.  Chooses no placement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from flexgen.base.quantities import GIB, format_size, parse_size
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.machine import DEVICE_SHARE, DISK_SHARE, HOST_SHARE, Limits, has_device_tier, too_little_for_cuda
from flexgen.profile.system import Ceiling, file_system, host_ceilings, own_memory

SIM_DEVICE_BYTES = 1 * GIB
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


class CardMemory(NamedTuple):
    """The memory of a GPU, by its driver's count.

    Attributes:
        free_bytes: What no program has taken.
        total_bytes: All of it.
        taken_bytes: What this process has taken.
        overhead_bytes: What its CUDA context and libraries take beside all tensors.
    """

    free_bytes: int
    total_bytes: int
    taken_bytes: int = 0
    overhead_bytes: int = 0


def find_limits(
    options: EngineOptions,
    *,
    root: Path = Path("/"),
    rlimits: Mapping[str, int] | None = None,
    disk_space: Callable[[Path], tuple[int, int]] | None = None,
    cuda_memory: Callable[[], CardMemory | None] | None = None,
) -> Limits:
    """Find the hard budgets of this process, from the options and from what the system allows.

    Host: the option, or 80 % of what is available now (this process's own memory counts as available to it).  Device: the option, or
    90 % of the free memory of a GPU (what this process has taken counts as free), or 1 GiB for the simulated one.  Disk: the option, or
    80 % of what is free; 0 in a memory file system unless asked for.  A percentage refers to the total.

    Args:
        options: The user's options.
        root: Folder below which the files of the system are read, so that tests can show another machine.
        rlimits: "RLIMIT_AS" and "RLIMIT_DATA" -> bytes, where set; None asks the system.
        disk_space: Function from a folder to its (free, total) bytes; None asks the system.
        cuda_memory: Function that returns the memory of the GPU, or None without a GPU; None measures it.

    Raises:
        OptionError: A size cannot be read, or belongs to a tier that the device does not have.
        CapacityError: A budget is larger than the hard limit above it, or that of the device has no room beside CUDA itself.
    """
    cuda_memory = cuda_memory or _cuda_memory
    device = find_device(options.device, cuda_memory)
    options.check_placement(device)
    ceilings = list(host_ceilings(root, rlimits))
    hard = min(ceilings, key=lambda ceiling: ceiling.total_bytes)
    tightest = min(ceilings, key=lambda ceiling: ceiling.available_bytes)
    device_bytes, device_total, overhead = _device_budget(device, options.device_mem, hard.total_bytes, cuda_memory)
    host_bytes, host_source = _host_budget(options.host_mem, hard, tightest, device_bytes if device == "sim" else 0, root)
    folder = Path(options.offload_dir or tempfile.gettempdir())
    in_memory = file_system(root, _existing(folder)) in MEMORY_FILE_SYSTEMS
    disk_bytes, disk_total = _disk_budget(folder, options.disk, in_memory, disk_space or _disk_space)
    return Limits(
        device=device,
        host_bytes=host_bytes,
        host_source=host_source,
        host_total_bytes=hard.total_bytes,
        host_total_source=hard.name,
        device_bytes=device_bytes,
        device_total_bytes=device_total,
        disk_bytes=disk_bytes,
        disk_total_bytes=disk_total,
        offload_dir=str(folder),
        offload_in_memory=in_memory,
        device_overhead_bytes=overhead,
    )


def spare_disk_bytes(offload_dir: str | None, root: Path = Path("/")) -> int:
    """Return the disk space that `find_limits` grants where no budget is asked for, in bytes."""
    folder = _existing(Path(offload_dir or tempfile.gettempdir()))
    return 0 if file_system(root, folder) in MEMORY_FILE_SYSTEMS else int(DISK_SHARE * _disk_space(folder)[0])


def find_device(wanted: str, cuda_memory: Callable[[], CardMemory | None] | None = None) -> str:
    """Return the device that is meant by the option; "auto" is a GPU if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if (cuda_memory or _cuda_memory)() is not None else "cpu"


# Host memory


def _host_budget(wanted: str | None, hard: Ceiling, tightest: Ceiling, simulated_bytes: int, root: Path) -> tuple[int, str]:
    """Return the host's budget in bytes and where it comes from.

    A simulated device of `simulated_bytes` takes its memory from the same.
    """
    if wanted is not None:
        size, source = parse_size(wanted, total_bytes=hard.total_bytes, name="host_mem="), f"host_mem={wanted!r}"
        if size > hard.total_bytes:
            raise CapacityError(
                f"{source} ({format_size(size)}) is more than {hard.name} allows "
                f"({format_size(hard.total_bytes)}): ask for less, or raise that limit"
            )
    else:
        available = max(tightest.available_bytes - simulated_bytes, 0)
        size = min(int(HOST_SHARE * (available + own_memory(root, "RssAnon"))), hard.total_bytes)
        source = f"{HOST_SHARE:.0%} of what is available now ({tightest.name})"
    if simulated_bytes and size + simulated_bytes > hard.total_bytes:
        raise CapacityError(
            f"the simulated device's {format_size(simulated_bytes)} and the host budget's {format_size(size)} are the same memory, and "
            f"{hard.name} allows {format_size(hard.total_bytes)}: lower device_mem or host_mem"
        )
    return size, source


# Device and disk


def _device_budget(device: str, text: str | None, host_total: int, cuda_memory: Callable[[], CardMemory | None]) -> tuple[int, int, int]:
    """Return the device's budget and total in bytes, and what of the budget CUDA itself takes."""
    if not has_device_tier(device):
        if text is not None:
            raise OptionError(f"device_mem={text!r}: on a CPU device there is no device tier; use host_mem")
        return 0, 0, 0
    if device == "sim":
        budget = SIM_DEVICE_BYTES if text is None else parse_size(text, total_bytes=host_total, name="device_mem=")
        return budget, budget, 0
    memory = cuda_memory()
    if memory is None:
        raise OptionError("device='cuda': this torch sees no CUDA device; use device='cpu'")
    free, total, taken, overhead = memory
    budget = int(DEVICE_SHARE * (free + taken)) if text is None else parse_size(text, total_bytes=total, name="device_mem=")
    if budget > total:
        raise CapacityError(f"device_mem={text!r} ({format_size(budget)}) is more than the device has ({format_size(total)})")
    if budget <= overhead:
        raise CapacityError(too_little_for_cuda(text, budget, overhead))
    return budget, total, overhead


def _cuda_memory() -> CardMemory | None:
    from flexgen.devices.cuda_memory import cuda_memory

    if (memory := cuda_memory()) is None:
        return None
    return CardMemory(memory.free_bytes(), memory.total_bytes, max(memory.taken_bytes(), 0), memory.overhead_bytes)


def _disk_budget(folder: Path, text: str | None, in_memory: bool, disk_space: Callable[[Path], tuple[int, int]]) -> tuple[int, int]:
    """Return the budget and total of the offload folder's file system in bytes."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"offload_dir={str(folder)!r} is not a folder")
    free, total = disk_space(_existing(folder))
    if text is None:
        return (0 if in_memory else int(DISK_SHARE * free)), total
    budget = parse_size(text, total_bytes=total, name="disk=")
    if budget > free:
        raise CapacityError(
            f"disk={text!r} ({format_size(budget)}) is more than is free in {folder} ({format_size(free)}): "
            "ask for less, or give another offload_dir"
        )
    return budget, total


def _disk_space(folder: Path) -> tuple[int, int]:
    statistics = os.statvfs(folder)
    return statistics.f_bavail * statistics.f_frsize, statistics.f_blocks * statistics.f_frsize


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
