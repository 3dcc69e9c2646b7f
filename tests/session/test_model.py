"""What a run finds out about its model, it finds out once."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_model_folder
from typer.testing import CliRunner

from flexgen import LLM, SamplingParams
from flexgen.cli import app
from flexgen.errors import ModelError
from flexgen.hub.resolve import resolve_model
from flexgen.models import assemble
from flexgen.options import EngineOptions
from flexgen.profile.limits import CardMemory, find_limits
from flexgen.session import model as session_model
from flexgen.session.dtypes import compute_dtype, config_dtype, has_bfloat16
from flexgen.session.model import ResolvedModel
from tests.models.tiny_configs import tiny_config

GREEDY = SamplingParams(temperature=0.0, max_tokens=2)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fact was found out."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, counted)

    count(session_model, "read_config")
    count(session_model, "find_limits")
    count(assemble, "assemble_model")
    return counts


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_job_finds_every_fact_once(found: Counter[str], novels_opt: Path, tmp_path: Path, more: list[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "It was", "max_tokens": 2}\n')
    done = CliRunner().invoke(app, ["run", str(novels_opt), str(source), "-o", str(tmp_path / "out.jsonl"), "--device", "cpu", *more])
    assert done.exit_code == 0, done.output
    assert found == {"read_config": 1, "find_limits": 1, "assemble_model": 1}


def test_a_call_finds_every_fact_once(found: Counter[str], novels_opt: Path) -> None:
    with LLM(novels_opt, device="cpu") as llm:
        llm.model.check()
        llm.generate(["It was"], GREEDY)
        llm.generate(["It was"], GREEDY)
    assert found == {"read_config": 1, "find_limits": 1, "assemble_model": 1}


def test_random_weights_are_described_where_they_are_written(found: Counter[str], novels_opt: Path) -> None:
    with LLM(novels_opt, device="cpu", load_format="dummy") as llm:
        llm.model.check()
        assert found["assemble_model"] == 0
        llm.generate(["It was"], GREEDY)
    assert found == {"read_config": 1, "find_limits": 1, "assemble_model": 1}


def test_a_description_has_one_owner(novels_opt: Path) -> None:
    model = ResolvedModel(resolve_model(novels_opt), EngineOptions(device="cpu"))
    model.check()
    first = weakref.ref(model.take(novels_opt).bound.model)
    gc.collect()
    assert first() is None, "what was handed over is still held"
    assert model.take(novels_opt) is not model.take(novels_opt)


def test_limits_are_found_again_for_the_next_engine(novels_opt: Path, found: Counter[str]) -> None:
    model = ResolvedModel(resolve_model(novels_opt), EngineOptions(device="cpu"))
    assert model.limits is model.limits
    model.take(novels_opt)
    assert model.limits.device == "cpu"
    assert found["find_limits"] == 2


@pytest.mark.parametrize(
    ("stored", "device", "computed"),
    [
        ("float16", "cpu", "bfloat16"), ("float16", "sim", "bfloat16"), ("float16", "cuda", "float16"), ("float32", "cpu", "float32"),
        ("bfloat16", "cuda", "bfloat16"), ("bfloat16", "cpu", "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_to_compute_in(stored: str, device: str, computed: str) -> None:
    config = tiny_config("llama")
    config.dtype = getattr(torch, stored)
    assert config_dtype(config) == stored
    assert compute_dtype(stored, device) == computed


@pytest.mark.parametrize(
    ("capability", "computed"), [((7, 5), "float16"), ((7, 0), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_a_gpu_without_bfloat16_computes_in_float16(
    novels_qwen3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], computed: str
) -> None:
    """And says so; what is asked for stays."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    card = CardMemory(free_bytes=14 << 30, total_bytes=16 << 30)
    monkeypatch.setattr(session_model, "find_limits", lambda options: find_limits(options, cuda_memory=lambda: card))
    model = ResolvedModel(resolve_model(novels_qwen3), EngineOptions(device="cuda"))
    model.config.dtype = torch.bfloat16
    assert model.dtype == model.dtype == computed
    warned = [record.message for record in caplog.records if "has no units for bfloat16" in record.message]
    assert len(warned) == (computed == "float16")
    assert ResolvedModel(resolve_model(novels_qwen3), EngineOptions(device="cuda", dtype="bfloat16")).dtype == "bfloat16"
    assert has_bfloat16("cuda") == (computed == "bfloat16")
    assert has_bfloat16("cpu")


def test_a_dtype_that_nothing_computes_in(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    with pytest.raises(ModelError, match=r"has dtype torch\.int8, which cannot be computed in: give another, such as dtype='float32'"):
        ResolvedModel(resolve_model(folder), EngineOptions(device="cpu")).check()
    ResolvedModel(resolve_model(folder), EngineOptions(device="cpu", dtype="float32"))
