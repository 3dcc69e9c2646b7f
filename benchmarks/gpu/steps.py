"""The steps: what each of them runs, and how long that should take."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLEXGEN = (sys.executable, "-m", "flexgen")
# Cycles of zigzag and row are as long as an answer: fewer passes would have all prompts or none.
WHOLE_CYCLES = ("zigzag", "row")
MODELS = ("opt-30b", "gpt-oss-120b", "mixtral-8x7b")
TINY: dict[str, dict[str, Any]] = {
    "opt-30b": {
        "model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 512,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "vocab_size": 512, "max_position_embeddings": 512, "quantization_config": {"quant_method": "mxfp4"},
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 512,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        name: The name, and that of its file.
        what: What it measures, for people.
        command: The command; what it prints is its result, as JSON if it is JSON.
        seconds: About how long it takes.
        skipped: Why it cannot be run here; empty if it can.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    skipped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all steps share.

    Attributes:
        out: The folder of the results; random weights that stay on disk, and what is read from the disk, lie below it.
        device: "cuda", "cpu" or "sim".
        tiny: Whether models, jobs and copies are so small that any machine runs them in a minute; their figures mean nothing.
        peer_python: The Python of an environment with FlexGen 0.1.8; None without one.
        options: Further options of every `flexgen bench steady`.
    """

    out: Path
    device: str
    tiny: bool
    peer_python: str | None = None
    options: tuple[str, ...] = field(default=())

    def steps(self) -> tuple[Step, ...]:
        """Return all steps in order."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[Step]:
        python, on = (sys.executable, "-m"), ("--device", self.device)
        small = ("--tiny",) if self.tiny else ()
        yield Step(name="facts", what="versions, memory, disk", command=(*python, "benchmarks.gpu.facts", *on, str(self.out)), seconds=10)
        links = (*python, "benchmarks.gpu.links", *on, *small, str(self.out))
        yield Step(name="links", what="pinning, copies, a small copy behind a large one, reads", command=links, seconds=30)
        dtypes = ("float32",) if self.tiny else ("float16", "bfloat16")
        profile = (*FLEXGEN, "profile", str(self.out), *on, "--json", *(each for name in dtypes for each in ("--dtype", name)))
        yield Step(name="profile", what="rates of the machine", command=(*profile, *(("--quick",) if self.tiny else ())), seconds=60)
        yield self._steady("opt-30b", "16GiB", 90)
        yield from self._peers()
        # Overlap cannot be turned off; nor can attention on the host where nothing else computes.
        yield self._steady("opt-30b", "16GiB", 90, "no-host-attention", "--host-attention", "on" if self.device == "cpu" else "off")
        for schedule in WHOLE_CYCLES:
            yield self._steady("opt-30b", "16GiB", 150, schedule, "--schedule", schedule)
        yield self._steady("gpt-oss-120b", "24GiB", 90)
        yield self._steady("mixtral-8x7b", "24GiB", 90)

    def _steady(self, model: str, device_mem: str, seconds: float, variant: str = "", *options: str) -> Step:
        """Return the step that measures a model in the middle of a job."""
        if self.tiny:
            where, answer, device_mem = str(self.out / "models" / model), 6, "128MiB"
            job = ["--num-prompts", "60", "--input-len", "24", "--output-len", str(answer), "--max-num-seqs", "8", "--dtype", "float32"]
            passes = 4
        else:
            where, answer, passes = model, 32, 12
            job = ["--num-prompts", "2000", "--input-len", "512", "--output-len", str(answer)]
        passes = answer if variant in WHOLE_CYCLES else passes
        budget = () if self.device == "cpu" else ("--device-mem", device_mem)
        name = f"{model}-{variant}" if variant else model
        trace = () if variant else ("--trace", str(self.out / f"{name}.trace.json"), "--trace-passes", "0:2")  # those of the warm-up
        command = (
            *FLEXGEN, "bench", "steady", where, "--load-format", "dummy", "--offload-dir", str(self.out / "offload"),
            "--device", self.device, *budget, *job, "--passes", str(passes), "--json", "--progress", "plain",
            *trace, *options, *self.options,
        )  # fmt: skip
        return Step(name=name, what=f"{passes} passes in the middle of a job", command=command, seconds=seconds)

    def _peers(self) -> Iterator[Step]:
        """Yield full runs of the original FlexGen, with ones for weights: 20 % of the weights on the device, KV on the host."""
        why = _why_no_peer(self.peer_python)
        for num_batches in (1, 3):
            command = (
                self.peer_python or "python", "-m", "flexgen.flex_opt", "--model", "facebook/opt-30b", "--path", "_DUMMY_",
                "--percent", "20", "80", "0", "100", "0", "100", "--gpu-batch-size", "24", "--num-gpu-batches", str(num_batches),
                "--prompt-len", "512", "--gen-len", "32",
            )  # fmt: skip
            name, what = f"flexgen-0.1.8-24x{num_batches}", "the original, a full run"
            yield Step(name=name, what=what, command=command, seconds=130, skipped=why or ("a tiny trial" if self.tiny else ""))


def _why_no_peer(python: str | None) -> str:
    """Return why the original FlexGen cannot be run; empty if it can.  It has the name of our package, so it needs its own environment."""
    if python is None:
        return "no environment with FlexGen 0.1.8 is named: --peer-python"
    try:
        found = subprocess.run([python, "-c", "import flexgen.flex_opt"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}"
    if found.returncode == 0:
        return ""
    return f"{python} cannot import flexgen.flex_opt: {found.stderr.strip().rpartition(chr(10))[2]}"


def write_tiny_models(folder: Path) -> None:
    """Write the configs of tiny models with the architectures of the large ones; there are no weights."""
    for name, config in TINY.items():
        path = folder / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"dtype": "float32", **config}))


def why_not(device: str) -> str:
    """Return why steps cannot be run on a device; empty if they can."""
    if device != "cuda":
        return ""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device: --device cpu or sim tries the steps out"
