"""How much faster several pipeline stages decode than one machine, where each still streams its share of the weights.

    python benchmarks/stages.py --scratch /data --stages 1,2 --disk 400MB/s --link 1Gbit,10ms --results benchmarks/results/stages.jsonl

Every rank is a process with one core of its own, whose reads from disk are limited by a cgroup (blkio.throttle of cgroup v1), so that two
ranks on one disk do not share its rate.  All weights stream.  Each rank lives in a network namespace of its own, joined by a pair of
virtual interfaces whose rate a token bucket limits (tc tbf); latency is added where frames are sent (FLEXGEN_LINK), because not every
kernel has netem.  Where namespaces cannot be made, the sender limits the rate as well.  Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults.networks import INTERFACE, Host, network  # noqa: E402

from flexgen.base.quantities import parse_size  # noqa: E402

BLKIO = Path("/sys/fs/cgroup/blkio")
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 24
KEPT = (
    "elapsed_seconds", "load_seconds", "num_requests", "num_errors", "prompt_tokens", "output_tokens", "output_tokens_per_s",
    "num_passes", "overlap", "plan", "efficiency", "bytes_moved", "wait_seconds", "peak_host_bytes", "policy", "stages", "versions",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def make_model(folder: Path) -> None:
    """Save a random model, unless it is there."""
    if (folder / "config.json").exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", dtype="bfloat16", **CONFIG)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")


def make_requests(path: Path, count: int) -> None:
    """Write so many prompts of random tokens."""
    numbers = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            prompt = [numbers.randrange(3, CONFIG["vocab_size"]) for _ in range(PROMPT_TOKENS)]
            line = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def reading_at(rate: int, rank: int, folder: Path) -> Iterator[Path]:
    """A cgroup whose processes read from the disk of a folder at this rate in bytes per second."""
    device = folder.stat().st_dev
    group = BLKIO / f"flexgen-stage-{os.getpid()}-{rank}"
    group.mkdir()
    try:
        (group / "blkio.throttle.read_bps_device").write_text(f"{os.major(device)}:{os.minor(device)} {rate}")
        yield group
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def run_case(num_stages: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Answer num_stages blocks of requests on so many stages, and return a row of the results."""
    requests, output, metrics = (args.scratch / f"stages-{num_stages}{ending}" for ending in (".jsonl", ".out.jsonl", ".metrics.json"))
    make_requests(requests, num_stages * args.block)
    command = [
        *(sys.executable, "-m", "flexgen", "run", str(folder), str(requests), "-o", str(output), "--fresh", "--metrics", str(metrics)),
        *("--weights", "disk=1", "--kv", "host=1", "--host-mem", args.host_mem, "--max-num-seqs", str(args.block), "--progress", "none"),
    ]
    rate, latency = args.link.split(",")
    ranks: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as opened:
        hosts: list[Host] = [*opened.enter_context(network(num_stages, rate.lower())).hosts] if num_stages > 1 else []
        for rank in range(num_stages):
            group = opened.enter_context(reading_at(args.disk, rank, folder))
            env = {**os.environ, "XDG_CACHE_HOME": str(args.scratch / "cache")}  # what was measured without the limits does not count
            own = list(command)
            if num_stages > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(num_stages), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                env |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29555", "FLEXGEN_LINK": latency}
                own = ["ip", "netns", "exec", hosts[rank].name, *own, "--stages", str(num_stages), "--interface", INTERFACE]
            core = sorted(os.sched_getaffinity(0))[rank % os.cpu_count()]  # type: ignore[operator]

            def enter(group: Path = group, core: int = core) -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                os.sched_setaffinity(0, {core})

            ranks.append(subprocess.Popen(own, env=env, preexec_fn=enter))
        codes = [each.wait(args.time_limit) for each in ranks]
    report = json.loads(metrics.read_text())
    return {
        "stages": num_stages, "disk_bytes_per_s": args.disk, "link": args.link, "block": args.block, "codes": codes,
        "output_tokens_per_s": report["output_tokens_per_s"], "planned_tokens_per_s": report["forecast"]["output_tokens_per_s"],
        "elapsed_seconds": report["elapsed_seconds"], "metrics": {name: report[name] for name in KEPT if name in report},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk that is to be measured")
    parser.add_argument("--stages", default="1,2", help="numbers of stages, with commas")
    parser.add_argument("--disk", type=lambda text: parse_size(text.removesuffix("/s"), total_bytes=0, name="--disk"), default="400MB/s")
    parser.add_argument("--link", default="1Gbit,10ms")
    parser.add_argument("--block", type=int, default=32, help="sequences of a block")
    parser.add_argument("--host-mem", default="3GiB", help="of each rank")
    parser.add_argument("--time-limit", type=float, default=900)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = args.scratch / "stages-model"
    make_model(folder)
    shutil.rmtree(args.scratch / "cache", ignore_errors=True)
    alone = None
    for each in map(int, args.stages.split(",")):
        row = run_case(each, args, folder)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        alone = alone or row["output_tokens_per_s"] / each
        print(
            f"{each} stages: {row['output_tokens_per_s']:.1f} tokens/s ({row['output_tokens_per_s'] / alone / each:.2f} of {each} times "
            f"one), planned {row['planned_tokens_per_s']:.1f}; exit codes {row['codes']}"
        )


if __name__ == "__main__":
    main()
