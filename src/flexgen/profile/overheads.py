"""What passes cost that move and compute nearly nothing: the engine itself, on a model of a few small layers."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig

from flexgen.engine.engine import Engine
from flexgen.memory.transfer import Backend, CudaDevice, SimulatedDevice
from flexgen.models.dummy import write_random_checkpoint
from flexgen.models.loading import LoadedModel, load_model
from flexgen.plan.machine import Machine, Overheads
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest
from flexgen.sizes import MIB

NUM_LAYERS, NUM_SEQUENCES, NUM_PARTS = 8, 64, 4
RUNS = 3  # of each kind; the fastest counts, since what disturbs only adds
NO_OVERHEADS = Overheads(per_pass=0, per_sequence=0, per_unit=0, per_layer_and_micro_batch=0, per_gathered_row=0)


def overheads(device: str, dtype: torch.dtype, folder: Path, machine: Machine, *, quick: bool) -> Overheads:
    """Differences between runs that differ in one thing: sequences, micro-batches, streamed units, gathered rows.

    Args:
        folder: where a temporary checkpoint of a few megabytes is written.
        machine: any; only what a run reports depends on it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="flexgen-measure-") as name:
        config = _small_config()
        write_random_checkpoint(config, Path(name), dtype)
        base = _policy(device, dtype, machine.cores)
        num_passes = 8 if quick else 24

        def seconds(num_seqs: int, **changes: object) -> float:
            policy = dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]
            return min(_pass_seconds(Path(name), config, dtype, policy, machine, num_seqs, num_passes) for _ in range(1 if quick else RUNS))

        one, many = seconds(1), seconds(NUM_SEQUENCES)
        cut = seconds(NUM_SEQUENCES, micro_batch_tokens=NUM_SEQUENCES // NUM_PARTS)
        gathered = seconds(NUM_SEQUENCES, embedding_resident=False)
        streamed = seconds(1, weights=Fractions(disk=1.0))
        num_units = len(_model(Path(name), config, dtype).layouts)
    layer = max(cut - many, 0.0) / (NUM_PARTS - 1) / NUM_LAYERS
    return Overheads(
        per_pass=max(one - NUM_LAYERS * layer, 0.0),
        per_sequence=max(many - one, 0.0) / (NUM_SEQUENCES - 1),
        per_unit=max(streamed - one, 0.0) / num_units,
        per_layer_and_micro_batch=layer,
        per_gathered_row=max(gathered - many, 0.0) / NUM_SEQUENCES,
    )


def _small_config() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> LoadedModel:
    return load_model(folder, config, dtype, unit_bytes=1 * MIB)  # a unit is a whole layer


def _policy(device: str, dtype: torch.dtype, cores: int) -> Policy:
    on_cpu = device == "cpu"
    home = Fractions(host=1.0) if on_cpu else Fractions(device=1.0)
    return Policy(
        device=device, dtype=str(dtype).removeprefix("torch."), weights=home, kv=home, kv_device_bytes=0 if on_cpu else 16 * MIB,
        kv_host_bytes=16 * MIB if on_cpu else 0, kv_disk_bytes=0, host_ring_bytes=4 * MIB, device_ring_bytes=0 if on_cpu else 4 * MIB,
        workspace_bytes=16 * MIB, embedding_resident=True, schedule="zigzag", max_num_seqs=NUM_SEQUENCES, prefill_tokens=NUM_SEQUENCES,
        micro_batch_tokens=NUM_SEQUENCES, page_tokens=16, compute_threads=cores, io_threads=2 if cores <= 4 else 4, longest_sequence=64,
    )  # fmt: skip


def _pass_seconds(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, policy: Policy, machine: Machine, num_seqs: int, num_passes: int
) -> float:
    """Of a block that is computed together from its one-token prompts on; the first pass warms up."""
    with Engine(_model(folder, config, dtype), policy, machine, backend=_backend(policy.device)) as engine:
        list(engine.generate(_requests(num_seqs, 2)))
        began = time.perf_counter()
        list(engine.generate(_requests(num_seqs, num_passes)))
        return (time.perf_counter() - began) / num_passes


def _requests(num_seqs: int, num_tokens: int) -> list[TokenRequest]:
    return [TokenRequest(index=index, prompt_token_ids=(1 + index,), max_tokens=num_tokens) for index in range(num_seqs)]


def _backend(device: str) -> Backend | None:
    if device == "cpu":
        return None
    return CudaDevice(64 * MIB) if device == "cuda" else SimulatedDevice(64 * MIB)
