"""Ask a model about every row of Parquet files with Ray Data: python examples/ray_parquet.py INPUT OUTPUT --prompt 'Review: {text}'

INPUT is a file or a folder, OUTPUT a folder.  It uses the Ray cluster that RAY_ADDRESS names, or starts one on this machine (docs/ray.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ray.data

from flexgen.ray_data import FlexGenActor


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Answer the rows of Parquet files with Ray Data.")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--model", default="models/novels-opt-7m", help="a folder, a GGUF file or a hub id, the same on all nodes")
    parser.add_argument("--prompt", required=True, help="the template of the prompt, with {name} for a column's value")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096, help="rows that an engine answers together")
    parser.add_argument("--engines", type=int, default=1, help="one for each node is best")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of an engine: all of a node but one, which reads and writes")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an engine, in place of CPUs: 1, or a part of one")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of LLM, such as host_mem=16GiB")
    asked = parser.parse_args(arguments)
    # Folders are given by their whole path, because actors may run elsewhere.
    model = str(Path(asked.model).resolve()) if Path(asked.model).exists() else asked.model
    source, target = (name if "://" in name else str(Path(name).resolve()) for name in (asked.input, asked.output))
    constructor = {
        "model": model,
        "prompt": asked.prompt,
        "sampling_params": {"temperature": 0, "max_tokens": asked.max_tokens},
        "finish_reason": True,
        **dict(option.split("=", 1) for option in asked.option),
    }
    resources = {"num_gpus": asked.gpus} if asked.gpus else {"num_cpus": asked.cpus}
    answered = ray.data.read_parquet(source).map_batches(
        FlexGenActor,
        fn_constructor_kwargs=constructor,
        batch_size=asked.batch_size,
        batch_format="pyarrow",  # keeps the types of all columns
        compute=ray.data.ActorPoolStrategy(size=asked.engines),
        **resources,
    )
    answered.write_parquet(target)


if __name__ == "__main__":
    main(sys.argv[1:])
