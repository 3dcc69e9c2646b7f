"""The table of benchmarks/steady.py, from a result as the command writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "steady.py"


def table(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_table_of_the_last_result(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"overlap": 0.9, "plan": 0.8, "efficiency": 0.72, "median_seconds": 1.5, "output_tokens_per_s": 20.0}
    steady = {**figures, "skipped_passes": 60, "whole_seconds": 18.2}
    full = {
        **figures, "output_tokens_per_s": 21.0, "whole_seconds": 287.4, "num_passes": 243, "job_tokens_per_s": 22.3, "busy_cores": 0.02,
        "warmup": 2,
    }  # fmt: skip
    row = {
        "shape": "llama-tiny", "host_mem": "1GiB", "num_prompts": 200, "tokens": "256+32", "passes": 12, "before": steady, "full": full,
        "after": {**steady, "output_tokens_per_s": 23.0}, "date": "2026-11-30",
    }  # fmt: skip
    results = tmp_path / "steady.jsonl"
    results.write_text("".join(json.dumps(each) + "\n" for each in ({**row, "shape": "an older one"}, row)))
    done = table("--table", "--results", results)
    assert done.returncode == 0, done.stderr
    assert "cores that other programs used: 0.02; over the whole full run 22.3 output tokens/s" in done.stdout
    assert done.stdout.startswith("llama-tiny, 1GiB, 200 x (256+32) tokens")
    assert "| `bench steady` before | 20.0 | 1.50 s |  | 0.90 | 0.80 | 0.72 |" in done.stdout
    assert "| passes 63 to 74 of the full run of 243 | 21.0 | 1.50 s | 287 | 0.90 | 0.80 | 0.72 |" in done.stdout
    assert "| `bench steady` after | 23.0 | 1.50 s | 18 | 0.90 | 0.80 | 0.72 |" in done.stdout


def test_a_run_needs_a_folder() -> None:
    done = table()
    assert done.returncode == 2
    assert "--scratch DIR" in done.stderr
