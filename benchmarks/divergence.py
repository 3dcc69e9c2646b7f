"""bfloat16 at a real shape: where greedy answers first differ from transformers' `generate`, was the choice a close call?

    python benchmarks/divergence.py --scratch DIR [--shape llama-3b]

Matrix products in bfloat16 depend on the number of rows, so answers may differ between batch sizes.  What must hold: every first
difference lies at a position where the two largest logits are closer than MARGIN, and teacher-forced logits agree within it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from record import Results
from shapes import SHAPES
from transformers import AutoModelForCausalLM

from flexgen import LLM, SamplingParams
from flexgen.checkpoint.dummy import write_random_checkpoint

MARGIN = 2.0**-4  # of the largest logit's magnitude: 16 steps of bfloat16's 8-bit significand
POLICIES: tuple[dict[str, Any], ...] = (
    {"weights": "host=1", "micro_batch_tokens": 512, "schedule": "diagonal"},
    {"weights": "host=.2,disk=.8", "micro_batch_tokens": 48, "schedule": "diagonal"},
    {"weights": "disk=1", "micro_batch_tokens": 256, "schedule": "zigzag"},
    {"weights": "host=.5,disk=.5", "kv": "disk=1", "micro_batch_tokens": 128, "schedule": "diagonal"},
)
DEFAULT_RESULTS = Path(__file__).parent / "results" / "divergence.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3b", choices=sorted(SHAPES))
    parser.add_argument("--num-requests", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    args = parser.parse_args()
    folder = args.scratch / args.shape
    if not (folder / "config.json").exists():
        write_random_checkpoint(SHAPES[args.shape].hf_config(), folder, torch.bfloat16)
    rng = random.Random(0)
    prompts = [[rng.randint(10, 30000) for _ in range(rng.randint(20, 90))] for _ in range(args.num_requests)]
    wanted, margins = reference(folder, prompts, args.output_tokens)
    results, bad = Results(args.results), 0
    for policy in POLICIES:
        row = {"benchmark": "divergence", "shape": args.shape, "policy": policy} | compare(folder, prompts, policy, wanted, margins)
        bad += row["above_margin"]
        print(json.dumps(results.append(row)))
    return 1 if bad else 0


def reference(folder: Path, prompts: list[list[int]], output_tokens: int) -> tuple[list[list[int]], list[list[float]]]:
    """(greedy tokens, relative margin between the two largest logits at each of them) of transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens, margins = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_tokens, min_new_tokens=output_tokens,
            do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        top = [logits[0].float().topk(2).values for logits in out.logits]
        margins.append([float((pair[0] - pair[1]) / pair.abs().max()) for pair in top])
    return tokens, margins


def compare(
    folder: Path, prompts: list[list[int]], policy: dict[str, Any], wanted: list[list[int]], margins: list[list[float]]
) -> dict[str, Any]:
    """First differences of one policy's answers, and how close a call each was."""
    params = SamplingParams(temperature=0, max_tokens=len(wanted[0]), ignore_eos=True)
    with LLM(folder, dtype="bfloat16", host_mem="14GiB", **policy) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    firsts = []
    for output, expected, margin in zip(outputs, wanted, margins, strict=True):
        got = list(output.outputs[0].token_ids)
        position = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
        if position is not None:
            firsts.append(margin[position])
    return {
        "answers": len(prompts),
        "differing": len(firsts),
        "largest_margin": max(firsts, default=0.0),
        "above_margin": sum(margin > MARGIN for margin in firsts),
        "margin": MARGIN,
    }


if __name__ == "__main__":
    sys.exit(main())
