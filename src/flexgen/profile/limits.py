"""What this process may use: the least of physical memory, control groups and rlimits; the device; the offload folder.

Every file is read below `root`, so that tests can show another machine.  Chooses no placement.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flexgen.base.quantities import GIB, format_size, parse_size
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.plan.machine import Limits

__all__ = ["Limits", "find_limits"]

HOST_SHARE = 0.8
DISK_SHARE = 0.8
CUDA_SHARE = 0.9
SIM_DEVICE_BYTES = 1 * GIB
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
# Control groups write "no limit" as a number near 2^63.
NO_LIMIT = 1 << 60


def find_limits(
    options: EngineOptions,
    *,
    root: Path = Path("/"),
    rlimits: Mapping[str, int] | None = None,
    disk_space: Callable[[Path], tuple[int, int]] | None = None,
    cuda_memory: Callable[[], tuple[int, int] | None] | None = None,
) -> Limits:
    """The hard budgets of this process, from the options and from what the system allows.

    Host: the flag, or 80 % of what is available now (this process's own memory counts as available to it).  Device:
    the flag, or 90 % of the free memory of a GPU, or 1 GiB for the simulated one.  Disk: the flag, or 80 % of what is
    free; 0 in a memory file system unless asked for.  A percentage is of the total.

    Args:
        rlimits: "RLIMIT_AS" and "RLIMIT_DATA" -> bytes, where set; None asks the system.
        disk_space: folder -> (free, total) bytes. cuda_memory: (free, total) bytes, or None without a GPU.

    Raises:
        OptionError: a size that cannot be read, or one for a tier that the device does not have.
        CapacityError: a budget larger than the hard limit above it.
    """
    cuda_memory = cuda_memory or _cuda_memory
    device = find_device(options.device, cuda_memory)
    ceilings = list(_host_ceilings(root, _rlimits() if rlimits is None else rlimits))
    hard = min(ceilings, key=lambda ceiling: ceiling.total_bytes)
    tightest = min(ceilings, key=lambda ceiling: ceiling.available_bytes)
    device_bytes, device_total = _device_budget(device, options.device_mem, hard.total_bytes, cuda_memory)
    host_bytes, host_source = _host_budget(options.host_mem, hard, tightest, device_bytes if device == "sim" else 0, root)
    folder = Path(options.offload_dir or tempfile.gettempdir())
    in_memory = _file_system(root, folder) in MEMORY_FILE_SYSTEMS
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
    )


def find_device(wanted: str, cuda_memory: Callable[[], tuple[int, int] | None] | None = None) -> str:
    """What "auto" means here."""
    if wanted != "auto":
        return wanted
    return "cuda" if (cuda_memory or _cuda_memory)() is not None else "cpu"


# Host memory


def _host_budget(wanted: str | None, hard: _Ceiling, tightest: _Ceiling, simulated_bytes: int, root: Path) -> tuple[int, str]:
    """(bytes, where they come from); a simulated device of `simulated_bytes` takes its memory from the same."""
    if wanted is not None:
        size, source = parse_size(wanted, total_bytes=hard.total_bytes, name="--host-mem"), f"--host-mem {wanted}"
        if size > hard.total_bytes:
            raise CapacityError(
                f"--host-mem {wanted} ({format_size(size)}) is more than {hard.name} allows "
                f"({format_size(hard.total_bytes)}): ask for less, or raise that limit"
            )
    else:
        available = max(tightest.available_bytes - simulated_bytes, 0)
        size = min(int(HOST_SHARE * (available + _status(root, "RssAnon"))), hard.total_bytes)
        source = f"{HOST_SHARE:.0%} of what is available now ({tightest.name})"
    if simulated_bytes and size + simulated_bytes > hard.total_bytes:
        raise CapacityError(
            f"the simulated device's {format_size(simulated_bytes)} and the host budget's {format_size(size)} are the same memory, and "
            f"{hard.name} allows {format_size(hard.total_bytes)}: lower --device-mem or --host-mem"
        )
    return size, source


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ceiling:
    """One limit on host memory, and what is left below it for this process to take in addition."""

    name: str
    total_bytes: int
    available_bytes: int


def _host_ceilings(root: Path, rlimits: Mapping[str, int]) -> Iterator[_Ceiling]:
    memory = _table(root / "proc/meminfo")
    yield _Ceiling(
        name="physical memory",
        total_bytes=memory["MemTotal"] * 1024,
        available_bytes=memory.get("MemAvailable", memory["MemTotal"]) * 1024,
    )
    yield from _cgroup_ceilings(root)
    resident = _status(root, "VmRSS")
    for name, mapped in (("RLIMIT_AS", _status(root, "VmSize")), ("RLIMIT_DATA", _status(root, "VmData"))):
        if name in rlimits:
            # Mapped but never touched memory counts for the rlimit, not for the budget: it is lost.
            total = max(rlimits[name] - max(mapped - resident, 0), 0)
            yield _Ceiling(
                name=f"{name} of {format_size(rlimits[name])}", total_bytes=total, available_bytes=max(rlimits[name] - mapped, 0)
            )


def _cgroup_ceilings(root: Path) -> Iterator[_Ceiling]:
    """The memory limits of this process's control groups and of all their ancestors, version 1 and 2."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            read, kinds = _version_1, [mount for mount in mounts if mount.kind == "cgroup" and "memory" in mount.options]
        elif not controllers:
            read, kinds = _version_2, [mount for mount in mounts if mount.kind == "cgroup2"]
        else:
            continue
        for mount in kinds:
            base = root / mount.point.lstrip("/")
            for folder in _ancestors(base, _below(path, mount.root)):
                yield from read(folder, "/" + str(folder.relative_to(root)))


def _below(path: str, mount_root: str) -> PurePosixPath:
    """A group's path relative to where its hierarchy is mounted: a container may see only its own part of the tree."""
    parts = PurePosixPath(path)
    if ".." in parts.parts:  # outside of this process's cgroup namespace
        return PurePosixPath()
    if parts.is_relative_to(mount_root):
        return parts.relative_to(mount_root)
    return parts.relative_to("/")


def _ancestors(base: Path, path: PurePosixPath) -> Iterator[Path]:
    """The group's folder and its parents up to the mount; what is not visible from here is skipped."""
    for part in (path, *path.parents):
        if (base / part).is_dir():
            yield base / part


def _version_1(folder: Path, name: str) -> Iterator[_Ceiling]:
    statistics = _table(folder / "memory.stat")
    used = (
        (_number(folder / "memory.usage_in_bytes") or 0) - statistics.get("total_inactive_file", 0) - statistics.get("total_active_file", 0)
    )
    hierarchical = statistics.get("hierarchical_memory_limit")
    for file, limit in (("memory.limit_in_bytes", _number(folder / "memory.limit_in_bytes")), ("hierarchical_memory_limit", hierarchical)):
        if limit is not None and limit < NO_LIMIT:
            yield _Ceiling(name=f"control group {name} ({file})", total_bytes=limit, available_bytes=max(limit - max(used, 0), 0))


def _version_2(folder: Path, name: str) -> Iterator[_Ceiling]:
    statistics = _table(folder / "memory.stat")
    reclaimable = sum(statistics.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))
    used = max((_number(folder / "memory.current") or 0) - reclaimable, 0)
    for file in ("memory.max", "memory.high"):
        limit = _number(folder / file)
        if limit is not None and limit < NO_LIMIT:
            yield _Ceiling(name=f"control group {name} ({file})", total_bytes=limit, available_bytes=max(limit - used, 0))


def _rlimits() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            found[name] = soft
    return found


# Device and disk


def _device_budget(device: str, text: str | None, host_total: int, cuda_memory: Callable[[], tuple[int, int] | None]) -> tuple[int, int]:
    """(budget, total) bytes of the device."""
    if device == "cpu":
        if text is not None:
            raise OptionError(f"--device-mem {text}: on a CPU device there is no device tier; use --host-mem")
        return 0, 0
    if device == "sim":
        budget = SIM_DEVICE_BYTES if text is None else parse_size(text, total_bytes=host_total, name="--device-mem")
        return budget, budget
    memory = cuda_memory()
    if memory is None:
        raise OptionError("--device cuda: this torch sees no CUDA device; use --device cpu")
    free, total = memory
    if text is None:
        return int(CUDA_SHARE * free), total
    budget = parse_size(text, total_bytes=total, name="--device-mem")
    if budget > total:
        raise CapacityError(f"--device-mem {text} ({format_size(budget)}) is more than the device has ({format_size(total)})")
    return budget, total


def _cuda_memory() -> tuple[int, int] | None:
    import torch

    return torch.cuda.mem_get_info() if torch.cuda.is_available() else None


def _disk_budget(folder: Path, text: str | None, in_memory: bool, disk_space: Callable[[Path], tuple[int, int]]) -> tuple[int, int]:
    """(budget, total) bytes of the offload folder's file system."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--offload-dir {folder} is not a folder")
    free, total = disk_space(_existing(folder))
    if text is None:
        return (0 if in_memory else int(DISK_SHARE * free)), total
    budget = parse_size(text, total_bytes=total, name="--disk")
    if budget > free:
        raise CapacityError(
            f"--disk {text} ({format_size(budget)}) is more than is free in {folder} ({format_size(free)}): "
            "ask for less, or give another --offload-dir"
        )
    return budget, total


def _disk_space(folder: Path) -> tuple[int, int]:
    statistics = os.statvfs(folder)
    return statistics.f_bavail * statistics.f_frsize, statistics.f_blocks * statistics.f_frsize


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))


# Files of the system


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    point: str
    root: str  # of the mounted part within its file system
    kind: str
    options: tuple[str, ...]  # of the file system


def _mounts(root: Path) -> list[_Mount]:
    """/proc/self/mountinfo: see proc(5)."""
    mounts: list[_Mount] = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) >= 5 and len(kinds) >= 3:
            mounts.append(
                _Mount(point=_unescaped(fields[4]), root=_unescaped(fields[3]), kind=kinds[0], options=tuple(kinds[2].split(",")))
            )
    return mounts


def _file_system(root: Path, folder: Path) -> str:
    """The kind of file system a folder lies on: that of the longest mount point above it, the last mounted of equals."""
    target = PurePosixPath(_existing(folder).resolve())
    above = [mount for mount in _mounts(root) if target.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(PurePosixPath(mount.point).parts)).kind if above else ""


def _unescaped(text: str) -> str:
    """Blanks, tabs, newlines and backslashes are written in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number: /proc/meminfo, memory.stat."""
    rows = [line.replace(":", " ").split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _status(root: Path, name: str) -> int:
    return _table(root / "proc/self/status").get(name, 0) * 1024


def _number(path: Path) -> int | None:
    """A file of one number; "max" and what cannot be read are no limit."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None
