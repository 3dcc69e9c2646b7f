"""The headers of files that nobody has written are those that `save_pretrained` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from flexgen.checkpoint.files import Checkpoint
from flexgen.checkpoint.repository import headers_of, meta_model, saved_tensors, sharded
from flexgen.formats.base import NamedTensor, StoredTensor
from tests.models.tiny_configs import tiny_config


def relative(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: replace(tensor, path=Path(tensor.path.name)) for name, tensor in tensors.items()}


# Where experts are fused in memory, save_pretrained counts the fused tensor's bytes for the first of them; it matters to shards only.
@pytest.mark.parametrize(
    ("model_type", "shard_bytes"),
    [(each, 60_000) for each in ("llama", "opt", "gpt2", "gpt_oss", "gemma3_text")]
    + [(each, 10**9) for each in ("llama", "opt", "gpt2", "gpt_oss", "gemma3_text", "mixtral", "deepseek_v3", "qwen3_moe")],
)
def test_as_save_pretrained_writes(model_type: str, shard_bytes: int, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size=shard_bytes)
    files = sharded(saved_tensors(meta_model(config, torch.bfloat16), torch.bfloat16), shard_bytes)
    assert relative(headers_of("org/model", files).tensors) == relative(Checkpoint(tmp_path).tensors)


def test_large_numbers_come_first(tmp_path: Path) -> None:
    """A file of several dtypes, as low-bit formats have it."""
    dtypes = {"b.weight": torch.float8_e4m3fn, "b.scale": torch.float32, "a.norm": torch.bfloat16, "a.weight": torch.float8_e4m3fn}
    save_file({name: torch.zeros(3, 5).to(dtype) for name, dtype in dtypes.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    files = sharded((NamedTensor(name, (3, 5), dtype) for name, dtype in dtypes.items()), 10**9)
    assert relative(headers_of("org/model", files).tensors) == relative(Checkpoint(tmp_path).tensors)
