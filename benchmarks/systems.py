"""The systems that are compared: for each, how it is called, how its best setting is found, and what its output says.

A peer's sweep runs the whole prefill of one batch but only a few of the output tokens, and extrapolates to all of them; the best
setting is then run on full batches, and only those runs count.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Deadline, Setup, measure

SWEEP_TOKENS = 4
SWEEP_SHARE = 0.6  # of a part's time; the rest is for the full run
ACCELERATE_RUNTIME_BYTES = 900 << 20  # interpreter, torch and transformers, before a weight is read: 0.6 GB, and some slack
ROOMY_UBATCH = 2048

# (role, setting, deadline) -> the line of the results
Run = Callable[[str, dict[str, Any], Deadline], dict[str, Any] | None]


def run_flexgen(setup: Setup, deadline: Deadline, schedules: list[str], options: list[str]) -> None:
    """The whole job, once per schedule; only the schedule differs."""
    for schedule in schedules:
        output, metrics = (setup.scratch / f"{setup.shape.name}-{schedule}.{suffix}" for suffix in ("answers.jsonl", "metrics.json"))
        for stale in (*setup.scratch.glob(f"{output.name}*"), metrics):  # a rerun would go on with old answers
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        offload = setup.scratch / "offload"
        offload.mkdir(exist_ok=True)
        argv = [str(Path(sys.executable).with_name("flexgen")), "run", str(setup.model), str(setup.requests()), "-o", str(output)]
        argv += ["--host-mem", str(setup.memory_bytes), "--offload-dir", str(offload), "--device", "cpu"]
        argv += ["--schedule", schedule, "--metrics", str(metrics), "--progress", "plain", *options]

        def read(_stdout: str, metrics: Path = metrics, output: Path = output) -> dict[str, Any]:
            report = json.loads(metrics.read_text())
            answers = len(output.read_text().splitlines())
            if report["num_errors"] or answers != setup.num_requests:
                raise SystemExit(f"flexgen: {report['num_errors']} errors, {answers} answers to {setup.num_requests} requests")
            return {"output_tokens_per_s": report["output_tokens_per_s"], "metrics": {**report, "model": setup.shape.name}}

        setting = {"schedule": schedule, "options": " ".join(options)}
        row = measure(setup, deadline, system="flexgen", role="result", setting=setting, argv=argv, read=read, is_ours=True)
        if row is None or row["timed_out"]:
            _out_of_time("flexgen")


def run_accelerate(setup: Setup, deadline: Deadline) -> None:
    """Batches rising until one does not survive; of each, as many resident weights as should fit, then none."""

    def run(role: str, setting: dict[str, Any], limit: Deadline) -> dict[str, Any] | None:
        tokens = SWEEP_TOKENS if role == "sweep" else setup.output_tokens
        argv = [sys.executable, str(Path(__file__).with_name("peer_accelerate.py")), str(setup.model), str(setup.requests())]
        argv += ["--batch", str(setting["batch"]), "--resident-bytes", str(setting["resident_bytes"]), "--output-tokens", str(tokens)]
        argv += ["--threads", str(setup.threads), "--scratch", str(setup.scratch)]
        # Full batches while there is time for another, at least one; a batch under way at the limit may end.
        argv += ["--max-batches", "1"] if role == "sweep" else ["--time-limit", str(0.9 * limit.seconds_left)]
        return measure(
            setup,
            limit,
            system="accelerate",
            role=role,
            setting=setting,
            argv=argv,
            read=lambda stdout: _read_accelerate(stdout, setup.output_tokens),
        )

    sweep, rows = deadline.share(SWEEP_SHARE), []
    for batch in _batches(setup):
        estimate = _resident_bytes(setup, batch)
        for resident_bytes in dict.fromkeys((estimate, 0)):
            row = run("sweep", {"batch": batch, "resident_bytes": resident_bytes}, sweep)
            if row is not None and row["survived"]:
                rows.append(row)
                break
        else:
            break
    _run_best("accelerate", rows, run, deadline)


def _resident_bytes(setup: Setup, batch: int) -> int:
    """What the cap leaves for resident weights (accelerate itself sets the largest layer aside)."""
    shape = setup.shape
    kv_bytes = batch * sum(setup.tokens) * shape.kv_bytes_per_token
    activation_bytes = batch * setup.prompt_tokens * 2 * (4 * shape.config["hidden_size"] + 2 * shape.intermediate_size)
    return max(0, setup.memory_bytes - ACCELERATE_RUNTIME_BYTES - kv_bytes - activation_bytes)


def _read_accelerate(stdout: str, output_tokens: int) -> dict[str, Any]:
    events = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    loaded, batches = events[0], events[1:]
    requests = sum(batch["requests"] for batch in batches)
    prefill = sum(batch["prefill_seconds"] for batch in batches)
    decode = sum(batch["seconds"] for batch in batches) - prefill
    steps = batches[0]["steps"]
    seconds = prefill + decode * (output_tokens - 1) / (steps - 1)
    return {
        "output_tokens_per_s": requests * output_tokens / seconds,
        "timed_requests": requests,
        "timed_tokens_each": steps,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "load_seconds": loaded["seconds"],
        "disk_modules": [loaded["disk_modules"], loaded["modules"]],
    }


def run_llama(setup: Setup, deadline: Deadline, binary: Path) -> None:
    """Parallel sequences rising until they do not survive, with a KV stream each and unified; the best also with a large ubatch."""
    version = _llama_version(binary)

    def run(role: str, setting: dict[str, Any], limit: Deadline) -> dict[str, Any] | None:
        tokens = SWEEP_TOKENS if role == "sweep" else setup.output_tokens
        # llama.cpp rounds the context of every stream up to 256 tokens; a unified one is shared, so only the sum is rounded.
        per_sequence = sum(setup.tokens)
        context = _round_up(setting["npl"] * per_sequence) if setting["kv_unified"] else setting["npl"] * _round_up(per_sequence)
        argv = [str(binary), "-m", str(setup.gguf), "-c", str(context), "-b", "2048", "-ub", str(setting["ubatch"])]
        argv += ["-npp", str(setup.prompt_tokens), "-ntg", str(tokens), "-npl", str(setting["npl"])]
        argv += ["-t", str(setup.threads), "--output-format", "jsonl", "-lm", "mmap"]
        argv += ["--kv-unified"] if setting["kv_unified"] else []

        def read(stdout: str) -> dict[str, Any]:
            return {**_read_llama(stdout, setup.output_tokens), "llama_cpp": version}

        return measure(setup, limit, system="llama.cpp", role=role, setting=setting, argv=argv, read=read)

    sweep, rows = deadline.share(SWEEP_SHARE), []
    for npl in _batches(setup):
        tried = [run("sweep", {"npl": npl, "ubatch": 512, "kv_unified": kv_unified}, sweep) for kv_unified in (False, True)]
        survivors = [row for row in tried if row is not None and row["survived"]]
        if not survivors:
            break
        rows += survivors
    if rows:
        roomy = run("sweep", {**_best(rows)["setting"], "ubatch": ROOMY_UBATCH}, sweep)
        rows += [roomy] if roomy is not None and roomy["survived"] else []
    _run_best("llama.cpp", rows, run, deadline)


def _read_llama(stdout: str, output_tokens: int) -> dict[str, Any]:
    line = json.loads(next(line for line in stdout.splitlines() if line.startswith("{")))
    seconds = line["t_pp"] + line["t_tg"] * output_tokens / line["tg"]
    return {
        "output_tokens_per_s": line["pl"] * output_tokens / seconds,
        "timed_requests": line["pl"],
        "timed_tokens_each": line["tg"],
        "prefill_seconds": line["t_pp"],
        "decode_seconds": line["t_tg"],
        "context": line["n_kv_max"],
    }


def _llama_version(binary: Path) -> str:
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"version: (.+)", done.stdout + done.stderr)
    return match[1] if match else "unknown"


def _batches(setup: Setup) -> list[int]:
    return [batch for batch in setup.shape.batches if batch <= setup.num_requests]


def _run_best(system: str, rows: list[dict[str, Any]], run: Run, deadline: Deadline) -> None:
    """Full batches at the fastest setting of the sweep; at the next one when the full length does not survive."""
    for row in sorted(rows, key=lambda row: -row["output_tokens_per_s"]):
        result = run("result", row["setting"], deadline)
        if result is None or result["timed_out"]:
            break
        if result["survived"]:
            return
    _out_of_time(system)


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["output_tokens_per_s"])


def _round_up(tokens: int) -> int:
    return -(-tokens // 256) * 256


def _out_of_time(system: str) -> None:
    print(f"{system}: no result within the time limit; the same command with a larger --time-limit goes on", flush=True)
