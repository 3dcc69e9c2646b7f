"""Other systems beside flexgen: command lines for machines of several sizes, what is read of their output, and why one is left out."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.generation import Timed
from benchmarks.gpu.models import write_configs
from benchmarks.gpu.peers import run_flexgen, run_llama
from benchmarks.gpu.peers.commands import FLEXGEN_BATCHES, Opt, Peers, flexgen_host_bytes, missing, peer_steps
from benchmarks.gpu.peers.launch import figures_of, version_of
from benchmarks.gpu.peers.run_deepspeed import settings
from benchmarks.gpu.step import Step
from flexgen.base.quantities import GIB

ROOT = Path(__file__).parent.parent
OPT_30B = Opt.of("opt-30b")
# As the original's `write_benchmark_log` and its two `print_stats` write them.
PRINTED = """<run_flexgen>: args.model: facebook/opt-30b
model size: 55.803 GB, cache size: 5.578 GB, hidden size (prefill): 0.058 GB
init weight...
warmup - generate
benchmark - generate
TorchDevice: cuda:0
  cur_mem: 5.4421 GB,  peak_mem: 11.3510 GB
TorchDevice: cpu
  cur_mem: 0.0000 GB,  peak_mem: 0.0000 GB
model size: 55.803 GB\tcache size: 5.578 GB\thidden size (p): 0.058 GB
peak gpu mem: 11.351 GB\tprojected: False
prefill latency: 12.375 s\tprefill throughput: 992.970 token/s
decode latency: 81.250 s\tdecode throughput: 9.157 token/s
total latency: 93.625 s\ttotal throughput: 8.203 token/s
"""


def steps_on(host_bytes: int, out: Path, **where: Any) -> dict[str, Step]:
    return {each.name: each for each in peer_steps(Peers(host_bytes=host_bytes, **where), out, out / "models")}


# -- the original ---------------------------------------------------------------------------------------------------------------------


def test_the_originals_memory() -> None:
    """By its own formula: of each list of tensors those on the host whose middles lie below 80 %; pinned pieces are powers of two."""
    h = 7168
    square, wide, table = (1 << (2 * size - 1).bit_length() for size in (h * h, 4 * h * h, 50272 * h))
    assert (square, wide) == (128 << 20, 512 << 20)
    # Query, key and value but not the output, both halves of the MLP, the embedding and the head; besides them a few vectors.
    pieces = 48 * (3 * square + 2 * wide) + 2 * table
    found = OPT_30B.on_host_bytes(80, compressed=False)
    assert pieces <= found < pieces * 1.001
    assert OPT_30B.kv_bytes(144) == pytest.approx(107.8e9, rel=1e-3), "144 sequences of 544 tokens"
    assert OPT_30B.weights_bytes == pytest.approx(60.7e9, rel=0.01)
    needs = [flexgen_host_bytes(OPT_30B, *each, compressed=False) for each in FLEXGEN_BATCHES]
    assert needs == sorted(needs)
    assert OPT_30B.on_host_bytes(100, compressed=True) < 0.4 * OPT_30B.on_host_bytes(100, compressed=False)


@pytest.mark.parametrize(("host_gib", "largest"), [(64, None), (100, "24x1"), (118, "24x2"), (140, "24x3"), (160, "48x2"), (256, "48x3")])
def test_two_policies_that_the_host_can_hold(host_gib: int, largest: str | None, tmp_path: Path) -> None:
    steps = steps_on(host_gib * GIB, tmp_path, python=sys.executable)
    plain = [name for name in steps if name.startswith("flexgen-0.1.8") and not name.endswith("4bit")]
    assert len(plain) == 2
    assert plain[0] == f"flexgen-0.1.8-{largest or '24x1'}", "the largest comes first"
    assert plain[1] == ("flexgen-0.1.8-24x2" if largest in (None, "24x1") else "flexgen-0.1.8-24x1")
    assert sum(name.endswith("4bit") for name in steps) == 1


def test_a_policy_that_needs_more_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.peers.commands.missing", lambda peers, peer: "")
    steps = steps_on(64 * GIB, tmp_path)
    assert steps["flexgen-0.1.8-24x1"].skipped.startswith("it takes about 9")
    assert "64.0 GiB are there" in steps["flexgen-0.1.8-24x1"].skipped
    steps = steps_on(256 * GIB, tmp_path)
    assert not any(step.skipped for name, step in steps.items() if name != "llama.cpp")
    assert "--llama-batched-bench" in steps["llama.cpp"].skipped


def test_the_originals_command_line(tmp_path: Path) -> None:
    steps = steps_on(256 * GIB, tmp_path, python="python3", packages=tmp_path / "packages")
    own = " ".join(steps["flexgen-0.1.8-48x3"].command)
    head, _, theirs = own.partition(" -- ")
    assert head == f"python3 -m benchmarks.gpu.peers.run_flexgen --packages {tmp_path}/packages --device-bytes {16 * GIB}"
    assert theirs == (
        f"--model facebook/opt-30b --path _DUMMY_ --offload-dir {tmp_path}/offload --percent 20 80 0 100 0 100 --gpu-batch-size 48 "
        f"--num-gpu-batches 3 --prompt-len 512 --gen-len 32 --cpu-cache-compute --log-file {tmp_path}/flexgen-0.1.8-48x3.log"
    )
    (compressed,) = (step for name, step in steps.items() if name.endswith("4bit"))
    assert {"--compress-weight", "--compress-cache"} <= set(compressed.command)
    assert "--cpu-cache-compute" not in compressed.command, "which the original does not bear together with compression"
    assert " --percent 0 100 0 100 0 100 " in " ".join(compressed.command)


def test_what_the_original_prints() -> None:
    found = run_flexgen.read_log(PRINTED)
    assert found == {
        "peak_device_bytes": round(11.351 * 2**30), "projected": False, "prefill_seconds": 12.375, "decode_seconds": 81.25,
        "printed_tokens_per_s": 8.203,
    }  # fmt: skip
    figures = figures_of("flexgen", sequences=24, output_tokens=32, **found)
    assert figures["output_tokens_per_s"] == pytest.approx(8.203, abs=1e-3)
    with pytest.raises(ValueError, match="no figures"):
        run_flexgen.read_log(PRINTED[:500])


def test_its_tokenizer_is_replaced() -> None:
    tokenizer = run_flexgen.Tokenizer.from_pretrained("facebook/opt-30b", padding_side="left")
    for length in (512, 32, 3):
        (ids,) = tokenizer(["Paris is the capital city of"], padding="max_length", max_length=length).input_ids
        assert len(ids) == length
        assert all(isinstance(each, int) for each in ids)
    (ids,) = tokenizer(["Paris"], padding="max_length", max_length=512).input_ids
    assert ids[:505] == [1] * 505, "padded on the left"
    assert 1 not in ids[505:]


# -- others ---------------------------------------------------------------------------------------------------------------------------


def test_the_command_lines_of_other_peers(tmp_path: Path) -> None:
    steps = steps_on(256 * GIB, tmp_path, python="python3")
    model, lengths = str(tmp_path / "models" / "opt-30b"), f"--device-bytes {16 * GIB} --prompt-len 512 --gen-len 32"
    kv = 8 * 544 * 48 * 7168 * 4
    own = {name: " ".join(step.command) for name, step in steps.items()}
    start = "python3 -m benchmarks.gpu.peers.run"
    assert own["accelerate-opt-30b"] == f"{start}_accelerate {model} --batch 8 --kv-bytes {kv} {lengths}"
    assert own["deepspeed-opt-30b"] == f"{start}_deepspeed {model} --batch 8 --pin-memory {lengths}"
    assert own["vllm-opt-30b"].startswith(f"{start}_vllm {model} --num-prompts 16 --cpu-offload-gb 5")
    assert "--pin-memory" not in steps_on(80 * GIB, tmp_path)["deepspeed-opt-30b"].command, "which takes more memory"


def test_launchers_take_their_command_lines(tmp_path: Path) -> None:
    """Each parser reads what the step gives it; where the peer is missing, the launcher says so before that."""
    from benchmarks.gpu.peers import run_accelerate, run_deepspeed, run_vllm

    steps = steps_on(256 * GIB, tmp_path, program=Path("bench"), gguf=Path("m.gguf"), gpu_layers=20)
    for name, launcher in {
        "flexgen-0.1.8-48x3": run_flexgen, "accelerate-opt-30b": run_accelerate, "deepspeed-opt-30b": run_deepspeed,
        "vllm-opt-30b": run_vllm, "llama.cpp": run_llama,
    }.items():  # fmt: skip
        parser = argparse.ArgumentParser(exit_on_error=False)
        launcher.options(parser)
        arguments = steps[name].command[3:]
        asked = vars(parser.parse_args(arguments))
        assert asked
        if name == "flexgen-0.1.8-48x3":
            assert asked["command"][:2] == ["--model", "facebook/opt-30b"]
            assert asked["device_bytes"] == 16 * GIB


def test_deepspeeds_settings() -> None:
    chosen = settings(7168, 8, "float16", pin_memory=True)
    assert chosen["zero_optimization"]["stage"] == 3
    assert chosen["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert (chosen["train_batch_size"], chosen["fp16"], chosen["bf16"]) == (8, {"enabled": True}, {"enabled": False})


def test_llama_batched_bench() -> None:
    asked: Any = SimpleNamespace(program="bench", model="m.gguf", gpu_layers=20, parallel=16, prompt_len=512, gen_len=32)
    command = " ".join(run_llama.command(asked))
    assert command == ("bench -m m.gguf -ngl 20 -c 8704 -b 2048 -ub 512 -npp 512 -ntg 32 -npl 16 --kv-unified --output-format jsonl")
    line = {"n_kv_max": 8704, "pp": 512, "tg": 32, "pl": 16, "t_pp": 10.0, "t_tg": 22.0, "speed": 1.0}
    found = run_llama.figures(f"a log\n{json.dumps(line)}\n", 32, version="b1")
    assert found["output_tokens_per_s"] == pytest.approx(16 * 32 / 32.0)
    assert (found["peer"], found["version"], found["sequences"]) == ("llama.cpp", "b1", 16)


def test_tokens_that_were_not_timed_count_as_those_that_were() -> None:
    timed = Timed(requests=8, tokens=4, prefill_seconds=10.0, decode_seconds=6.0)
    assert timed.seconds(4) == 16.0
    assert timed.seconds(32) == 10.0 + 31 * 2.0
    assert Timed(requests=8, tokens=1, prefill_seconds=10.0, decode_seconds=0.0).seconds(1) == 10.0


# -- launchers ------------------------------------------------------------------------------------------------------------------------


def launched(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", f"benchmarks.gpu.peers.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_missing_peer_says_so(tmp_path: Path) -> None:
    done = launched("run_vllm", "--check")
    assert done.returncode == 3
    assert done.stdout == "not installed: vllm (vllm)\n"
    done = launched("run_flexgen", "--", "--model", "facebook/opt-30b")
    assert (done.returncode, done.stdout) == (3, "not installed: flexgen.flex_opt (flexgen==0.1.8)\n"), "ours is not the original"
    assert missing(Peers(), "vllm").startswith("not installed: vllm (vllm): a folder with it is named by --peers")
    assert "does not run" in missing(Peers(python=str(tmp_path / "python")), "vllm")


def stand_in(folder: Path, body: str) -> Path:
    """Return a folder with a package in place of the original, whose flex_opt has this body of `run_flexgen`."""
    package = folder / "flexgen"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (folder / "attr.py").write_text("")
    (package / "pytorch_backend.py").write_text("def cpu_mem_stats():\n    raise RuntimeError('it does not bear some object')\n")
    (package / "flex_opt.py").write_text(
        "from transformers import AutoTokenizer\nfrom flexgen import pytorch_backend\n\n"
        "def add_parser_arguments(parser):\n    parser.add_argument('--model')\n"
        "    parser.add_argument('--gpu-batch-size', type=int)\n    parser.add_argument('--num-gpu-batches', type=int)\n"
        f"    parser.add_argument('--gen-len', type=int)\n\ndef run_flexgen(args):\n{body}"
    )
    return folder


COMMAND = ("--", "--model", "facebook/opt-30b", "--gpu-batch-size", "12", "--num-gpu-batches", "2", "--gen-len", "32")


def test_the_original_is_found_in_a_folder_and_its_figures_are_printed(tmp_path: Path) -> None:
    body = (
        "    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side='left')\n"
        "    assert len(tokenizer(['x'], padding='max_length', max_length=40).input_ids[0]) == 40\n"
        "    assert pytorch_backend.cpu_mem_stats() == 0\n"
        "    import os\n    os.system('echo from another process')\n"
        f"    print({PRINTED!r})\n"
    )
    done = launched("run_flexgen", "--packages", str(stand_in(tmp_path, body)), *COMMAND)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["peer"], found["sequences"], found["output_tokens"]) == ("flexgen", 24, 32)
    assert found["output_tokens_per_s"] == pytest.approx(24 * 32 / 93.625)
    assert "total throughput: 8.203 token/s" in done.stderr, "all that it says is kept"
    assert "from another process" in done.stderr


def test_a_peer_that_fails_ends_at_once(tmp_path: Path) -> None:
    body = (
        "    import threading, time\n    threading.Thread(target=time.sleep, args=(60,)).start()\n    raise RuntimeError('out of memory')\n"
    )
    done = launched("run_flexgen", "--packages", str(stand_in(tmp_path, body)), *COMMAND)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.rstrip().endswith("RuntimeError: out of memory")


def test_versions_that_nobody_states() -> None:
    assert version_of("no such package") is None
    assert version_of("torch")


def test_a_config_that_peers_can_read(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_configs(tmp_path, tiny=False)
    config = AutoConfig.from_pretrained(tmp_path / "opt-30b")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == ("opt", 48, 7168, 50272)
