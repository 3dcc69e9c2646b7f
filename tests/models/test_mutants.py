"""Configs with one wrong value: the model is described as before, or refused with a ModelError; never a bug, never more memory."""

from __future__ import annotations

import contextlib
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.errors import CapacityError, ModelError
from flexgen.hub.resolve import resolve_model
from flexgen.options import EngineOptions
from flexgen.session.model import ResolvedModel
from tests.models.tiny_configs import tiny_config

FAMILIES = ("llama", "opt", "qwen3_moe", "phi3", "deepseek_v3")
VALUES = (0, -1, 3, 10**9, 2**70, 1.5, "x", True, None, [1], {"a": 1})
NUM_MUTANTS = 10
OPTIONS = EngineOptions(dtype="float32", device="cpu")
MEMORY_KIB = 400 << 10


def check(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    ResolvedModel(resolve_model(folder), OPTIONS).check()


def written(folder: Path, model_type: str) -> dict[str, Any]:
    write_random_checkpoint(tiny_config(model_type), folder, torch.float32)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sample_of_mutants(model_type: str, tmp_path: Path) -> None:
    """The same sample at every run."""
    config = written(tmp_path, model_type)
    check(tmp_path, config)
    mutants = random.Random(15).sample([(name, value) for name in config for value in VALUES], NUM_MUTANTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, value in mutants:
        with contextlib.suppress(ModelError, CapacityError):
            check(tmp_path, config | {name: value})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, written(folder, "llama")


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": 10**9}, "Padding_idx"),
        ({"hidden_act": "frobnicate"}, "frobnicate"),
        ({"num_key_value_heads": 3}, "shape"),
        ({"vocab_size": 129}, "shape"),
        ({"num_hidden_layers": 5}, "missing"),
        ({"num_hidden_layers": 1000}, "far more than the weights hold"),
        ({"hidden_size": 1 << 24, "num_attention_heads": 1 << 20}, "far more than the weights hold"),
        ({"rope_parameters": LONG_ROPE | {"short_factor": [1.0], "long_factor": [1.0]}}, "1 numbers in short_factor.*8 frequencies"),
        ({"rope_parameters": LONG_ROPE | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 3}}, "long_factor|frequencies"),
        ({"dtype": "frobnicate"}, "frobnicate"),
        ({"layer_types": ["frobnicate"] * 4}, "layer_types"),
        ({"quantization_config": {"a": 1}}, "unnamed method"),
    ],
    ids=str,
)  # fmt: skip
def test_why_a_mutant_is_refused(llama: tuple[Path, dict[str, Any]], change: dict[str, Any], message: str) -> None:
    folder, config = llama
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        ResolvedModel(resolve_model(folder), EngineOptions(device="cpu", dtype="auto" if "dtype" in change else "float32")).check()


def test_the_config_is_compared_with_the_headers_before_anything_large_is_made(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, config = llama
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change in ({"head_dim": 1 << 24}, {"vocab_size": 1 << 24}, {"intermediate_size": 1 << 24}, {"num_attention_heads": 1 << 22}):
        with pytest.raises(ModelError):
            check(folder, config | change)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB
