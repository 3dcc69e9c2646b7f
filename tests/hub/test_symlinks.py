"""Links of a model's folder: an owner's own are followed wherever they lead, another user's are not."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexgen.errors import CheckpointError
from flexgen.hub.symlinks import followed

ME, ROOT, ALICE, BOB = 1000, 0, 1001, 1002


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Owners of files and links by their names; all others are mine."""
    owned: dict[str, int] = {}
    real_lstat, real_stat = Path.lstat, Path.stat

    def told(path: Path, status: os.stat_result) -> SimpleNamespace:
        return SimpleNamespace(st_mode=status.st_mode, st_size=status.st_size, st_uid=owned.get(path.name, ME))

    monkeypatch.setattr(Path, "lstat", lambda path: told(path, real_lstat(path)))
    monkeypatch.setattr(Path, "stat", lambda path, **more: told(path, real_stat(path, **more)))
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    return owned


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a link to a file outside of it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "target").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to("../elsewhere/target")
    return folder


def test_a_plain_file(model: Path) -> None:
    (model / "file").write_text("x")
    assert followed(model / "file") == model / "file"


@pytest.mark.parametrize(
    ("link", "target", "follows"),
    [
        (ME, ME, True),
        (ME, ALICE, True),
        (ROOT, ALICE, True),
        (ALICE, ALICE, True),
        (ALICE, ME, False),
        (ALICE, BOB, False),
        (ALICE, ROOT, False),
    ],
)
def test_whose_links_are_followed(model: Path, owners: dict[str, int], link: int, target: int, follows: bool) -> None:
    owners |= {"link": link, "target": target}
    if follows:
        assert followed(model / "link") == model.parent / "elsewhere" / "target"
    else:
        with pytest.raises(CheckpointError, match=f"{re.escape(str(model / 'link'))} is a link of another user.*copy the file"):
            followed(model / "link")


def test_every_link_on_the_way_counts(model: Path, owners: dict[str, int]) -> None:
    """Mine leads to Alice's, and hers to my file."""
    (model / "mine").symlink_to("../elsewhere/hers")
    (model.parent / "elsewhere" / "hers").symlink_to("target")
    assert followed(model / "mine").name == "target"
    owners["hers"] = ALICE
    with pytest.raises(CheckpointError, match="hers is a link of another user"):
        followed(model / "mine")


def test_links_of_folders_count(model: Path, owners: dict[str, int]) -> None:
    (model / "folder").symlink_to("../elsewhere")
    (model / "through").symlink_to("folder/target")
    assert followed(model / "through").name == "target"
    owners["folder"] = ALICE
    with pytest.raises(CheckpointError, match="folder is a link of another user"):
        followed(model / "through")


def test_within_the_folder_anybody_may_link(model: Path, owners: dict[str, int]) -> None:
    (model / "file").write_text("x")
    (model / "hers").symlink_to("file")
    owners["hers"] = ALICE
    assert followed(model / "hers") == model / "file"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A snapshot of the hub's cache."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "digest").write_text("x")
    (snapshot / "file").symlink_to("../../blobs/digest")
    return snapshot


def test_a_shared_cache_of_the_hub(cache: Path, owners: dict[str, int], tmp_path: Path) -> None:
    owners |= {"file": ALICE, "digest": BOB}  # whoever downloaded first
    assert followed(cache / "file").name == "digest"
    (tmp_path / "link").symlink_to(cache)
    assert followed(tmp_path / "link" / "file").name == "digest"


def test_a_cache_whose_blobs_are_on_another_disk(cache: Path, owners: dict[str, int], tmp_path: Path) -> None:
    blobs = cache.parent.parent / "blobs"
    blobs.rename(tmp_path / "disk")
    blobs.symlink_to(tmp_path / "disk")
    assert followed(cache / "file") == tmp_path / "disk" / "digest"
    owners |= {"blobs": ALICE, "file": ALICE, "digest": ALICE}
    assert followed(cache / "file") == tmp_path / "disk" / "digest"
    owners["digest"] = ME
    with pytest.raises(CheckpointError, match="another user"):
        followed(cache / "file")


@pytest.mark.parametrize("target", ["link", "absent", "/", "/dev/zero", "nul\0"])
def test_what_leads_nowhere(tmp_path: Path, target: str) -> None:
    if "\0" in target:
        path = tmp_path / target
    else:
        path = tmp_path / "link"
        path.symlink_to(target)
    with pytest.raises(CheckpointError):
        followed(path)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(CheckpointError, match="not a regular file"):
        followed(tmp_path / "pipe")
