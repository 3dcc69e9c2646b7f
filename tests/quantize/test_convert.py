"""The folder that a conversion writes: its contents, and that nothing is lost or half done whatever interrupts it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen.checkpoint.files import Checkpoint
from flexgen.errors import CapacityError, CheckpointError, FlexGenError, OptionError, StorageError
from flexgen.hub.model_files import ModelFiles
from flexgen.hub.resolve import resolve_model
from flexgen.quantize import convert as convert_module
from flexgen.quantize import shard as shard_module
from flexgen.quantize import source as source_module
from flexgen.quantize.convert import ConversionProgress, convert
from flexgen.quantize.record import RECORD_FILE, FolderIsLocked, Record, locked, read_record
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.sums import damages
from tests.quantize.reading import dequantized, made, stored

SHARD_BYTES = 20_000


def converted(files: ModelFiles, folder: Path, **asked: Any) -> Record:
    settings: dict[str, Any] = {"group_size": 32, **asked}
    return convert(files, folder, QuantizeSettings(**settings), num_threads=2, shard_bytes=SHARD_BYTES)


def digests(folder: Path) -> dict[str, str]:
    """What the folder holds, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return made(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16)[1]


@pytest.fixture(scope="module")
def whole(source: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    converted(source, folder)
    return folder


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_every_tensor_is_there_rounded_or_as_it_was(tmp_path: Path, model_type: str, dtype: torch.dtype, weight_format: str) -> None:
    _, files = made(tmp_path / "in", model_type, dtype)
    folder = tmp_path / "out"
    record = converted(files, folder, weight_format=weight_format)
    before, after, bits = stored(files.folder), stored(folder), {"int4": 4, "int8": 8}[weight_format]
    rounded = {name.removesuffix("_packed") for name in after if name.endswith("_packed")}
    assert after.keys() == (before.keys() - rounded) | {
        f"{name}_{part}" for name in rounded for part in ("packed", "scale", "zero_point", "shape")
    }
    assert record.kept.keys() | rounded == {name for name, tensor in before.items() if tensor.ndim > 1}
    for name, tensor in before.items():
        if name not in rounded:
            assert torch.equal(tensor, after[name])
            continue
        assert after[f"{name}_scale"].dtype == dtype
        error = (dequantized(after, name, bits) - tensor.float()).square().mean() / tensor.float().square().mean()
        assert error < {4: 1e-2, 8: 4e-5}[bits]


def test_the_config_says_what_was_done(whole: Path, source: ModelFiles) -> None:
    config = json.loads((whole / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == source.config
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == quantization["config_groups"]["group_0"]["format"] == "pack-quantized"
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"], weights["type"]) == (4, 32, False, "int")
    assert "lm_head" in quantization["ignore"]
    assert AutoConfig.from_pretrained(whole).quantization_config["format"] == "pack-quantized"


def test_some_tensors_have_eight_bits(tmp_path: Path, source: ModelFiles) -> None:
    folder = tmp_path / "out"
    convert(source, folder, QuantizeSettings(eight_bits=("*.down_proj.weight",)), num_threads=1)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {name: group["weights"]["num_bits"] for name, group in groups.items()} == {"group_0": 4, "group_1": 8}
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_1"]["targets"] == sorted(f"model.layers.{index}.mlp.down_proj" for index in range(4))
    before, after = stored(source.folder), stored(folder)
    for name in (name.removesuffix("_packed") for name in after if name.endswith("_packed")):
        bits = 8 if "down_proj" in name else 4
        assert after[f"{name}_packed"].shape[1] == before[name].shape[1] * bits // 32
        error = (dequantized(after, name, bits) - before[name].float()).square().mean() / before[name].float().square().mean()
        assert error < {4: 1e-2, 8: 4e-5}[bits]


def test_small_files_come_along(tmp_path: Path, novels_opt: Path) -> None:
    record = convert(resolve_model(novels_opt), tmp_path / "out", QuantizeSettings(), num_threads=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (novels_opt / name).read_bytes()
    assert record.files.keys() | {RECORD_FILE} == {path.name for path in (tmp_path / "out").iterdir()}


def test_files_are_no_larger_than_asked_for_and_the_index_names_them(whole: Path) -> None:
    checkpoint = Checkpoint(whole)  # which compares the index with the headers
    sizes = {path.name: path.stat().st_size for path in whole.glob("*.safetensors")}
    assert len(sizes) > 3
    assert {tensor.path.name for tensor in checkpoint.tensors.values()} == sizes.keys()
    assert max(sizes.values()) < 2 * SHARD_BYTES  # a header on top


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package handles it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], int]:
    """Make the step of this number on the file system the last one; returns how many steps there were."""
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == count:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("pwrite", "fsync", "posix_fallocate"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(convert_module, "sums_of", counted(convert_module.sums_of))
    return lambda: steps


def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, source: ModelFiles, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, kills = digests(whole), 0
    with monkeypatch.context() as patched:
        num_steps = kill_at(patched, -1)
        converted(source, tmp_path / "counted")
        total = num_steps()
    assert total > 100
    for count in range(1, total + 1, 13):
        folder = tmp_path / f"killed-{count}"
        with monkeypatch.context() as patched:
            kill_at(patched, count)
            with pytest.raises(Killed):
                converted(source, folder)
        kills += 1
        complete = {path.name for path in folder.glob("*.safetensors")}
        assert not (folder / "config.json").exists() or len(complete) == len(list(whole.glob("*.safetensors")))
        before = {name: (folder / name).stat().st_mtime_ns for name in (read_record(folder) or EMPTY).files}
        converted(source, folder)
        assert digests(folder) == expected
        assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items()), "what is complete is not written again"
        shutil.rmtree(folder)
    assert kills > 7


EMPTY = Record(source="", identity="", settings={}, shard_bytes=0, total_bytes=0, kept={})


def test_a_file_that_lost_its_end_is_written_again(tmp_path: Path, source: ModelFiles, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    converted(source, folder)
    assert digests(folder) == digests(whole)


def test_a_complete_folder_is_left_alone(source: ModelFiles, whole: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert converted(source, whole).complete
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_folder_of_an_earlier_version_is_left_alone(tmp_path: Path, source: ModelFiles, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    record = json.loads((folder / RECORD_FILE).read_text())
    del record["allow_requantize"]
    record["source"] = "a name as it was typed"
    (folder / RECORD_FILE).write_text(json.dumps(record))
    before = digests(folder)
    assert converted(source, folder).complete
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"group_size": 64}, "group_size 32, not 64"),
        ({"keep": ("*.up_proj.weight",)}, 'keep [], not ["*.up_proj.weight"]'),
        ({"weight_format": "int8"}, 'weight_format "int4", not "int8"'),
        ({"eight_bits": ("*.up_proj.*",)}, 'eight_bits [], not ["*.up_proj.*"]'),
    ],
    ids=str,
)
def test_other_settings_are_refused(source: ModelFiles, whole: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"with other settings ({said})")):
        converted(source, whole, **asked)


def test_other_weights_are_refused(tmp_path: Path, source: ModelFiles, whole: Path) -> None:
    shutil.copytree(source.folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", ns=(1, 1))
    with pytest.raises(OptionError, match="of other weights"):
        converted(resolve_model(tmp_path / "copy"), whole)


def test_a_folder_with_something_else_is_refused(tmp_path: Path, source: ModelFiles) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(OptionError, match=r"holds thesis\.tex and is not the folder of a conversion"):
        converted(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_writer_is_refused(tmp_path: Path, source: ModelFiles) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder), pytest.raises(FolderIsLocked, match="being written by another process"):
        converted(source, folder)
    assert converted(source, folder).complete


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(convert_module.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
        with pytest.raises(CapacityError, match=r"takes 1\.\d MiB more, 976\.6 KiB are free"):
            converted(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (tmp_path / "empty").mkdir()
        with pytest.raises(CapacityError):
            converted(source, tmp_path / "empty")
        assert list((tmp_path / "empty").iterdir()) == []
    record = converted(source, tmp_path / "out")
    taken = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    with monkeypatch.context() as patched:  # what a conversion takes, and little more, is enough
        patched.setattr(convert_module.shutil, "disk_usage", lambda folder: usage._replace(free=taken + (1 << 20)))
        assert converted(source, tmp_path / "other") == record


def test_a_folder_that_cannot_be_made_is_not_said_to_go_on(tmp_path: Path, source: ModelFiles) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(StorageError, match=rf"^{folder} cannot be made: ") as caught:
            converted(source, folder)
        assert "goes on" not in str(caught.value)


def test_a_disk_that_fails_is_told(tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match=r"No space left on device.*the same command goes on"):
            converted(source, tmp_path / "out")
    assert converted(source, tmp_path / "out").complete


def test_progress_ends_at_the_total(tmp_path: Path, source: ModelFiles) -> None:
    told: list[ConversionProgress] = []
    settings = QuantizeSettings(group_size=32)
    record = convert(source, tmp_path / "out", settings, num_threads=1, shard_bytes=SHARD_BYTES, on_progress=told.append)
    done = [each.done_bytes for each in told]
    assert done == sorted(done)
    assert done[-1] == record.total_bytes == told[0].total_bytes
    assert record.total_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_flipped_bit_is_found_and_named(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    record = read_record(folder)
    assert record is not None
    assert damages(folder, record) == []
    tensor = next(tensor for name, tensor in Checkpoint(folder).tensors.items() if name.endswith("o_proj.weight_packed"))
    data = bytearray(tensor.path.read_bytes())
    data[tensor.offset + 5] ^= 16
    tensor.path.write_bytes(data)
    (damage,) = damages(folder, record)
    assert tensor.path.name in damage
    assert "is damaged" in damage
    (folder / "config.json").write_text("{}")
    assert any("config.json has 2 bytes" in each for each in damages(folder, record))
    assert any("not complete" in each for each in damages(folder, dataclasses.replace(record, complete=False)))


@pytest.mark.parametrize("wrong", ["{", "[]", '{"source": 1}', "\xff"])
def test_a_record_that_cannot_be_understood_is_refused(tmp_path: Path, source: ModelFiles, wrong: str) -> None:
    (tmp_path / RECORD_FILE).write_bytes(wrong.encode("latin-1"))
    with pytest.raises(StorageError, match=r"cannot be understood.*convert again"):
        converted(source, tmp_path)


def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    model, _ = made(tmp_path / "in")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        converted(resolve_model(tmp_path / "nan"), tmp_path / "out")
    assert converted(resolve_model(tmp_path / "nan"), tmp_path / "kept", keep=("model.layers.1.mlp.up_proj.weight",)).complete


def test_blocks_of_rows_do_not_change_anything(tmp_path: Path, source: ModelFiles, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BLOCK_ELEMENTS", 64 * 8)
    monkeypatch.setattr(source_module, "_COPIED_BYTES", 1000)
    converted(source, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(whole)


def test_few_numbers_are_in_memory_at_a_time(tmp_path: Path, source: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks at most exist, whatever the size of the tensors: the one that is rounded and the one that is read."""
    monkeypatch.setattr(source_module, "BLOCK_ELEMENTS", 64 * 8)
    sizes: list[int] = []
    original = shard_module.round_groups
    monkeypatch.setattr(shard_module, "round_groups", lambda numbers, **more: (sizes.append(numbers.numel()), original(numbers, **more))[1])
    converted(source, tmp_path / "out")
    assert max(sizes) <= 96 * 8
    assert len(sizes) > 100


def test_packed_weights_of_another_tool_are_refused(tmp_path: Path) -> None:
    _, files = made(tmp_path / "in")
    config = files.config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(FlexGenError, match="bitsandbytes"):
        converted(dataclasses.replace(files, config=config), tmp_path / "out")


def test_the_papers_format_is_written_too(tmp_path: Path, source: ModelFiles) -> None:
    record = converted(source, tmp_path / "out", weight_format="flexgen-v0", group_size=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "flexgen-v0", "bits": 4, "group_size": 64, "ignore": ["lm_head", "model.embed_tokens"]}
    after = stored(tmp_path / "out")
    assert after["model.layers.0.mlp.down_proj.weight_codes"].shape == (32, 96)
    assert after["model.layers.0.mlp.down_proj.weight_ranges"].shape == (1, 2, 96)
    assert record.complete
