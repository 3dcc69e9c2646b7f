"""How the system describes itself: memory and control groups, rlimits, mounted file systems.

Every file is read below `root`, so that tests can show another machine.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flexgen.base.quantities import format_size

# Control groups write "no limit" as a number near 2^63.
NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """A limit on host memory.

    Attributes:
        name: What sets the limit, for messages.
        total_bytes: The limit itself.
        available_bytes: Memory below the limit that this process could take in addition to its own.
    """

    name: str
    total_bytes: int
    available_bytes: int


def host_ceilings(root: Path, rlimits: Mapping[str, int] | None) -> Iterator[Ceiling]:
    """Yield every limit on the host memory of this process.

    Args:
        root: Folder below which the files of the system are read.
        rlimits: "RLIMIT_AS" and "RLIMIT_DATA" -> bytes, where set; None asks the system.
    """
    rlimits = _rlimits() if rlimits is None else rlimits
    memory = _table(root / "proc/meminfo")
    yield Ceiling(
        name="physical memory",
        total_bytes=memory["MemTotal"] * 1024,
        available_bytes=memory.get("MemAvailable", memory["MemTotal"]) * 1024,
    )
    yield from _cgroup_ceilings(root)
    resident = own_memory(root, "VmRSS")
    for name, mapped in (("RLIMIT_AS", own_memory(root, "VmSize")), ("RLIMIT_DATA", own_memory(root, "VmData"))):
        if name in rlimits:
            # Mapped but never touched memory counts for the rlimit, not for the budget: it is lost.
            total = max(rlimits[name] - max(mapped - resident, 0), 0)
            yield Ceiling(name=f"{name} of {format_size(rlimits[name])}", total_bytes=total, available_bytes=max(rlimits[name] - mapped, 0))


def _cgroup_ceilings(root: Path) -> Iterator[Ceiling]:
    """Yield the memory limits of this process's control groups and of all their ancestors, version 1 and 2."""
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
    """Return a group's path relative to where its hierarchy is mounted; a container may see only its own part of the tree."""
    parts = PurePosixPath(path)
    if ".." in parts.parts:  # outside of this process's cgroup namespace
        return PurePosixPath()
    if parts.is_relative_to(mount_root):
        return parts.relative_to(mount_root)
    return parts.relative_to("/")


def _ancestors(base: Path, path: PurePosixPath) -> Iterator[Path]:
    """Yield the group's folder and its parents up to the mount, as far as they are visible from here."""
    for part in (path, *path.parents):
        if (base / part).is_dir():
            yield base / part


def _version_1(folder: Path, name: str) -> Iterator[Ceiling]:
    statistics = _table(folder / "memory.stat")
    used = (
        (_number(folder / "memory.usage_in_bytes") or 0) - statistics.get("total_inactive_file", 0) - statistics.get("total_active_file", 0)
    )
    hierarchical = statistics.get("hierarchical_memory_limit")
    for file, limit in (("memory.limit_in_bytes", _number(folder / "memory.limit_in_bytes")), ("hierarchical_memory_limit", hierarchical)):
        if limit is not None and limit < NO_LIMIT:
            yield Ceiling(name=f"control group {name} ({file})", total_bytes=limit, available_bytes=max(limit - max(used, 0), 0))


def _version_2(folder: Path, name: str) -> Iterator[Ceiling]:
    statistics = _table(folder / "memory.stat")
    reclaimable = sum(statistics.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))
    used = max((_number(folder / "memory.current") or 0) - reclaimable, 0)
    for file in ("memory.max", "memory.high"):
        limit = _number(folder / file)
        if limit is not None and limit < NO_LIMIT:
            yield Ceiling(name=f"control group {name} ({file})", total_bytes=limit, available_bytes=max(limit - used, 0))


def _rlimits() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            found[name] = soft
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    point: str
    root: str  # of the mounted part within its file system
    kind: str
    options: tuple[str, ...]  # of the file system


def _mounts(root: Path) -> list[_Mount]:
    """Read /proc/self/mountinfo (see proc(5))."""
    mounts: list[_Mount] = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) >= 5 and len(kinds) >= 3:
            mounts.append(
                _Mount(point=_unescaped(fields[4]), root=_unescaped(fields[3]), kind=kinds[0], options=tuple(kinds[2].split(",")))
            )
    return mounts


def file_system(root: Path, folder: Path) -> str:
    """Return the kind of file system that an existing folder lies on.

    It is that of the longest mount point above it; of equal mount points the last mounted counts.
    """
    target = PurePosixPath(folder.resolve())
    above = [mount for mount in _mounts(root) if target.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(PurePosixPath(mount.point).parts)).kind if above else ""


def _unescaped(text: str) -> str:
    """Decode blanks, tabs, newlines and backslashes, which are written in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number, as in /proc/meminfo and memory.stat."""
    rows = [line.replace(":", " ").split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def own_memory(root: Path, name: str) -> int:
    """Return a field of this process's status (VmRSS, RssAnon, ...) in bytes; 0 if the system does not say."""
    return _table(root / "proc/self/status").get(name, 0) * 1024


def _number(path: Path) -> int | None:
    """Read a file of one number; "max" and what cannot be read mean no limit."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None
