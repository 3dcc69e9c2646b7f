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


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3_text"])
def test_scores_beyond_the_window(model_type: str, tmp_path: Path) -> None:
    """Of prompts, in chunks, and of choices after prompts that begin alike."""
    config = tiny_config(model_type, max_position_embeddings=2048)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    reference.save_pretrained(tmp_path)
    beginning = torch.randint(3, config.vocab_size, (300,)).tolist()
    prompts = [[*beginning, 5], [*beginning, 6, 7], beginning[:40]]
    choices = [[9], [9, 8, 7], [8, 8]]
    with LLM(tmp_path, dtype="float32", micro_batch_tokens=64) as llm:
        scored = llm.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0))
        classified = llm.classify(prompts, choices)

    @torch.no_grad()
    def logprobs(ids: list[int]) -> list[float]:
        rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), dim=-1)
        return rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    for prompt, output, labels in zip(prompts, scored, classified, strict=True):
        steps = zip(prompt, output.prompt_logprobs or (), strict=True)
        assert [step[token_id].logprob for token_id, step in steps if step is not None] == pytest.approx(logprobs(prompt), abs=1e-3)
        wanted = [sum(logprobs([*prompt, *choice])[len(prompt) - 1 :]) for choice in choices]
        assert labels.outputs.logprobs == pytest.approx(wanted, abs=1e-3)
