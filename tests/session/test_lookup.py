"""From a model's name to its numbers: the catalogue without torch, folders and hub repositories by their headers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.errors import CheckpointError, ModelError, OptionError
from flexgen.formats.table import quantization_of
from flexgen.hub.config import read_config
from flexgen.models.assemble import assemble_model
from flexgen.models.unit_size import LINK_UNIT_BYTES
from flexgen.options import EngineOptions
from flexgen.plan.known.models import catalogue_spec
from flexgen.plan.model import ModelSpec
from flexgen.session.lookup import describe_files, files_of, spec_of
from tests.hub.test_resolve import StandIn
from tests.models.tiny_configs import tiny_config


@pytest.fixture
def hub() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


def test_a_shipped_model_needs_no_torch() -> None:
    code = (
        "import sys, flexgen.session.lookup as s; "
        "print(s.spec_of('llama-3-8b', device='cpu').name, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "meta-llama/Meta-Llama-3-8B set()"), done.stderr


@pytest.mark.parametrize(
    "model", ["facebook/opt-30b", "Facebook/OPT-30B", "OPT-30b", "qwen/qwen3-32B", "meta-llama/Llama-3.3-70B-Instruct"]
)
def test_a_hub_id_of_a_shipped_model_needs_no_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.hub.resolve.resolve_model", lambda *_, **__: pytest.fail("the hub was asked"))
    spec = spec_of(model, device="cuda")
    assert spec.name == (model if "/" in model else "facebook/opt-30b")
    wide = spec_of(model, EngineOptions(dtype="float32"), device="cuda")
    assert wide.kv_bytes_per_token == 2 * spec.kv_bytes_per_token


def test_a_revision_of_a_shipped_model_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def resolve(model: str, *, revision: str | None, **_: object) -> None:
        asked.append(revision)
        raise ModelError("no hub here")

    monkeypatch.setattr("flexgen.hub.resolve.resolve_model", resolve)
    with pytest.raises(ModelError, match="no hub here"):
        spec_of("facebook/opt-30b", EngineOptions(revision="refs/pr/1"), device="cpu")
    assert asked == ["refs/pr/1"]


def test_shipped_models_in_the_dtype_that_would_run() -> None:
    shipped = catalogue_spec("opt-125m")
    assert spec_of("opt-125m", device="cuda") == spec_of("opt-125m", EngineOptions(dtype="float16"), device="cpu") == shipped
    on_cpu, wide = spec_of("opt-125m", device="cpu"), spec_of("opt-125m", EngineOptions(dtype="float32"), device="cpu")
    assert (on_cpu.dtype, on_cpu.number_format) == ("bfloat16", "float16")
    assert [unit.disk_bytes for unit in on_cpu.units] == [unit.disk_bytes for unit in shipped.units]
    assert not any(unit.plain for unit in on_cpu.units)
    assert (wide.dtype, wide.kv_bytes_per_token) == ("float32", 2 * shipped.kv_bytes_per_token)


def without_layers(spec: ModelSpec) -> ModelSpec:
    """The model as the catalogue has it, which does not say which layers a group of KV has."""
    return dataclasses.replace(spec, kv_groups=tuple(dataclasses.replace(group, layers=()) for group in spec.kv_groups))


def test_shipped_models_are_cut_as_the_engine_cuts_them() -> None:
    """Units that cross a link in milliseconds, as for the same model with random weights; small models need no other units."""
    name, random = "qwen3-14b", EngineOptions(load_format="dummy")
    shipped, on_device = catalogue_spec(name), spec_of(name, device="cuda")
    assert without_layers(spec_of(name, device="cpu")) == shipped
    assert on_device.units == describe_files(files_of(name, random), random, device="cuda").units
    assert max(unit.carried_bytes for unit in on_device.units) <= LINK_UNIT_BYTES < max(unit.carried_bytes for unit in shipped.units)
    assert on_device.flops_per_token == pytest.approx(shipped.flops_per_token)
    assert dataclasses.replace(without_layers(on_device), units=(), operations=0) == dataclasses.replace(shipped, units=(), operations=0)
    assert on_device.operations > shipped.operations, "a cut layer has several products"
    assert without_layers(spec_of("llama-3.2-3b", device="cuda")) == catalogue_spec("llama-3.2-3b")
    wide = spec_of("llama-3-8b", EngineOptions(dtype="float32"), device="cuda")
    assert max(unit.carried_bytes for unit in wide.units) <= LINK_UNIT_BYTES


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is named like a shipped model is meant before that."""
    write_random_checkpoint(tiny_config("llama"), tmp_path / "llama-3-8b", torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    spec = spec_of("llama-3-8b", device="cpu")
    here = assemble_model(tmp_path / "llama-3-8b", tiny_config("llama"), torch.bfloat16).spec
    assert spec == here
    assert spec != catalogue_spec("llama-3-8b")
    (tmp_path / "llama-3-8b" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model"):
        spec_of("llama-3-8b", device="cpu")


def test_what_is_no_model() -> None:
    with pytest.raises(OptionError, match="revision"):
        spec_of("opt-30b", EngineOptions(revision="main"), device="cpu")
    with pytest.raises(OptionError, match="dtype='int8' is unknown"):
        spec_of("opt-30b", EngineOptions(dtype="int8"), device="cpu")
    with pytest.raises(ModelError, match="nor is it in the catalogue: llama-3-8b, "):
        spec_of("-llama-3-8b", device="cpu")
    with pytest.raises(ModelError, match="/no/such/folder does not exist"):
        spec_of("/no/such/folder", device="cpu")


@pytest.mark.parametrize("name", ["x.gguf", "renamed", "model.safetensors", "nowhere.gguf"])
def test_a_file_is_not_a_name_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whether it is broken, something else, or not there."""
    monkeypatch.chdir(tmp_path)
    if name != "nowhere.gguf":
        (tmp_path / name).write_bytes(b"GGUF\x03")
    with pytest.raises(ModelError, match=re.escape(name)) as caught:
        spec_of(name, device="cpu")
    assert "catalogue" not in str(caught.value)


def from_hub(hub: StandIn, home: Path) -> ModelSpec:
    """In a fresh process: the hub library reads its environment when it is imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = "from flexgen.session.lookup import spec_of; print(spec_of('org/model', device='cpu').to_json())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return ModelSpec.from_json(done.stdout)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_repository_by_its_headers(hub: StandIn, tmp_path: Path, model_type: str) -> None:
    """Nothing but the first bytes of weight files is asked for, and the numbers are those of the files."""
    folder = tmp_path / "source"
    write_random_checkpoint(tiny_config(model_type), folder, torch.bfloat16, shard_bytes=60_000)
    hub.repositories["org/model"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = from_hub(hub, tmp_path / "hf")
    here = assemble_model(folder, tiny_config(model_type), torch.bfloat16).spec
    assert spec == dataclasses.replace(here, name="org/model")
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name for name, _ in hub.ranges} == set(index["weight_map"].values())


@pytest.mark.parametrize("name", ["opt-30b", "gpt-oss-20b", "GPT-OSS-20B"])
def test_random_weights_of_a_shipped_model_need_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.hub.resolve.resolve_model", lambda *_, **__: pytest.fail("the hub was asked"))
    files = files_of(name, EngineOptions(load_format="dummy"))
    assert (files.name, files.has_tokenizer, files.generation_config) == (name.lower(), False, {})
    config = read_config(files)
    assert config.hidden_size == catalogue_spec(name.lower()).hidden_size
    assert (quantization_of(config) or {}).get("quant_method") == ("mxfp4" if "gpt" in name.lower() else None)


@pytest.mark.parametrize(
    ("model", "load_format", "revision"), [("opt-30b", "auto", None), ("facebook/opt-30b", "dummy", None), ("opt-30b", "dummy", "main")]
)
def test_other_models_are_looked_for_in_folders_and_on_the_hub(
    model: str, load_format: str, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("flexgen.hub.resolve.resolve_model", lambda name, **_: asked.append(name))
    files_of(model, EngineOptions(load_format=load_format, revision=revision))
    assert asked == [model]


def test_random_weights_of_a_folder_are_described_by_its_config(tmp_path: Path) -> None:
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    write_random_checkpoint(config, tmp_path / "whole", torch.bfloat16)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    described = spec_of(str(tmp_path / "config"), EngineOptions(load_format="dummy"), device="cpu")
    assert described == dataclasses.replace(spec_of(str(tmp_path / "whole"), device="cpu"), name=str(tmp_path / "config"))
    assert described.decoded_from.keys() == {"mxfp4"}


def test_a_shipped_model_whose_products_are_in_int8() -> None:
    plain, rounded = spec_of("opt-125m", device="cpu"), spec_of("opt-125m", EngineOptions(cpu_compute="int8"), device="cpu")
    assert rounded.int8_flops_per_token == rounded.flops_per_token == plain.flops_per_token
    assert rounded.streamed_bytes == plain.streamed_bytes
    assert rounded.decoded_bytes < plain.decoded_bytes
