"""The command: see the package."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import psutil

from flexgen.base.quantities import parse_seconds, parse_size

from . import __doc__ as usage
from .execute import DONE, SKIPPED, run_steps
from .models import write_configs
from .peers.commands import Peers
from .steps import Setting, why_not
from .table import format_list, format_table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, on the disk to be measured")
    parser.add_argument("--device", choices=("cuda", "cpu", "sim"), default="cuda")
    parser.add_argument("--budget", type=parse_seconds, default=900.0, help="time for all steps, such as 15min (the default)")
    parser.add_argument("--step", action="append", metavar="NAME", help="only this step; may be repeated")
    parser.add_argument("--again", action="store_true", help="repeat steps that went well")
    parser.add_argument("--tiny", action="store_true", help="tiny models and copies: tries the steps out")
    parser.add_argument("--list", action="store_true", help="only list the steps, with their commands, and why one is left out")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with packages of peers, such as the original FlexGen's")
    parser.add_argument("--peer-python", metavar="PYTHON", default=sys.executable, help="the Python that runs peers; default: this one")
    parser.add_argument("--peer-host-mem", type=parse_size, metavar="SIZE", help="host memory that peers may use; default: what is free")
    parser.add_argument("--llama-batched-bench", type=Path, metavar="PATH", help="the program, from a build of llama.cpp for CUDA")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model for it")
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="the layers of that model that the GPU holds")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of flexgen bench steady; comes last")
    asked = parser.parse_args(arguments)
    if not asked.list and (why := why_not(asked.device)):
        parser.error(why)
    out = asked.out.resolve()
    peers = Peers(
        python=asked.peer_python, packages=asked.peers and asked.peers.resolve(), program=asked.llama_batched_bench, gguf=asked.gguf,
        gpu_layers=asked.gpu_layers, host_bytes=asked.peer_host_mem or psutil.virtual_memory().available,
    )  # fmt: skip
    setting = Setting(out=out, device=asked.device, tiny=asked.tiny, peers=peers, options=tuple(asked.options))
    steps = setting.steps()
    names = [step.name for step in steps]
    if unknown := [name for name in asked.step or () if name not in names]:
        parser.error(f"there is no step {unknown[0]}; there are {', '.join(names)}")
    chosen = [step for step in steps if asked.step is None or step.name in asked.step]
    if asked.list:
        print(format_list(chosen, asked.budget))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    write_configs(setting.configs, tiny=asked.tiny)
    try:
        results = run_steps(chosen, out, asked.budget, again=asked.again)
    finally:
        shutil.rmtree(out / "offload", ignore_errors=True)  # what a step that was ended has left
    print("\n" + format_table(results))
    return 0 if all(each["status"] in (DONE, SKIPPED) for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
