"""The command: see the package."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from flexgen.base.quantities import parse_seconds

from . import __doc__ as usage
from .execute import DONE, SKIPPED, run_steps
from .steps import Setting, why_not, write_tiny_models
from .table import format_table


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
    parser.add_argument("--peer-python", metavar="PYTHON", help="the Python of an environment with FlexGen 0.1.8")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of flexgen bench steady; comes last")
    asked = parser.parse_args(arguments)
    if why := why_not(asked.device):
        parser.error(why)
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(out=out, device=asked.device, tiny=asked.tiny, peer_python=asked.peer_python, options=tuple(asked.options))
    steps = setting.steps()
    names = [step.name for step in steps]
    if unknown := [name for name in asked.step or () if name not in names]:
        parser.error(f"there is no step {unknown[0]}; there are {', '.join(names)}")
    if asked.tiny:
        write_tiny_models(out / "models")
    try:
        results = run_steps([step for step in steps if asked.step is None or step.name in asked.step], out, asked.budget, again=asked.again)
    finally:
        shutil.rmtree(out / "offload", ignore_errors=True)  # what a step that was ended has left
    print("\n" + format_table(results))
    return 0 if all(each["status"] in (DONE, SKIPPED) for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
