"""The steps of peers: their command lines for a machine, and why a peer is left out."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexgen.base.quantities import GIB, format_size, power_of_two
from flexgen.plan.known.models import catalogue_fields

from ..models import PEERS_MODEL
from ..step import Step

PROMPT, OUTPUT, DEVICE_BYTES = 512, 32, 16 * GIB
# (sequences of a batch, batches) of the original without compression, from little to much memory of the host; the paper's is the last.
FLEXGEN_BATCHES = ((24, 1), (24, 2), (24, 3), (48, 2), (48, 3))
FLEXGEN_COMPRESSED = ((64, 1), (64, 2), (64, 4), (64, 8))  # the last is the paper's
# What the original takes of the host beside weights, keys and values: four threads with 2 GiB of pinned memory each, Python and CUDA.
FLEXGEN_OWN_BYTES = 4 * 2 * GIB + 4 * GIB
BATCH = 8  # of accelerate and DeepSpeed: the paper's for accelerate
PARALLEL = 16  # sequences of vLLM and llama.cpp


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Where peers are on this machine.

    Attributes:
        python: The Python that runs them.
        packages: A folder with their packages; None without one.
        program: llama-batched-bench; None without it.
        gguf: The model for it; None without it.
        gpu_layers: The layers of that model that the GPU holds.
        host_bytes: The memory of the host that they may use.
    """

    python: str = sys.executable
    packages: Path | None = None
    program: Path | None = None
    gguf: Path | None = None
    gpu_layers: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Opt:
    """The sizes of an OPT model, with which the original is placed."""

    hidden: int
    layers: int
    vocab: int
    positions: int

    @classmethod
    def of(cls, name: str) -> Opt:
        """Return those of a model of the catalogue."""
        config = catalogue_fields(name)["config"]
        return cls(
            hidden=config["hidden_size"], layers=config["num_hidden_layers"], vocab=config["vocab_size"],
            positions=config["max_position_embeddings"],
        )  # fmt: skip

    @property
    def tensors(self) -> Iterator[list[int]]:
        """The numbers of each tensor, for each list of tensors that the original places together, in its order (flex_opt.py)."""
        h = self.hidden
        yield [self.vocab * h, (self.positions + 2) * h]
        for _ in range(self.layers):
            yield [h * h, h] * 4 + [h, h]
            yield [4 * h * h, 4 * h, 4 * h * h, h, h, h]
        yield [h, h, self.vocab * h]

    @property
    def weights_bytes(self) -> int:
        """The bytes of all weights in float16; the head is counted beside the embedding that it is tied to."""
        return 2 * sum(map(sum, self.tensors))

    def kv_bytes(self, sequences: int) -> int:
        """Return the bytes of keys and values of so many sequences in float16."""
        return sequences * (PROMPT + OUTPUT) * self.layers * self.hidden * 2 * 2

    def on_host_bytes(self, host_percent: int, *, compressed: bool) -> int:
        """Return the pinned memory of the weights that the original puts on the host, if the rest is on the device.

        It goes by the middle of each tensor within its list, and torch rounds each piece of pinned memory up to a power of two.  Compressed
        are matrices: to 4 bits and two numbers of 16 bits for each 64.
        """
        total = 0
        for sizes in self.tensors:
            for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
                if 100 * (end - size / 2) / sum(sizes) < host_percent:
                    parts = [size // 2, size // 64 * 4] if compressed and size > 4 * self.hidden else [2 * size]
                    total += sum(power_of_two(part) for part in parts)
        return total


def flexgen_host_bytes(opt: Opt, batch: int, batches: int, *, compressed: bool) -> int:
    """Return the memory of the host that the original needs with all keys and values there."""
    on_host = opt.on_host_bytes(100 if compressed else 80, compressed=compressed)
    kv = opt.kv_bytes(batch * batches) * (0.25 + 2 / 64 if compressed else 1)
    workspace = 0 if compressed else opt.kv_bytes(batch) // opt.layers * 2  # keys and values of one layer of one batch in float32
    return round(on_host + kv + workspace) + FLEXGEN_OWN_BYTES


def flexgen_command(batch: int, batches: int, out: Path, name: str, *, compressed: bool) -> tuple[str, ...]:
    """Return the original's own command line: the paper's policy with fewer sequences, where the host has less memory."""
    percent = (0, 100, 0, 100, 0, 100) if compressed else (20, 80, 0, 100, 0, 100)
    return (
        "--model", f"facebook/{PEERS_MODEL}", "--path", "_DUMMY_", "--offload-dir", str(out / "offload"), "--percent", *map(str, percent),
        "--gpu-batch-size", str(batch), "--num-gpu-batches", str(batches), "--prompt-len", str(PROMPT), "--gen-len", str(OUTPUT),
        *(("--compress-weight", "--compress-cache") if compressed else ("--cpu-cache-compute",)),
        "--log-file", str(out / f"{name}.log"),
    )  # fmt: skip


def peer_steps(peers: Peers, out: Path, configs: Path, why: str = "") -> list[Step]:
    """Return the steps of all peers, the most important ones first.

    Args:
        peers: Where they are.
        out: The folder of the results.
        configs: The folder with the config of the model.
        why: Why all of them are left out; empty if they are not.
    """
    opt = Opt.of(PEERS_MODEL)
    return [*_flexgen(peers, out, opt, why), *_others(peers, configs / PEERS_MODEL, opt, why)]


def _flexgen(peers: Peers, out: Path, opt: Opt, why: str) -> Iterator[Step]:
    """Yield two policies of the original, the largest that fits the host and a smaller one, and one with compression."""
    why = why or missing(peers, "flexgen")
    fits = [each for each in FLEXGEN_BATCHES if flexgen_host_bytes(opt, *each, compressed=False) <= peers.host_bytes]
    small = [each for each in FLEXGEN_COMPRESSED if flexgen_host_bytes(opt, *each, compressed=True) <= peers.host_bytes]
    two = [*fits[-1:], *(each for each in FLEXGEN_BATCHES if each not in fits[-1:])][:2]
    chosen = [*((each, False) for each in two), ((small or FLEXGEN_COMPRESSED[:1])[-1], True)]
    for (batch, batches), compressed in chosen:
        name = f"flexgen-0.1.8-{batch}x{batches}{'-4bit' if compressed else ''}"
        need = flexgen_host_bytes(opt, batch, batches, compressed=compressed)
        command = _launcher(peers, "flexgen", "--device-bytes", str(DEVICE_BYTES), "--")
        yield Step(
            name=name, what="the original, a full run", seconds=110 + 0.45 * batch * batches,
            command=(*command, *flexgen_command(batch, batches, out, name, compressed=compressed)),
            skipped=why or _too_large(need, peers.host_bytes),
        )  # fmt: skip


def _others(peers: Peers, config: Path, opt: Opt, why: str) -> Iterator[Step]:
    weights, tokens = opt.weights_bytes, ("--prompt-len", str(PROMPT), "--gen-len", str(OUTPUT))
    budget = ("--device-bytes", str(DEVICE_BYTES))
    lengths = (*budget, *tokens)
    pinned = opt.on_host_bytes(100, compressed=False)
    may_pin = pinned + 8 * GIB <= peers.host_bytes
    offload_gib = str(round((weights - 4 * GIB) / GIB, 1))  # 4 GiB of the device for weights, the rest for keys and values
    commands: Mapping[str, tuple[tuple[str, ...], float, int]] = {
        "accelerate": ((str(config), "--batch", str(BATCH), "--kv-bytes", str(opt.kv_bytes(BATCH)), *lengths), 150, weights),
        "deepspeed": (
            (str(config), "--batch", str(BATCH), *(("--pin-memory",) if may_pin else ()), *lengths), 180, pinned if may_pin else weights
        ),
        "vllm": ((str(config), "--num-prompts", str(PARALLEL), "--cpu-offload-gb", offload_gib, *lengths), 200, pinned),
    }  # fmt: skip
    for peer, (arguments, seconds, need) in commands.items():
        yield Step(
            name=f"{peer}-{PEERS_MODEL}", what="a peer, one batch", command=(*_launcher(peers, peer), *arguments), seconds=seconds,
            skipped=why or missing(peers, peer) or _too_large(need + 8 * GIB, peers.host_bytes),
        )  # fmt: skip
    layers = ("--gpu-layers", str(peers.gpu_layers), "--parallel", str(PARALLEL), *tokens)
    yield Step(
        name="llama.cpp", what="a peer, one batch", seconds=200,
        command=(*_launcher(peers, "llama"), str(peers.program), str(peers.gguf), *layers),
        skipped=why or ("" if peers.program and peers.gguf else "not named: --llama-batched-bench PROGRAM, --gguf FILE, --gpu-layers N"),
    )  # fmt: skip


def _launcher(peers: Peers, peer: str, *arguments: str) -> tuple[str, ...]:
    packages = ("--packages", str(peers.packages)) if peers.packages is not None else ()
    return (peers.python, "-m", f"benchmarks.gpu.peers.run_{peer}", *packages, *arguments)


def missing(peers: Peers, peer: str) -> str:
    """Return why a peer's launcher cannot run it; empty if it can."""
    command, root = _launcher(peers, peer, "--check"), Path(__file__).parents[3]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=root)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{peers.python} does not run: {error}"
    if done.returncode == 0:
        return ""
    said = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
    return f"{said}: a folder with it is named by --peers, or its Python by --peer-python"


def _too_large(need_bytes: int, host_bytes: int) -> str:
    if need_bytes <= host_bytes:
        return ""
    return f"it takes about {format_size(need_bytes)} of host memory, {format_size(host_bytes)} are there"
