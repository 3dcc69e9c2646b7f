"""Stored bytes become the parameters that transformers' own `from_pretrained` makes of them, bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter

from flexgen.checkpoint import parameters as checkpoint_module
from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.parameters import ModelSources, parameter_sources
from flexgen.checkpoint.sources import ParameterSource
from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.plain import CAST_ELEMENTS, cast_into
from flexgen.formats.table import check_supported_number_format
from flexgen.hub.model_files import SINGLE_FILE
from tests.models.tiny_configs import CAUSAL_TYPES, tiny_config

FAMILIES = (
    "llama", "opt", "gpt2", "gpt_neox", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma3_text", "phi3", "olmoe",
    "llama4_text", "glm4_moe", "phimoe", "granitemoe", "hunyuan_v1_moe", "minimax", "ernie4_5_moe", "hrm_text", "inkling2_text",
)  # fmt: skip

NOT_COMPARABLE = {
    "emu3": "the config that its text model saves is not one that AutoModelForCausalLM loads",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "is built for the cache of another model",
    "mllama": "the config that its text model saves is not one that AutoModelForCausalLM loads",
    "youtu": "from_pretrained zeroes the embedding's padding row after loading it (its _init_weights ignores what is loaded)",
    "zaya": "from_pretrained sets the last balancing bias to -1 after loading it (its _init_weights ignores what is loaded)",
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Every number that is stored is random: norms, biases and buffers too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    return model


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def saved(folder: Path, model_type: str, *, shards: str = "1GB", **changes: object) -> PreTrainedConfig:
    """A random model in the files that its repository would have (`save_pretrained` inverts the conversions)."""
    model = random_model(tiny_config(model_type, **changes))
    model.save_pretrained(folder, max_shard_size=shards)
    return AutoConfig.from_pretrained(folder)


def sources_of(folder: Path, config: PreTrainedConfig) -> ModelSources:
    return parameter_sources(skeleton(config), Checkpoint(folder))


def read(source: ParameterSource, like: Tensor) -> Tensor:
    """The assembled parameter, in memory that held something else before."""
    out = torch.full(source.shape, 77, dtype=like.dtype)
    source.read(out)
    return out


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(CAUSAL_TYPES) - set(FAMILIES)))
def test_every_type_is_equal_to_from_pretrained(model_type: str, tmp_path: Path) -> None:
    if model_type in NOT_COMPARABLE:
        pytest.skip(NOT_COMPARABLE[model_type])
    test_equal_to_from_pretrained(model_type, tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equal_to_from_pretrained(model_type: str, tmp_path: Path) -> None:
    config = saved(tmp_path, model_type, shards="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    found = sources_of(tmp_path, config)
    assert found.parameters.keys() | found.tied.keys() == expected.keys()
    assert not found.parameters.keys() & found.tied.keys()
    assert (found.initialized, found.unexpected) == ((), ())
    for name, source in found.parameters.items():
        assert source.name == name
        assert torch.equal(read(source, expected[name]), expected[name]), name
        check_rows(source, expected[name])
    for name, other in found.tied.items():
        assert torch.equal(expected[name], expected[other])


def check_rows(source: ParameterSource, expected: Tensor) -> None:
    assert source.convert is None, "this architecture needs no computing"
    assert source.sliceable == bool(source.shape)
    if not source.sliceable:
        return
    count = source.shape[0]
    cuts = sorted({0, count // 3, count // 2, count})
    parts = [source.rows(start, stop) for start, stop in pairwise(cuts)]
    for part, start in zip(parts, cuts, strict=False):
        assert torch.equal(read(part, expected), expected[start : start + part.shape[0]])
    assert sum(part.nbytes for part in parts) <= source.nbytes, "rows read more than their own bytes"
    inner = source.rows(1, count).rows(0, count - 1)
    assert torch.equal(read(inner, expected), expected[1:])
    assert source.rows(1, 1).pieces == ()
    for start, stop in ((-1, 1), (1, 0), (0, count + 1)):
        with pytest.raises(ValueError, match="no part"):
            source.rows(start, stop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_as_transformers_does(dtype: torch.dtype, tmp_path: Path) -> None:
    config = saved(tmp_path, "qwen3_moe")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, source in sources_of(tmp_path, config).parameters.items():
        assert source.dtype == torch.float32
        assert torch.equal(read(source, expected[name]), expected[name])


@pytest.mark.parametrize("numel", [7, CAST_ELEMENTS, 2 * CAST_ELEMENTS + 5])
def test_every_float16_becomes_the_same_bfloat16(numel: int) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    numbers = every[torch.isfinite(every)].repeat(numel // 60000 + 1)[:numel].clone()
    out = torch.empty(numel, dtype=torch.bfloat16)
    cast_into(out, numbers)
    assert torch.equal(out, numbers.to(torch.bfloat16))
    columns = torch.empty(numel, 2, dtype=torch.bfloat16)
    cast_into(columns[:, 1], numbers)
    assert torch.equal(columns[:, 1], out)


def test_plain_parameters_are_views_and_experts_are_placed(tmp_path: Path) -> None:
    config = saved(tmp_path, "mixtral", num_local_experts=4, num_hidden_layers=1)
    found = sources_of(tmp_path, config).parameters
    assert {name for name, source in found.items() if not source.is_view} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    both = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert both.nbytes == sum(piece.nbytes for piece in both.pieces) == torch.Size(both.shape).numel() * 4
    assert all(piece.is_contiguous for piece in both.pieces)
    assert {piece.tensor.name for piece in both.rows(1, 3).pieces} == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{half}.weight" for expert in (1, 2) for half in ("w1", "w3")
    }


@pytest.mark.parametrize("model_type", ["mixtral", "inkling2_text", "hrm_text"])
def test_assembles_from_the_middle_of_a_buffer_into_the_middle_of_another(model_type: str, tmp_path: Path) -> None:
    """As the engine does: bytes read in one go with their neighbours, parameters that are part of something larger."""
    found = sources_of(tmp_path, saved(tmp_path, model_type)).parameters
    data = torch.frombuffer(bytearray((tmp_path / SINGLE_FILE).read_bytes()), dtype=torch.uint8)
    for source in found.values():
        raws = [data[piece.offset : piece.offset + piece.nbytes].view(piece.dtype) for piece in source.pieces]
        large = torch.full((*source.shape, 2), 77.0)
        source.assemble(raws, large[..., 1])
        assert torch.equal(large[..., 1], read(source, large))
        assert (large[..., 0] == 77).all()


def test_assemble_checks_what_it_is_given(tmp_path: Path) -> None:
    source = sources_of(tmp_path, saved(tmp_path, "llama")).parameters["model.norm.weight"]
    raw = torch.zeros(source.shape)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        source.assemble([raw], torch.empty(source.shape[0] + 1))
    with pytest.raises(ValueError, match="expected"):
        source.assemble([raw.bfloat16()], torch.empty(source.shape))
    with pytest.raises(ValueError, match="expected"):
        source.assemble([raw[1:]], torch.empty(source.shape))
    with pytest.raises(ValueError, match="made of 1 ranges"):
        source.assemble([], torch.empty(source.shape))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama")
    source = sources_of(tmp_path, config).parameters["model.norm.weight"]
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="ends before"):
        source.read(torch.empty(source.shape))
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read(torch.empty(source.shape))


# ------------------------------------------------------------------------------------------------ names


def test_files_of_the_base_model(tmp_path: Path) -> None:
    """GPT-2's own repository: no `transformer.` before the names, and no head."""
    model = random_model(tiny_config("gpt2", tie_word_embeddings=True))
    model.transformer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    found = sources_of(tmp_path, model.config)
    assert found.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert found.parameters["transformer.wte.weight"].pieces[0].tensor.name == "wte.weight"
    assert torch.equal(read(found.parameters["transformer.wte.weight"], model.lm_head.weight), model.lm_head.weight)


def test_tied_parameters_are_reported_once(tmp_path: Path) -> None:
    found = sources_of(tmp_path, saved(tmp_path, "llama", tie_word_embeddings=True))
    assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in found.parameters


def test_tied_parameters_stored_under_the_other_name(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    found = sources_of(tmp_path, config)
    assert found.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert "model.embed_tokens.weight" not in found.parameters


def test_equal_copies_of_a_tied_parameter_are_one(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert sources_of(tmp_path, config).tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_different_copies_of_a_tied_parameter_are_both_used(dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = saved(tmp_path, "llama", tie_word_embeddings=True)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype) + 1}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    found = sources_of(tmp_path, config)
    assert found.tied == {}
    assert "different weights are stored" in caplog.text
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(read(found.parameters[name], expected[name]), expected[name])


def test_unused_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = saved(tmp_path, "llama")
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(1), "vision.rotary_emb.inv_freq": torch.zeros(1)}))
    with caplog.at_level(logging.WARNING):
        found = sources_of(tmp_path, config)
    assert found.unexpected == ("model.layers.0.extra",)  # transformers knows that old files have the frequencies
    assert "1 tensor is not used: model.layers.0.extra" in caplog.text


def test_what_a_model_class_may_lack(tmp_path: Path) -> None:
    config = saved(tmp_path, "axk1")

    def without_bias(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            del tensors[name]

    edit(tmp_path, without_bias)
    found = sources_of(tmp_path, config)
    assert found.initialized
    assert all(name.endswith("e_score_correction_bias") and name not in found.parameters for name in found.initialized)


# ----------------------------------------------------------------------------------------------- errors


def test_missing_parameters_are_named(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama")
    edit(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    with pytest.raises(CheckpointError, match=r"9 parameters of LlamaForCausalLM are missing: model\.layers\.1\..*and 6 more"):
        sources_of(tmp_path, config)


def test_shapes_that_disagree_with_the_config_are_named(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama")
    config.intermediate_size //= 2
    with pytest.raises(CheckpointError, match=r"12 parameters.*layers\.0\.mlp\.down_proj\.weight is \(64, 96\), expected \(64, 48\)"):
        sources_of(tmp_path, config)


def test_another_model(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"none of the .* tensors belongs to a LlamaForCausalLM"):
        sources_of(tmp_path, tiny_config("llama"))


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    config = saved(tmp_path, "mixtral", num_local_experts=4)
    expert = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    edit(tmp_path, lambda tensors: tensors.update({expert.format(4): tensors.pop(expert.format(1))}))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: some of .* are missing"):
        sources_of(tmp_path, config)
    edit(tmp_path, lambda tensors: tensors.update({expert.format(1): tensors.pop(expert.format(4)).T.contiguous()}))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj cannot be made of"):
        sources_of(tmp_path, config)
    edit(tmp_path, lambda tensors: tensors.pop(expert.format(3)))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        sources_of(tmp_path, config)


def test_a_parameter_stored_twice(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama")
    edit(tmp_path, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight, norm\.weight would all become model\.norm\.weight"):
        sources_of(tmp_path, config)


def test_experts_stored_whole_and_in_parts(tmp_path: Path) -> None:
    config = saved(tmp_path, "mixtral")
    whole = {"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 64, 96)}
    edit(tmp_path, lambda tensors: tensors.update(whole))
    with pytest.raises(CheckpointError, match=r"down_proj is stored both whole and in parts"):
        sources_of(tmp_path, config)


# -------------------------------------------------------------------------------------------- fallback


class Doubled(ConversionOps):
    """Computes with the numbers, so it cannot be traced."""

    def convert(self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: object) -> dict:
        return {target_patterns[0]: input_dict[source_patterns[0]][0] * 3}


def test_conversions_that_compute_are_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = saved(tmp_path, "llama", num_hidden_layers=1)
    added = [
        WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [Doubled()]),
        WeightConverter(["mlp.up_a.weight", "mlp.up_b.weight"], "mlp.up_proj.weight", [Concatenate(0)]),
    ]
    monkeypatch.setattr(checkpoint_module, "get_model_conversion_mapping", lambda model: [*get_model_conversion_mapping(model), *added])
    before = load_file(tmp_path / SINGLE_FILE)
    name = "model.layers.0.mlp.up_{}.weight"

    def halved(tensors: dict[str, Tensor]) -> None:
        whole = tensors.pop(name.format("proj"))
        tensors[name.format("a")] = whole[:40].clone()
        tensors[name.format("b")] = whole[40:].bfloat16()  # torch casts when it concatenates: that is computing

    edit(tmp_path, halved)
    found = sources_of(tmp_path, config).parameters

    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert query.convert is not None
    assert not query.is_view
    assert not query.sliceable
    with pytest.raises(ValueError, match="cannot be read in parts"):
        query.rows(0, 1)
    stored = before["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(read(query, stored), stored * 3)
    assert torch.equal(read(query, stored.bfloat16()), stored.bfloat16() * 3)

    up = found[name.format("proj")]
    assert up.convert is not None
    stored = before[name.format("proj")]
    assert torch.equal(read(up, stored), torch.cat([stored[:40], stored[40:].bfloat16().float()]))


# ---------------------------------------------------------------------------------------- number formats


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "quanto"}},
        {"text_config": {"quantization_config": {"quant_method": "quanto"}}},
        {"compression_config": {"quant_method": "quanto"}},
    ],
)
def test_quantized_weights_are_refused_by_name(config: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModelError, match="quanto"):
        check_supported_number_format(config)
    loaded = tiny_config("llama")
    loaded.quantization_config = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    with pytest.raises(UnsupportedModelError, match="awq"):
        check_supported_number_format(loaded)
    with pytest.raises(UnsupportedModelError, match="unnamed"):
        check_supported_number_format({"quantization_config": {"bits": 4}})


def test_plain_weights_are_not_refused() -> None:
    check_supported_number_format(tiny_config("llama"))
    check_supported_number_format(json.loads(tiny_config("gemma3").to_json_string()))
    check_supported_number_format({"quantization_config": None})
