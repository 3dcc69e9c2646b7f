"""Folders for spilled data: private, gone afterwards, and swept where a run was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen.errors import StorageError
from flexgen.io.offload import OffloadFolder

KILLED = """
import os, sys
from pathlib import Path
from flexgen.io.offload import OffloadFolder
folder = OffloadFolder(Path(sys.argv[1]))
(folder.path / "kv.spill").write_bytes(b"private")
os.kill(os.getpid(), 9)
"""


def test_nobody_else_can_read_it_and_nothing_is_left(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = OffloadFolder(tmp_path / "new")
    finally:
        os.umask(before)
    assert folder.path.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.path.iterdir())
    (folder.path / "kv.spill").write_bytes(b"private")
    folder.remove()
    folder.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_killed_run_left_goes_and_what_others_use_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    used = OffloadFolder(tmp_path)
    foreign = tmp_path / "flexgen-offload-is-a-folder-of-mine"
    foreign.mkdir()
    (foreign / "thesis").touch()
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    fresh = OffloadFolder(tmp_path)
    assert {used.path, foreign, fresh.path} == set(tmp_path.iterdir())
    assert "which a run that was killed had left" in caplog.text
    used.remove()
    fresh.remove()


def test_folders_of_another_kind_stay(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    with OffloadFolder(tmp_path, "flexgen-measure-") as folder:
        assert folder.name.startswith("flexgen-measure-")
        assert set(tmp_path.iterdir()) == {left, folder}
    assert set(tmp_path.iterdir()) == {left}


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "in-use").touch()
    parent = tmp_path / "shared"
    parent.mkdir()
    (parent / "flexgen-offload-planted1").symlink_to(victim)
    planted = parent / "flexgen-offload-planted2"
    planted.mkdir()
    (planted / "in-use").symlink_to(victim / "in-use")
    OffloadFolder(parent).remove()
    assert (victim / "in-use").exists()
    assert planted.exists()


def test_a_parent_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be used"):
        OffloadFolder(tmp_path / "file")
