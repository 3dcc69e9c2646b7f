"""Files that commands write: whole or not at all, and never through what somebody planted."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from flexgen.base import files
from flexgen.base.files import follow, open_private, write_file
from flexgen.errors import StorageError


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_file(path, "one")
    path.chmod(0o640)
    write_file(path, "two")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_hard_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "metrics.json").hardlink_to(tmp_path / "precious")
    write_file(tmp_path / "metrics.json", "{}")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "metrics.json").read_text() == "{}"


def test_a_link_of_the_user_s_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "metrics.json").symlink_to("elsewhere/real.json")
    write_file(tmp_path / "metrics.json", "{}")
    assert (tmp_path / "metrics.json").is_symlink()
    assert (tmp_path / "elsewhere/real.json").read_text() == "{}"
    assert follow(tmp_path / "metrics.json") == (tmp_path / "elsewhere" / "real.json").resolve()


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_file(path, "one")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_file(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["pipe", "folder", "/dev/null", "what standard error writes to"])
def test_what_no_file_can_replace(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "/dev/null":
        path.symlink_to(what)
    else:
        path.touch()
        monkeypatch.setattr(files.os.path, "samestat", lambda *both: True)
    with pytest.raises(StorageError):
        write_file(path, "{}")


def test_a_private_file_is_emptied_only_if_it_is_one(tmp_path: Path) -> None:
    mine, linked = tmp_path / "mine", tmp_path / "linked"
    mine.write_text("old")
    os.close(open_private(mine, os.O_WRONLY | os.O_TRUNC))
    assert mine.read_text() == ""
    (tmp_path / "precious").write_text("precious")
    linked.hardlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="second name"):
        open_private(linked, os.O_WRONLY | os.O_TRUNC)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
def test_in_a_folder_for_all_only_its_owner_can_replace_a_file() -> None:
    with tempfile.TemporaryDirectory() as shared:
        path = Path(shared) / "metrics.json"
        path.touch()
        path.chmod(0o666)
        path.parent.chmod(0o1777)
        os.seteuid(12345)
        try:
            with pytest.raises(StorageError, match="belongs to another user"):
                write_file(path, "{}")
            write_file(path.with_name("mine"), "{}")
        finally:
            os.seteuid(0)
