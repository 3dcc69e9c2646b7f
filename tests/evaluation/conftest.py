"""The bundled models in float32, each with transformers' own model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.oracle import Oracle, Subject

from flexgen import LLM
from flexgen.plan.workload import Workload
from flexgen.session.served import ServedModel


@pytest.fixture(scope="module", params=["opt", "qwen3"])
def subject(request: pytest.FixtureRequest, novels_opt: Path, novels_qwen3: Path) -> Iterator[Subject]:
    from transformers import AutoModelForCausalLM

    folder = novels_opt if request.param == "opt" else novels_qwen3
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with LLM(folder, dtype="float32") as llm:
        yield Subject(llm, Oracle(model))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of requests of every job that the engine is handed from here on."""
    counts: list[int] = []
    real = ServedModel.stream

    def counted(self: ServedModel, requests: Any, workload: Workload, **how: Any) -> Any:
        counts.append(len(workload))
        return real(self, requests, workload, **how)

    monkeypatch.setattr(ServedModel, "stream", counted)
    return counts
