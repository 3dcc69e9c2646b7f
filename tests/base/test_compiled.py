"""What is compiled is kept on disk, but never longer than the source it came from."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from flexgen.base import compiled


def test_without_a_writable_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(compiled, "njit", njit)

    def increment(numbers: Any) -> None:
        numbers += 1

    numbers = np.zeros(2)
    compiled.entry(increment)(numbers)
    assert numbers.tolist() == [1, 1]


def test_a_disk_that_does_not_take_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file is found full when the function is compiled, which is at the first call."""
    (tmp_path / "fresh.py").write_text("def increment(numbers):\n    numbers += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = compiled.entry(importlib.import_module("fresh").increment)

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.tempfile.TemporaryFile", full)
    numbers = np.zeros(2)
    with caplog.at_level("INFO"):
        function(numbers)
    assert numbers.tolist() == [1, 1]
    assert "increment is compiled but cannot be kept on disk: [Errno 28] No space left on device" in caplog.text


def test_changed_sources_are_compiled_again(tmp_path: Path) -> None:
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    names = ["decode.f-1.py311.nbi", "decode.f-1.py311.1.nbc", "decode.g-9.py311.nbi", "prefill.f-1.py311.nbi"]
    for folder, files in ((sources, ["decode.py", "helpers.py"]), (cache, names)):
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    for old in [sources / "decode.py", *(cache / name for name in names[:2] + names[3:])]:
        os.utime(old, (0, 0))
    compiled._forget_outdated(cache, sources / "decode.py")  # helpers.py is newer
    assert sorted(path.name for path in cache.iterdir()) == sorted(names[2:])


def test_changed_kernels_of_other_folders_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, sources, cache = tmp_path / "kernels", tmp_path / "sources", tmp_path / "cache"
    monkeypatch.setattr(compiled, "_KERNELS", kernels)
    for file in (sources / "round.py", cache / "round.f-1.py311.nbi", kernels / "cpu" / "formats.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (0, 0))
    compiled._forget_outdated(cache, sources / "round.py")
    assert list(cache.iterdir()), "as old as everything else"
    os.utime(kernels / "cpu" / "formats.py", (1, 1))
    compiled._forget_outdated(cache, sources / "round.py")
    assert not list(cache.iterdir())


def test_what_another_process_removes_meanwhile_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decode.py").touch()
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / ("decode.py" if pattern == "*.py" else "gone.nbi")]))
    compiled._forget_outdated(tmp_path, tmp_path / "decode.py")
    assert [path.name for path in tmp_path.iterdir()] == ["decode.py"]
