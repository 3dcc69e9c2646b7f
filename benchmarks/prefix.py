"""What sharing of common prompt prefixes is worth: one file of requests, run with it and without.

    python benchmarks/prefix.py --scratch DIR [--num-requests 2000]

Every line begins with the same 400 random tokens and goes on with 8 to 24 of its own; the model has random weights and computes in
float32, so that the answers can be compared token by token.  Two settings: weights resident, and weights that stream from disk
within a tight budget.  The two runs of a pair follow each other.  One JSON line each on stdout and in the results file.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Results
from shapes import SHAPES, Shape

from flexgen.checkpoint.dummy import write_random_checkpoint

PREFIX_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 400, (8, 24), 16
DEFAULT_RESULTS = Path(__file__).parent / "results" / "prefix.jsonl"


@dataclass(frozen=True, slots=True)
class Setting:
    """A model, and what of the host's memory it may use."""

    name: str
    shape: str
    host_mem: str


SETTINGS = (Setting("resident", "opt-125m", "3GiB"), Setting("streamed", "llama-tiny", "1100MiB"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints and answers")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--setting", choices=[each.name for each in SETTINGS], help="only this one")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    failures = 0
    for setting in SETTINGS:
        if args.setting in (None, setting.name):
            row = run_pair(setting, args.num_requests, args.scratch.resolve())
            failures += not row["same_tokens"]
            print(json.dumps(Results(args.results).append(row)))
    return 1 if failures else 0


def run_pair(setting: Setting, num_requests: int, scratch: Path) -> dict[str, Any]:
    """Both runs of a setting; the row for the results."""
    shape = SHAPES[setting.shape]
    model = scratch / shape.name
    if not (model / "config.json").exists():
        write_random_checkpoint(shape.hf_config(), model, torch.bfloat16)
    requests = write_requests(scratch / "prefix-requests.jsonl", num_requests, shape)
    without = run(setting, model, requests, scratch / "without", "--no-prefix-sharing")
    shared = run(setting, model, requests, scratch / "shared", "--prefix-sharing")
    return {
        "benchmark": "prefix",
        "setting": setting.name,
        "shape": shape.name,
        "host_mem": setting.host_mem,
        "num_requests": num_requests,
        "prefix_tokens": PREFIX_TOKENS,
        "own_tokens": OWN_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "same_tokens": without.pop("answers") == shared.pop("answers"),
        "requests_per_s_ratio": shared["requests_per_s"] / without["requests_per_s"],
        "without": without,
        "shared": shared,
    }


def write_requests(path: Path, num_requests: int, shape: Shape) -> Path:
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return [rng.randrange(10, shape.config["vocab_size"]) for _ in range(length)]

    prefix = draw(PREFIX_TOKENS)
    with path.open("w") as file:
        for index in range(num_requests):
            line = {"id": index, "prompt": prefix + draw(rng.randint(*OWN_TOKENS)), "max_tokens": OUTPUT_TOKENS}
            file.write(json.dumps(line | {"temperature": 0, "ignore_eos": True}) + "\n")
    return path


def run(setting: Setting, model: Path, requests: Path, stem: Path, flag: str) -> dict[str, Any]:
    """One run: its figures, and `answers`: the generated ids by line."""
    output, metrics = stem.with_suffix(".jsonl"), stem.with_suffix(".json")
    for old in (output, metrics):
        old.unlink(missing_ok=True)
    command = [
        str(Path(sys.executable).parent / "flexgen"), "run", str(model), str(requests), "-o", str(output), "--fresh",
        "--host-mem", setting.host_mem, "--dtype", "float32", "--metrics", str(metrics), "--progress", "none", flag,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads(metrics.read_text())
    policy = report["policy"]
    answers = {record["id"]: record["token_ids"] for record in map(json.loads, output.read_text().splitlines())}
    figures = ("requests_per_s", "elapsed_seconds", "num_passes", "prompt_tokens", "shared_prompt_tokens", "num_preemptions", "overlap")
    chosen = ("weights", "max_num_seqs", "prefill_tokens", "micro_batch_tokens", "kv_host_bytes")
    return {
        **{name: report[name] for name in figures},
        "disk_read_bytes": report["bytes_moved"].get("disk_read", 0),
        "policy": {name: policy[name] for name in chosen},
        "answers": answers,
    }


if __name__ == "__main__":
    sys.exit(main())
