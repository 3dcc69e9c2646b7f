"""The shipped models: their sizes are the published ones, and the files are what the command would write today."""

from __future__ import annotations

import dataclasses

import pytest

from flexgen.errors import OptionError
from flexgen.formats.table import runs
from flexgen.plan.known.models import catalogue_fields, catalogue_name, catalogue_names, catalogue_spec
from flexgen.session.shipped import described

# Parameters, to the last, as the hub counts what the files hold; DeepSeek-V3's without the layer that only predicts ahead, and
# OPT-175B's as they follow from table 1 of its paper.
PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
}
# Billions of parameters that a token meets, as published (rounded), and those of the input embedding among them.
ACTIVE = {
    "mixtral-8x7b": (12.9, 0.13),
    "mixtral-8x22b": (39, 0.20),
    "qwen3-30b-a3b": (3.3, 0.31),
    "qwen3-235b-a22b": (22, 0.62),
    "gpt-oss-20b": (3.6, 0),  # published without
    "gpt-oss-120b": (5.1, 0),
    "deepseek-v3": (37, 0.93),
}
# total_size in model.safetensors.index.json.
FILE_BYTES = {
    "llama-3-8b": 16_060_522_496,
    "llama-3-70b": 141_107_412_992,
    "mixtral-8x7b": 93_405_585_408,
    "mixtral-8x22b": 281_241_268_224,
    "llama-3.1-70b": 141_107_412_992,
    "llama-3.2-3b": 6_425_499_648,
    "qwen3-8b": 16_381_470_720,
    "qwen3-14b": 29_536_614_400,
    "qwen3-32b": 65_524_246_528,
    "qwen3-30b-a3b": 61_064_245_248,
    "qwen3-235b-a22b": 470_187_269_120,
    "gpt-oss-20b": 13_761_264_768,
    "gpt-oss-120b": 65_248_815_744,
}


def test_the_files_are_those_of_the_entries() -> None:
    assert catalogue_names() == sorted(PARAMETERS)
    assert all(catalogue_spec(name).name == catalogue_fields(name)["source"] for name in catalogue_names())


def test_models_are_known_by_name_and_by_hub_id_in_any_case() -> None:
    for name, source in ((name, catalogue_fields(name)["source"]) for name in catalogue_names()):
        assert catalogue_name(name) == catalogue_name(name.upper()) == name
        if "/" in source:
            assert catalogue_name(source) == catalogue_name(source.upper()) == name
    assert catalogue_name("Meta-Llama/Meta-Llama-3-8B-Instruct") == "llama-3-8b"
    assert [catalogue_name(other) for other in ("facebook/opt-31b", "opt", "", "elsewhere/opt-30b", "../opt-30b")] == [None] * 5


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    """Nothing is missing and nothing is counted twice; each tensor is padded by less than 256 bytes."""
    spec = catalogue_spec(name)
    placed_bytes = spec.decoded_bytes + spec.resident_bytes + spec.embedding_bytes
    assert 0 <= placed_bytes / 2 / PARAMETERS[name] - 1 < 1e-6


@pytest.mark.parametrize("name", FILE_BYTES)
def test_file_sizes(name: str) -> None:
    """What a pass reads, with whole 4 KiB pages and small gaps between, is what the files hold."""
    spec = catalogue_spec(name)
    read_bytes = spec.streamed_bytes + spec.resident_bytes + spec.embedding_bytes
    assert 0 <= read_bytes / FILE_BYTES[name] - 1 < 5e-4


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_the_chosen_experts_only(name: str) -> None:
    spec = catalogue_spec(name)
    active = (spec.flops_per_token + spec.head_flops_per_token) / 2 / 1e9
    published, embedding = ACTIVE[name]
    assert active + embedding == pytest.approx(published, rel=0.02)


def test_number_formats() -> None:
    formats = {name: catalogue_spec(name).number_format for name in catalogue_names()}
    low_bit = {"gpt-oss-20b": "mxfp4", "gpt-oss-120b": "mxfp4", "deepseek-v3": "fp8_block"}
    assert formats == {name: low_bit.get(name, "float16" if name.startswith("opt") else "bfloat16") for name in formats}
    for name, number_format in formats.items():
        spec = catalogue_spec(name)
        assert runs(number_format)
        assert spec.dtype == ("bfloat16" if name in low_bit else number_format)
        experts = [unit for unit in spec.units if "experts" in unit.name and unit.decoded_bytes > 1 << 20]
        if name in low_bit:
            assert experts
            assert all(not unit.plain and unit.encoded_bytes is not None for unit in experts)
            assert all(unit.encoded_bytes < 0.52 * unit.decoded_bytes for unit in experts if unit.encoded_bytes is not None)


def test_kv_of_a_token() -> None:
    """Two heads' worth of numbers per key head and layer; DeepSeek's latents (arXiv:2412.19437, section 2.1.1)."""
    expected = {"opt-175b": 2 * 12288 * 96 * 2, "llama-3-70b": 2 * 8 * 128 * 80 * 2, "deepseek-v3": (512 + 64) * 61 * 2}
    assert {name: catalogue_spec(name).kv_bytes_per_token for name in expected} == expected
    windows = {group.window: group.num_layers for group in catalogue_spec("gpt-oss-120b").kv_groups}
    assert windows == {128: 18, None: 18}


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "llama-3-8b", "gpt-oss-20b", "qwen3-30b-a3b", "qwen3-32b", "llama-3.2-3b"])
def test_the_command_would_write_the_same(name: str) -> None:
    """But for how many operations another release of transformers takes, and for which layers a group has."""
    written, shipped = described(name), catalogue_spec(name)
    layers = sorted(layer for group in written.kv_groups for layer in group.layers)
    assert layers == list(range(sum(group.num_layers for group in shipped.kv_groups)))
    written = dataclasses.replace(written, kv_groups=tuple(dataclasses.replace(group, layers=()) for group in written.kv_groups))
    assert written.operations == pytest.approx(shipped.operations, rel=0.15)
    assert dataclasses.replace(written, operations=shipped.operations) == shipped


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'lama-3-8b' is not in the catalogue; known: llama-3-8b, .*opt-66b") as caught:
        catalogue_spec("lama-3-8b")
    assert all(str(caught.value).count(f" {name}") == 1 for name in ("deepseek-v3", "llama-3-8b", "gpt-oss-20b"))
