"""Scoring keeps within its budget with a large vocabulary, whose logits are never held for all positions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen.base.quantities import MIB
from flexgen.checkpoint.dummy import write_random_checkpoint

VOCAB, PROMPTS, PROMPT_TOKENS = 1 << 18, 10, 129
# Beside the process, whose size depends on the processor and on whether kernels had to be compiled.
ROOM = 320 * MIB
# In a process of its own, because what this one had at its peak is never forgotten; the machine is not measured.
PROGRAM = """
import json, sys
import psutil, torch
from machines import machine_of
from flexgen import LLM, SamplingParams
from flexgen.kv.low_bit import kv_format
from flexgen.session import prepare

machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
prepare.cached_machine = lambda *_, **__: machine
folder, vocab, prompts, tokens, room = sys.argv[1], *map(int, sys.argv[2:])
prepare.load_kernels(torch.float32, kv_format("auto", torch.float32))
budget = psutil.Process().memory_info().rss + room
asked = [[(7 * place + 31 * token) % vocab for token in range(tokens)] for place in range(prompts)]
with LLM(folder, dtype="float32", device="cpu", host_mem=budget) as llm:
    outputs = llm.generate(asked, SamplingParams(prompt_logprobs=2, max_tokens=0))
    report = llm.report()
print(json.dumps({
    "scored": [len(output.prompt_logprobs) - 1 for output in outputs],
    "budget": budget, "peak_bytes": report.peak_host_bytes, "tokens": report.scored_tokens, "ideal_seconds": report.ideal_seconds,
}))
"""


def test_a_large_vocabulary_keeps_within_the_budget(tmp_path: Path) -> None:
    """The logits of all positions are 1.25 GiB in float32, those of a micro-batch 512 MiB."""
    from transformers import LlamaConfig

    torch = pytest.importorskip("torch")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write_random_checkpoint(config, tmp_path / "model", torch.float32)
    sizes = [str(each) for each in (VOCAB, PROMPTS, PROMPT_TOKENS, ROOM)]
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{PROGRAM}", str(tmp_path / "model"), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["scored"] == [PROMPT_TOKENS - 1] * PROMPTS
    assert told["tokens"] == PROMPTS * (PROMPT_TOKENS - 1)
    assert told["peak_bytes"] <= told["budget"]
    assert told["ideal_seconds"] > 0
