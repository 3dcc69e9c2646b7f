"""What sparse attention does to answers: greedy answers with a share of the positions, beside those with all of them.

    python benchmarks/sparse_answers.py MODEL TEXT --shares 0.5 0.25 0.1 0.05

TEXT is cut into prompts of `--prompt-tokens` tokens, each of which is answered greedily in float32.  Perplexity of texts cannot see sparse
attention, because texts that are scored attend to everything.  So each answer is compared with the dense one, and scored by the
dense model itself, as alternatives to what it would have said:

    same         answers that are the dense ones to the last token
    agreement    tokens before the first that differs, as a share of all
    nll          the dense model's negative log likelihood per token of the sparse answers (of its own answers: the row with share 1)
    first nll    the same over each answer's first 16 tokens, which follow nearly the same text
    unread       the share of the values that were not read

One JSON line per share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import commit, versions

from flexgen import LLM, SamplingParams

FIRST = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--kv-format", default="auto")
    args = parser.parse_args()
    prompts = prompts_of(args)
    dense, _ = answers(args, prompts, 1.0)
    for share in [1.0, *args.shares]:
        found, report = (dense, None) if share == 1 else answers(args, prompts, share)
        row = {"model": args.model.name, "kv_format": args.kv_format, "share": share, "prompt_tokens": args.prompt_tokens}
        row |= {"answers": len(prompts)} | compared(args, prompts, dense, found) | unread(report)
        print(json.dumps(row | commit() | {"versions": versions()}), flush=True)
    return 0


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """Cut the text into prompts of equal length."""
    with LLM(str(args.model), dtype="float32") as llm:
        ids: list[int] = llm.get_tokenizer().encode(args.text.read_text(), add_special_tokens=False)  # longer than the context
    size = args.prompt_tokens
    prompts = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return prompts[: args.num_prompts]


def answers(args: argparse.Namespace, prompts: list[list[int]], share: float) -> tuple[list[list[int]], Any]:
    """Answer the prompts greedily."""
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    with LLM(str(args.model), dtype="float32", kv_format=args.kv_format, sparse_attention=share) as llm:
        found = llm.generate([{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found], llm.report()


def compared(args: argparse.Namespace, prompts: list[list[int]], dense: list[list[int]], sparse: list[list[int]]) -> dict[str, Any]:
    """Compare the answers, and score them with the dense model."""
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    with LLM(str(args.model), dtype="float32", kv_format=args.kv_format) as llm:
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, sparse, strict=True)]
        scored = llm.generate([{"prompt_token_ids": each} for each in whole], params, use_tqdm=False)
    logprobs: list[list[float]] = []
    for ids, each in zip(whole, scored, strict=True):
        entries = [entry or {} for entry in each.prompt_logprobs or []]
        logprobs.append([entries[place][ids[place]].logprob for place in range(args.prompt_tokens, len(ids))])
    alike = [
        next((i for i, pair in enumerate(zip(*pair_of, strict=True)) if pair[0] != pair[1]), args.max_tokens)
        for pair_of in zip(dense, sparse, strict=True)
    ]
    return {
        "same": sum(each == args.max_tokens for each in alike) / len(alike),
        "agreement": sum(alike) / (len(alike) * args.max_tokens),
        "nll": -sum(map(sum, logprobs)) / sum(map(len, logprobs)),
        "first_nll": -sum(sum(each[:FIRST]) for each in logprobs) / (FIRST * len(logprobs)),
    }


def unread(report: Any) -> dict[str, float]:
    """Return the share of the values that were not read."""
    return {"unread": report.value_bytes_unread / report.value_bytes_seen if report is not None else 0.0}


if __name__ == "__main__":
    raise SystemExit(main())
