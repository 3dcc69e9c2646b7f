"""The main job on the bundled model, twice: all weights in memory, then three quarters of them streaming from disk.  Same answers.

`make demo` runs it; nothing is downloaded.  The second run is what a model larger than your memory does in every pass.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLEXGEN = str(Path(sys.executable).with_name("flexgen"))
MODEL, REQUESTS, OUT = "models/novels-opt-7m", "examples/requests.jsonl", Path("demo-out")
RUNS = {"resident": "host=1", "streaming": "host=.25,disk=.75"}
SHOWN = ("novel-01", "novel-05", "novel-23", "novel-35")


def main() -> int:
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir()
    for name, placement in RUNS.items():
        title(f"{name}: weights {placement}")
        # float32, because only there are matrix products exact enough to promise equal tokens for every placement.
        command = [FLEXGEN, "run", MODEL, REQUESTS, "-o", str(OUT / f"{name}.jsonl"), "--weights", placement]
        command += ["--device", "cpu", "--dtype", "float32", "--metrics", str(OUT / f"{name}.metrics.json")]
        print("$", shlex.join(["flexgen", *command[1:]]), flush=True)
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    title("the answers")
    resident, streaming = (read_answers(ROOT / OUT / f"{name}.jsonl") for name in RUNS)
    prompts = {request["id"]: request["prompt"] for request in read_lines(ROOT / REQUESTS)}
    for request_id in SHOWN:
        print(f"{prompts[request_id]} |{resident[request_id]}\n")
    different = [request_id for request_id in prompts if resident.get(request_id) != streaming.get(request_id)]
    if different:
        print(f"{len(different)} of {len(prompts)} answers differ: {', '.join(different)}.  This is a bug: please report it.")
        return 1
    print(f"All {len(prompts)} answers are identical.  (The model is tiny: it only sounds like a novel.)")
    title("a real model")
    print("A 32-billion-parameter model (65 GB) on a machine with 32 GB of memory; the first run downloads it:\n")
    print(f"  .venv/bin/flexgen run Qwen/Qwen3-32B {REQUESTS} -o answers.jsonl --host-mem 24GiB\n")
    print("`--dry-run` shows the plan first.  `.venv/bin/flexgen run --help` has the rest.")
    return 0


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_answers(path: Path) -> dict[str, str]:
    return {answer["id"]: answer["text"] for answer in read_lines(path)}


def title(text: str) -> None:
    print(f"\n--- {text} {'-' * (100 - len(text))}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
