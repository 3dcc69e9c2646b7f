"""Measures the costs of passes besides products, attention and transfers, in the engine itself on small models written for this."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig

from flexgen.base.quantities import MIB
from flexgen.checkpoint.dummy import write_random_checkpoint
from flexgen.devices.open import open_device
from flexgen.engine.engine import Engine
from flexgen.formats.plain import dtype_name
from flexgen.io.offload import OffloadFolder
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.plan.machine import Machine, Overheads, Rate, has_device_tier
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.pass_time import elementwise_bytes, rate_at
from flexgen.profile.compute import random_numbers
from flexgen.request import TokenRequest

MEASURING = "flexgen-measure-"  # the beginning of the names of folders
NUM_LAYERS, NUM_SEQUENCES, NUM_PARTS = 8, 64, 4
WARM_UPS, ROUNDS = 1, 6  # of each kind; the fastest counts, since what disturbs only adds
PASSES, QUICK_PASSES = 9, 7
# A layer as wide as those of small models; intermediate states are INTERMEDIATE / 4 times as wide.
LAYER_WIDTH, INTERMEDIATE, LAYER_TOKENS, LAYER_PROMPT, LAYER_PASSES = 2048, 11, 512, 256, 8
DEVICE_BYTES = 64 * MIB
NO_OVERHEADS = Overheads(per_pass=0, per_sequence=0, per_unit=0, per_layer_and_micro_batch=0, per_gathered_row=0)


def overheads(device: str, dtype: torch.dtype, folder: Path, machine: Machine, *, quick: bool) -> Overheads:
    """Measure fixed costs as differences between runs that differ in one thing: sequences, micro-batches, streamed units, gathered rows.

    Args:
        device: Device, as for `measure`.
        dtype: Dtype that is computed in.
        folder: Folder for a temporary checkpoint of a few megabytes.
        machine: Any machine; only the log of a run depends on its rates.
        quick: Whether to measure less.
    """
    base = _policy(device, dtype, machine)
    kinds = {  # sequences, policy
        "one": (1, base),
        "many": (NUM_SEQUENCES, base),
        "cut": (NUM_SEQUENCES, dataclasses.replace(base, micro_batch_tokens=NUM_SEQUENCES // NUM_PARTS)),
        "gathered": (NUM_SEQUENCES, dataclasses.replace(base, embedding_resident=False)),
        "streamed": (1, dataclasses.replace(base, weights=Fractions(disk=1.0))),
    }
    with OffloadFolder(folder, MEASURING) as scratch, contextlib.ExitStack() as stack:
        config = _config(64, NUM_LAYERS)
        write_random_checkpoint(config, scratch / "model", dtype)
        engines = {
            kind: stack.enter_context(Engine(_model(scratch / "model", config, dtype), policy, backend=open_device(device, DEVICE_BYTES)))
            for kind, (_, policy) in kinds.items()
        }
        seconds = dict.fromkeys(kinds, math.inf)
        for number in range(WARM_UPS + (1 if quick else ROUNDS)):  # in turn, since machines are now faster and now slower
            for kind, (num_seqs, _) in kinds.items():
                taken = _pass_seconds(engines[kind], machine, num_seqs, QUICK_PASSES if quick else PASSES)
                if number >= WARM_UPS:
                    seconds[kind] = min(seconds[kind], taken)
        num_units = engines["streamed"].runner.num_units
    one, many, cut = seconds["one"], seconds["many"], seconds["cut"]
    layer = max(cut - many, 0.0) / (NUM_PARTS - 1) / NUM_LAYERS
    return Overheads(
        per_pass=max(one - NUM_LAYERS * layer, 0.0),
        per_sequence=max(many - one, 0.0) / (NUM_SEQUENCES - 1),
        per_unit=max(seconds["streamed"] - one, 0.0) / num_units,
        per_layer_and_micro_batch=layer,
        per_gathered_row=max(seconds["gathered"] - many, 0.0) / NUM_SEQUENCES,
    )


def elementwise_rate(dtype: torch.dtype, folder: Path, machine: Machine, max_bytes: int) -> Rate:
    """Measure everything that a layer does on a CPU besides products and attention (norms, activations, rotations, ...), in bytes/s.

    A layer of real width computes a pass of prompts.  The time that products and attention do not account for is divided into the bytes
    that `elementwise_bytes` counts.  By itself such code is three times faster than in a model (docs/log.md).

    Args:
        dtype: Dtype that is computed in.
        folder: Folder for a temporary checkpoint.
        machine: The machine with its rates of products and attention, and its overheads.
        max_bytes: Most memory to use.
    """
    width = LAYER_WIDTH
    while 2 * _layer_bytes(width, dtype) > max_bytes:
        width //= 2
    name = dtype_name(dtype)
    with OffloadFolder(folder, MEASURING) as scratch:
        config = _config(width, 1)
        write_random_checkpoint(config, scratch / "model", dtype)
        policy = dataclasses.replace(
            _policy("cpu", dtype, machine), micro_batch_tokens=LAYER_TOKENS, max_num_seqs=LAYER_TOKENS // LAYER_PROMPT,
            prefill_tokens=LAYER_TOKENS, kv_host_bytes=64 * MIB, workspace_bytes=64 * MIB, longest_sequence=LAYER_PROMPT + 1,
        )  # fmt: skip
        machine = dataclasses.replace(machine, elementwise={name: Rate(math.inf, math.inf)})
        products = _Products(width, dtype)
        rounds: list[float] = []
        with Engine(_model(scratch / "model", config, dtype), policy) as engine:
            for _ in range(LAYER_PASSES):
                log = engine.new_log(machine)
                began = time.perf_counter()
                list(engine.generate(_requests(LAYER_TOKENS // LAYER_PROMPT, 1, prompt_len=LAYER_PROMPT), log=log))
                taken = time.perf_counter() - began
                # Products beside it in time: what slows both by the same factor says nothing of the rest.
                pace = products.seconds() / products.expected_seconds(machine)
                left = taken / pace - log.passes.expected_seconds
                moved = LAYER_TOKENS * elementwise_bytes(width, INTERMEDIATE * width // 4, name)
                rounds.append(moved / max(left, moved / machine.host_memory.best))  # differences scatter, but nothing is faster than memory
    return Rate.of(rounds[1:])


class _Products:
    """The matrix products of such a layer, alone."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._name = dtype_name(dtype)
        shapes = ((width, width, 2), (width // 4, width, 2), (INTERMEDIATE * width // 4, width, 2), (width, INTERMEDIATE * width // 4, 1))
        host = torch.device("cpu")
        self._work = [
            (random_numbers((LAYER_TOKENS, features_in), host, dtype), random_numbers((out, features_in), host, dtype), n)
            for out, features_in, n in shapes
        ]

    def seconds(self) -> float:
        """Compute the products once, and return the seconds that they took."""
        began = time.perf_counter()
        for x, weight, count in self._work:
            for _ in range(count):
                torch.nn.functional.linear(x, weight)
        return time.perf_counter() - began

    def expected_seconds(self, machine: Machine) -> float:
        """Return the seconds that the products should take by the machine's typical rates."""
        flops = sum(2 * LAYER_TOKENS * weight.numel() * count for _, weight, count in self._work)
        return float(flops / rate_at(machine.dense[self._name], LAYER_TOKENS))


def _layer_bytes(width: int, dtype: torch.dtype) -> int:
    return (2 * width * width + 2 * width * width // 4 + 3 * width * INTERMEDIATE * width // 4) * dtype.itemsize


def _config(hidden_size: int, num_layers: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden_size, intermediate_size=INTERMEDIATE * hidden_size // 4, num_hidden_layers=num_layers,
        num_attention_heads=max(hidden_size // 128, 4), num_key_value_heads=max(hidden_size // 512, 2), vocab_size=1024,
        max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> AssembledModel:
    return assemble_model(folder, config, dtype, unit_bytes=1 * MIB)  # a unit is a whole layer


def _policy(device: str, dtype: torch.dtype, machine: Machine) -> Policy:
    on_device = has_device_tier(device)
    home = Fractions(device=1.0) if on_device else Fractions(host=1.0)
    return Policy(
        device=device, dtype=dtype_name(dtype), weights=home, kv=home, kv_device_bytes=16 * MIB if on_device else 0,
        kv_host_bytes=0 if on_device else 16 * MIB, kv_disk_bytes=0, host_ring_bytes=4 * MIB, device_ring_bytes=4 * MIB if on_device else 0,
        workspace_bytes=16 * MIB, embedding_resident=True, schedule="zigzag", max_num_seqs=NUM_SEQUENCES, prefill_tokens=NUM_SEQUENCES,
        micro_batch_tokens=NUM_SEQUENCES, page_tokens=16, compute_threads=machine.cores, io_threads=machine.io_threads, longest_sequence=64,
    )  # fmt: skip


def _pass_seconds(engine: Engine, machine: Machine, num_seqs: int, num_passes: int) -> float:
    """Return the seconds of a pass of next tokens: the median of all passes but the first, which has the prompts, and the last."""
    ends: list[float] = []
    requests, log = _requests(num_seqs, num_passes), engine.new_log(machine)
    list(engine.generate(requests, log=log, on_pass=lambda unfinished: ends.append(time.perf_counter())))
    return statistics.median(after - before for before, after in itertools.pairwise(ends[:-1]))


def _requests(num_seqs: int, num_tokens: int, *, prompt_len: int = 1) -> list[TokenRequest]:
    return [TokenRequest(index=index, prompt_token_ids=(1 + index,) * prompt_len, max_tokens=num_tokens) for index in range(num_seqs)]
