"""Which files of a folder are opened, and that no name or link leads out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexgen.checkpoint.files import Checkpoint
from flexgen.errors import CheckpointError
from flexgen.hub.model_files import INDEX_FILE, SINGLE_FILE, find_weight_files


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tensors(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2) for name in names}, path)


def test_a_single_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / SINGLE_FILE, "a")
    write_index(tmp_path, {"a": "../outside.safetensors"})  # not looked at, as in transformers
    assert find_weight_files(tmp_path) == ([tmp_path / SINGLE_FILE], {})


def test_shards(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", "a", "b")
    write_tensors(tmp_path / "two.safetensors", "c")
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert {name: tensor.path.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
    }  # fmt: skip
    assert checkpoint.total_bytes == 3 * 8


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/../../secret.safetensors", "..", ".", "", "sub/secret.safetensors",
     "secret.bin", "secret.safetensors\0", "absent.safetensors", 3, None, ["secret.safetensors"]],
)  # fmt: skip
def test_names_in_the_index_stay_in_the_folder(tmp_path: Path, name: object) -> None:
    write_tensors(tmp_path / "secret.safetensors", "a")
    folder = tmp_path / "model"
    write_tensors(folder / "sub" / "secret.safetensors", "a")
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": NaN}}', "[" * 10**5])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint(tmp_path)


def test_the_index_must_be_right(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", "a")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"b is not in one\.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", "a")
    write_tensors(tmp_path / "two.safetensors", "a", "b")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"a is stored twice: in one\.safetensors and in two\.safetensors"):
        Checkpoint(tmp_path)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).symlink_to(INDEX_FILE)
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    torch.save(Canary(tmp_path / "ran"), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"pickled weights.*{name}.*safetensors"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [("adapter_config.json", "adapter"), ("consolidated.safetensors", "consolidated"), ("model.gguf", "gguf"), ("config.json", "neither")],
)
def test_other_folders_are_refused_by_name(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_text("{}")
    (tmp_path / "README.md").write_text("")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "absent")
