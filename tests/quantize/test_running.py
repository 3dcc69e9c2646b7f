"""Models that were converted run: what they compute is what the dense model of the decoded weights computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine_of
from safetensors.torch import save_file

from flexgen.checkpoint.files import Checkpoint
from flexgen.formats.table import stated_format
from flexgen.hub.config import read_config
from flexgen.hub.resolve import resolve_model
from flexgen.llm import LLM
from flexgen.models.describe import describe_headers
from flexgen.options import EngineOptions
from flexgen.quantize.convert import convert
from flexgen.quantize.settings import QuantizeSettings
from flexgen.quantize.source import Reader
from flexgen.request import SamplingParams
from flexgen.session.lookup import spec_of
from flexgen.session.shipped import described
from tests.models.parity import generated, requests_for
from tests.quantize.reading import dequantized, made, stored

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def greedy(folder: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    with LLM(folder, dtype="float32", host_mem="2GiB", **options) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, PARAMS)]


@pytest.mark.parametrize(
    ("model_type", "asked", "placement"),
    [
        ("llama", {}, {"weights": "disk=1"}),
        ("llama", {"weight_format": "int8", "group_size": 32}, {"weights": "host=1"}),
        ("llama", {"eight_bits": ("*.down_proj.*", "*.0.self_attn.*")}, {"weights": "host=.5,disk=.5"}),
        ("llama", {"weight_format": "flexgen-v0"}, {"device": "sim", "weights": "host=.5,disk=.5"}),
        ("mixtral", {}, {"device": "sim", "weights": "host=.5,disk=.5"}),
        ("mixtral", {"eight_bits": ("*.w2.*", "*.v_proj.*")}, {"weights": "disk=1"}),
    ],
    ids=[
        "int4 on disk",
        "int8 in memory",
        "some in 8 bits",
        "the paper's on a device",
        "experts on a device",
        "experts with some in 8 bits",
    ],
)
def test_tokens_are_those_of_the_decoded_weights(tmp_path: Path, model_type: str, asked: dict[str, Any], placement: dict[str, str]) -> None:
    model, files = made(tmp_path / "in", model_type)
    settings = QuantizeSettings(quantize_head=True, **asked)
    folder = tmp_path / "out"
    convert(files, folder, settings, num_threads=1)
    converted = resolve_model(folder)
    config = read_config(converted)
    headers = Checkpoint(folder).decoded(stated_format(config), torch.float32)
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in headers.tensors.items():
        reader = Reader()
        data = torch.cat([portion.clone() for _, portion in reader.portions([(tensor, 0)])])
        dense[name] = data.view(tensor.dtype).view(tensor.shape)
        reader.close()
    if not settings.is_paper:  # a reader of its own
        tensors = stored(folder)
        for name in dense:
            if f"{name}_packed" in tensors:
                assert torch.equal(dense[name], dequantized(tensors, name, settings.bits_of(name)))
    model.save_pretrained(tmp_path / "dense")
    save_file(dense, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    reference = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    requests = requests_for(model.config.vocab_size)
    expected = generated(reference, requests)
    prompts = [list(request.prompt_token_ids) for request in requests]
    assert greedy(folder, prompts, **placement) == [expected.tokens[request.index] for request in requests]


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_plans_count_what_a_conversion_writes(tmp_path: Path, model_type: str, weight_format: str) -> None:
    _, files = made(tmp_path / "in", model_type, torch.bfloat16, hidden_size=64, intermediate_size=128, moe_intermediate_size=64)
    convert(files, tmp_path / "out", QuantizeSettings(weight_format=weight_format), num_threads=1)
    config = read_config(resolve_model(tmp_path / "out"))
    written = describe_headers(Checkpoint(tmp_path / "out"), config, torch.bfloat16, name=str(files.folder))
    planned = spec_of(str(files.folder), EngineOptions(dtype="bfloat16", weight_format=weight_format), device="cpu")
    assert planned == written


def test_models_of_the_catalogue_are_planned_in_four_bits() -> None:
    plain, four = described("opt-125m"), described("opt-125m", torch.float16, weight_format="int4")
    streamed = [sum(unit.disk_bytes for unit in spec.units if not unit.head) for spec in (plain, four)]
    assert 4.5 / 16 < streamed[1] / streamed[0] < 4.9 / 16
    assert four.number_format != plain.number_format


def test_an_engine_option_converts_once_and_runs(tmp_path: Path, novels_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.session.prepare.cached_machine", lambda *_, **__: machine_of())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = []
    for _ in range(2):
        with LLM(novels_opt, weight_format="int4", dtype="float32", host_mem="2GiB") as llm:
            assert llm.files.name == str(novels_opt)
            texts.append(llm.generate(["The old house stood"], SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
    assert len(list((tmp_path / "flexgen" / "weights").iterdir())) == 1
