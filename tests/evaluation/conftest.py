"""The bundled models in float32, each with transformers' own model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation.oracle import Oracle, Subject

from flexgen import LLM


@pytest.fixture(scope="session", params=["opt", "qwen3"])
def subject(request: pytest.FixtureRequest, novels_opt: Path, novels_qwen3: Path) -> Iterator[Subject]:
    from transformers import AutoModelForCausalLM

    folder = novels_opt if request.param == "opt" else novels_qwen3
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with LLM(folder, dtype="float32") as llm:
        yield Subject(llm, Oracle(model))
