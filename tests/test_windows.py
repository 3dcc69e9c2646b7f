"""Models whose layers see only so far back, planned and run without any pin: prompts far longer than the window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

from flexgen import LLM, SamplingParams


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3_text"])
def test_prompts_longer_than_the_window(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, max_position_embeddings=2048)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    prompts = [torch.randint(3, config.vocab_size, (length,)).tolist() for length in (600, 40)]
    with LLM(tmp_path, dtype="float32") as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        wanted = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert list(output.outputs[0].token_ids) == wanted[0, len(prompt) :].tolist()
