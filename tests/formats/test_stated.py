"""What is wrong in a quantization_config is named: its place, what was found, and what is needed.  Nothing wrong becomes another error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen.errors import CheckpointError, UnsupportedModelError
from flexgen.formats.stated import Stated
from flexgen.formats.table import COMMON_CONFIGS, quantization_of, stated_format
from flexgen.hub.config import read_config
from flexgen.hub.model_files import ModelFiles

GROUP = {
    "targets": ["Linear"], "format": "pack-quantized", "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "block_structure": [1, 2]},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": GROUP}, "ignore": ["lm_head"],
        "sparsity_config": {"format": "dense"}, "transform_config": {}, "kv_cache_scheme": None,
    },
    "gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False,
        "pack_dtype": "int32", "is_marlin_format": False, "modules_in_block_to_quantize": [["a"], ["b"]],
        "dynamic": {"+:a": {"bits": 8, "group_size": 32}, "-:b": {}},
    },
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "backend": "autoawq",
        "modules_to_not_convert": ["a"],
    },
    "auto-round": {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "data_type": "int",
        "extra_config": {"a": {"bits": 16}, "b": {"bits": 8, "group_size": 64}},
    },
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32], "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["a"], "expert_dtype": "fp8",
    },
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}},
        "exclude_modules": ["lm_head"],
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "flexgen-v0": {"quant_method": "flexgen-v0", "bits": 4, "group_size": 64, "ignore": ["lm_head"]},
    **{f"common {name}": dict(config) for name, config in COMMON_CONFIGS.items()},
}  # fmt: skip
WRONG = [5, -5, 4.5, True, "x", [], [5], ["x"], {}, {"x": 5}, {"x": {"x": 5}}, [[1]], None]


def changed(value: Any, wrong: object) -> Iterator[Any]:
    """The value with one key, of itself or of an object within it, that holds something else."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield {**value, key: wrong}
        yield {name: each for name, each in value.items() if name != key}
        for other in changed(inner, wrong):
            yield {**value, key: other}


@pytest.mark.parametrize("case", CONFIGS)
def test_nothing_wrong_becomes_another_error(case: str) -> None:
    assert stated_format({"quantization_config": CONFIGS[case]}) is not None
    said: list[str] = []
    for wrong in WRONG:
        for quantization in changed(copy.deepcopy(CONFIGS[case]), wrong):
            try:
                stated_format({"quantization_config": quantization})
            except UnsupportedModelError as error:
                said.append(str(error))
    assert len(said) > len(WRONG) // 2
    assert [each for each in said if "config.json" not in each and "the weights are quantized by" not in each] == []


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("compressed-tensors", {"ignore": 5}, "quantization_config.ignore must be a list of names, not 5"),
        ("compressed-tensors", {"config_groups": []}, "quantization_config.config_groups must be an object, not []"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {**GROUP, "weights": {"num_bits": "4"}}}},
            "quantization_config.config_groups.g.weights.num_bits must be a whole number, not the text '4'",
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {**GROUP, "weights": {"strategy": "block"}}}},
            "quantization_config.config_groups.g.weights.block_structure is missing; it must be rows and columns, both above 0",
        ),
        ("compressed-tensors", {"sparsity_config": "dense"}, "quantization_config.sparsity_config must be an object, not the text 'dense'"),
        ("gptq", {"group_size": -5}, "quantization_config.group_size must be a whole number, above 0 or -1, not -5"),
        ("gptq", {"desc_act": 1}, "quantization_config.desc_act must be true or false, not 1"),
        ("gptq", {"dynamic": {"+:a": 4}}, "quantization_config.dynamic.+:a must be an object, not 4"),
        ("awq", {"group_size": True}, "quantization_config.group_size must be a whole number, above 0 or -1, not true"),
        ("awq", {"modules_to_not_convert": "a"}, "quantization_config.modules_to_not_convert must be a list of names, not the text 'a'"),
        ("fp8", {"weight_block_size": [128]}, "quantization_config.weight_block_size must be rows and columns, both above 0, not [128]"),
        ("fp8", {"quant_method": 8}, "quantization_config.quant_method must be a text, not 8"),
        ("flexgen-v0", {"bits": None}, "quantization_config.bits is missing; it must be 4 in flexgen-v0"),
        ("bitsandbytes", {"load_in_4bit": "yes"}, "quantization_config.load_in_4bit must be true or false, not the text 'yes'"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_named(case: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        stated_format({"quantization_config": CONFIGS[case] | change})
    assert str(caught.value) == f"config.json: {said}"


@pytest.mark.parametrize("value", [[], ["gptq"], "gptq", 4, True], ids=str)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_description_that_is_no_object(key: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: {key} must be an object"):
        quantization_of({"model_type": "llama", key: value})
    for config in ({"model_type": "llama", key: value}, {"model_type": "llama", "text_config": {key: value}}):
        files = ModelFiles(name="m", folder=Path("m"), config=config, generation_config={}, commit=None, has_tokenizer=False)
        with pytest.raises(CheckpointError, match=rf"m: config\.json has .*{key} .*; it should be an object"):
            read_config(files)


def test_null_is_as_good_as_a_missing_key() -> None:
    stated = Stated({"bits": None, "names": None, "flag": None, "inner": None})
    assert stated.whole("bits", 4) == 4
    assert (stated.names("names"), stated.flag("flag", True), stated.inner("inner"), list(stated.objects("inner"))) == ((), True, None, [])
    assert stated_format({"quantization_config": {}}) is None
