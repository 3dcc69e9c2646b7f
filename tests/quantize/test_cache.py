"""The cache: converted once per source and settings, by one process at a time, listed, removed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.errors import OptionError, StorageError
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model
from flexgen.quantize import cache as cache_module
from flexgen.quantize.cache import cached_conversion, conversion_left, entries, find_entries, remove
from flexgen.quantize.record import RECORD_FILE, locked, read_record
from flexgen.quantize.settings import QuantizeSettings
from tests.quantize.reading import made

INT4, INT8 = QuantizeSettings(group_size=32), QuantizeSettings(group_size=32, weight_format="int8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return made(tmp_path_factory.mktemp("source") / "tiny", dtype=torch.bfloat16)[1]


def test_a_model_is_converted_once_for_each_format(tmp_path: Path, source: ModelFiles) -> None:
    first = cached_conversion(source, INT4, tmp_path)
    before = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert cached_conversion(source, INT4, tmp_path) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == before
    other = cached_conversion(source, INT8, tmp_path)
    assert other.folder != first.folder
    assert (first.name, first.config["quantization_config"]["quant_method"]) == (source.name, "compressed-tensors")
    assert first.conversion != other.conversion, "a job that was begun with one is not gone on with by the other"
    assert [str(each.conversion).partition(", ")[2] for each in (first, other)] == [
        "weights in int4, groups of 32",
        "weights in int8, groups of 32",
    ]
    assert {(entry.weight_format, entry.source, entry.state) for entry in entries(tmp_path)} == {
        ("int4", source.name, "complete"),
        ("int8", source.name, "complete"),
    }
    assert all(entry.nbytes > 100_000 for entry in entries(tmp_path))


def test_a_folder_is_converted_once_whatever_it_is_called(tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(source.folder, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "models")
    (tmp_path / "link").symlink_to("models/tiny")
    first = cached_conversion(resolve_model("tiny"), INT4, tmp_path / "cache")
    for name in ("./tiny/", tmp_path / "models" / "tiny", "../models/tiny", tmp_path / "link"):
        again = cached_conversion(resolve_model(name), INT4, tmp_path / "cache")
        assert (again.folder, again.conversion) == (first.folder, first.conversion)
        assert conversion_left(resolve_model(name), INT4, tmp_path / "cache") == 0
    (entry,) = entries(tmp_path / "cache")
    assert entry.source == str(tmp_path / "models" / "tiny")
    shutil.rmtree(tmp_path / "models" / "tiny")
    for name in ("tiny", str(tmp_path / "models" / "tiny")):
        assert find_entries([name], tmp_path / "cache") == [entry]


def test_weights_that_changed_are_converted_again(tmp_path: Path, source: ModelFiles) -> None:
    shutil.copytree(source.folder, tmp_path / "copy")
    files = resolve_model(tmp_path / "copy")
    first = cached_conversion(files, INT4, tmp_path / "cache")
    os.utime(files.folder / "model.safetensors", ns=(1, 1))
    assert cached_conversion(files, INT4, tmp_path / "cache").folder != first.folder


def test_a_commit_is_the_same_wherever_its_files_are(tmp_path: Path, source: ModelFiles) -> None:
    files = dataclasses.replace(source, commit="abc", name="someone/tiny")
    first = cached_conversion(files, INT4, tmp_path)
    assert first.folder.name.startswith("someone--tiny-int4-")
    assert cached_conversion(dataclasses.replace(files, folder=tmp_path / "gone"), INT4, tmp_path) == first


def test_while_another_process_converts_this_one_waits(tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached_conversion(source, INT4, tmp_path).folder
    shutil.rmtree(folder)
    folder.mkdir()
    steps: list[str] = []
    waiting = threading.Event()

    def step(text: str) -> None:
        steps.append(text)
        if text.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(cache_module, "step", step)
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.01)
    found: list[ModelFiles] = []
    with locked(folder):
        thread = threading.Thread(target=lambda: found.append(cached_conversion(source, INT4, tmp_path)))
        thread.start()
        assert waiting.wait(60)
        assert not found
    thread.join(60)
    assert found[0].folder == folder
    assert sum(text.startswith("waiting for another process") for text in steps) == 1


def test_entries_are_removed_by_name_or_by_model(tmp_path: Path, source: ModelFiles) -> None:
    name = cached_conversion(source, INT4, tmp_path).folder.name
    cached_conversion(source, INT8, tmp_path)
    assert [entry.name for entry in find_entries([name], tmp_path)] == [name]
    both = find_entries([source.name], tmp_path)
    assert len(both) == 2
    assert find_entries([os.path.relpath(source.name) + "/"], tmp_path) == both
    with pytest.raises(OptionError, match=rf"nothing-like-that is not in the cache, which has .*{name} \(of {source.name}\)"):
        find_entries(["nothing-like-that"], tmp_path)
    with locked(both[0].folder), pytest.raises(StorageError, match="being written by another process"):
        remove(both[0])
    for entry in both:
        remove(entry)
    assert not list(tmp_path.iterdir())


def test_what_is_not_complete_is_listed_as_such(tmp_path: Path, source: ModelFiles) -> None:
    folder = cached_conversion(source, INT4, tmp_path).folder
    (tmp_path / "empty").mkdir()
    (folder / "flexgen-conversion.json").write_text("{")
    assert {entry.name: entry.state[:12] for entry in entries(tmp_path)} == {"empty": "not complete", folder.name: str(folder)[:12]}
    assert entries(tmp_path / "none") == []


@pytest.mark.parametrize(("name", "kept_bytes", "state"), [
    ("config.json", None, "damaged: config.json is missing"),
    ("model.safetensors", None, "damaged: model.safetensors is missing"),
    ("model.safetensors", 100, "damaged: model.safetensors has 100 bytes of "),
    ("config.json", 0, "damaged: config.json has 0 bytes of "),
])  # fmt: skip
def test_what_a_conversion_has_lost_is_told_and_made_again(
    tmp_path: Path, source: ModelFiles, caplog: pytest.LogCaptureFixture, name: str, kept_bytes: int | None, state: str
) -> None:
    """Only that: what is there in its size is left alone."""
    before = cached_conversion(source, INT4, tmp_path)
    path = before.folder / name
    whole = {each.name: each.read_bytes() for each in before.folder.iterdir()}
    others = {each.name: each.stat().st_mtime_ns for each in before.folder.glob("*.safetensors") if each != path}
    path.unlink()
    if kept_bytes is not None:
        path.write_bytes(whole[name][:kept_bytes])
    (entry,) = entries(tmp_path)
    assert entry.state.startswith(state)
    assert (conversion_left(source, INT4, tmp_path) > 0.5) == (name == "model.safetensors")
    assert cached_conversion(source, INT4, tmp_path) == before
    assert f"{before.folder} is damaged ({entry.state.removeprefix('damaged: ')}): what is missing is converted again" in caplog.text
    assert {each.name: each.read_bytes() for each in before.folder.iterdir()} == whole
    assert {each: (before.folder / each).stat().st_mtime_ns for each in others} == others
    assert [entry.state for entry in entries(tmp_path)] == ["complete"]


def spoil_record(folder: Path) -> None:
    (folder / RECORD_FILE).write_text("{")


def lose_record(folder: Path) -> None:
    (folder / RECORD_FILE).unlink()


def change_record(folder: Path) -> None:
    """As another version might have written it, whose files are of other sizes."""
    record = read_record(folder)
    assert record is not None
    dataclasses.replace(record, total_bytes=1, complete=False).write(folder)


@pytest.mark.parametrize(("spoil", "said"), [
    (spoil_record, "cannot be understood"), (lose_record, "is not the folder of a conversion"), (change_record, "holds a conversion of"),
])  # fmt: skip
def test_an_entry_that_cannot_be_mended_names_the_command_that_removes_it(
    tmp_path: Path, source: ModelFiles, spoil: Callable[[Path], None], said: str
) -> None:
    folder = cached_conversion(source, INT4, tmp_path).folder
    spoil(folder)
    assert [entry.state for entry in entries(tmp_path)] != ["complete"]
    with pytest.raises(StorageError, match=rf"{said}.*`flexgen cache rm {folder.name}` removes it"):
        cached_conversion(source, INT4, tmp_path)
    (entry,) = find_entries([folder.name], tmp_path)
    remove(entry)
    assert cached_conversion(source, INT4, tmp_path).folder == folder


def test_settings_in_words_tell_conversions_apart() -> None:
    """A job knows converted weights by them."""
    asked: tuple[dict[str, Any], ...] = (
        {},
        {"eight_bits": ("*.down_proj.*",)},
        {"keep": ("*.down_proj.*",)},
        {"quantize_head": True},
        {"group_size": 64},
        {"weight_format": "int8"},
    )
    assert len({QuantizeSettings(**each).words for each in asked}) == len(asked)
