"""Random weights: only what stays on disk is written, and where weights live changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen import LLM, SamplingParams
from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.errors import CapacityError
from flexgen.session import random_weights
from tests.models.tiny_configs import tiny_config

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PLACEMENTS: list[dict[str, Any]] = [
    {"device": "cpu", "weights": "host=1"},
    {"device": "cpu", "weights": "host=.5,disk=.5"},
    {"device": "cpu", "weights": "disk=1"},
    {"device": "sim", "weights": "device=.3,host=.4,disk=.3", "device_mem": "64MiB"},
]


def folder_of(model_type: str, tmp_path: Path) -> Path:
    """A checkpoint of random weights, all of them written."""
    config = tiny_config(model_type)
    if model_type == "gpt_oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    write_random_checkpoint(config, tmp_path / "model", torch.float32)
    return tmp_path / "model"


def answers(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    with LLM(folder, dtype="float32", skip_tokenizer_init=True, **options) as llm:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture
def offload(tmp_path: Path) -> Path:
    (tmp_path / "offload").mkdir()
    return tmp_path / "offload"


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda each: f"{each['device']} {each['weights']}")
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_the_same_answers_as_with_all_of_them_written(model_type: str, placement: dict[str, Any], offload: Path, tmp_path: Path) -> None:
    folder = folder_of(model_type, tmp_path)
    wanted = answers(folder, **placement)
    assert answers(folder, load_format="dummy", offload_dir=str(offload), **placement) == wanted
    assert not [*offload.iterdir()], "the files go with the run"


@pytest.mark.parametrize(("weights", "share"), [("host=1", 0.0), ("host=.5,disk=.5", 0.5), ("disk=1", 1.0)])
def test_what_lives_in_memory_is_not_written(weights: str, share: float, offload: Path, tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=1024)
    config.save_pretrained(tmp_path / "model")
    with LLM(tmp_path / "model", dtype="float32", device="cpu", weights=weights, load_format="dummy", offload_dir=str(offload)) as llm:
        llm.generate(PROMPTS, GREEDY)
        files = [*offload.glob("*/*.safetensors")]
        total, written = sum(path.stat().st_size for path in files), sum(512 * path.stat().st_blocks for path in files)
    assert total > 10_000_000
    assert share - 0.15 < written / total < share + 0.15


def test_disk_space_counts_for_what_is_written(offload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama", tmp_path)
    options: dict[str, Any] = {"device": "cpu", "load_format": "dummy", "offload_dir": str(offload), "disk": "0"}
    assert answers(folder, weights="host=1", **options)
    with pytest.raises(CapacityError, match=r"random weights take .* of disk, 0 B are granted: raise disk=, or place them in memory"):
        answers(folder, weights="disk=1", **options)
    assert not [*offload.iterdir()]


def test_a_plan_writes_nothing(offload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexgen.plan.workload import Workload

    monkeypatch.setattr(random_weights.RandomWeights, "write", lambda *_: pytest.fail("a plan needs no numbers"))
    options: dict[str, Any] = {"device": "cpu", "weights": "disk=1", "load_format": "dummy", "offload_dir": str(offload)}
    with LLM(folder_of("llama", tmp_path), dtype="float32", **options) as llm:
        assert llm.plan(Workload(prompt_lens=(5,), output_lens=(3,))).policy.weights.disk == 1
    assert not [*offload.iterdir()]
