"""What the paper's model is asked: a machine, a model, a workload, a policy, and which variant of the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flexgen.options import TIERS
from flexgen.plan.policy import Fractions

BYTES_PER_NUMBER = 2  # everything is float16


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperMachine:
    """Capacities and rates as the released cost model splits them, by phase and by what moves.

    Attributes:
        kv_to_host_bytes_per_s, activations_to_host_bytes_per_s: device to host.
        disk_read_bytes_per_s: of everything but the weights of a decode step, which have a rate of their own.
        kv_to_disk_bytes_per_s, activations_to_disk_bytes_per_s: in prefill; in decode all is written at one rate.
        prefill_flops, decode_flops: linear layers. prefill_attention_flops, decode_attention_flops: on the device.
        host_attention_flops: of decode attention on the host, for GPU batches of 64 sequences and more.
        host_slowdown: c1, c2, c3 of the correction for smaller ones (see `host_flops`).
    """

    name: str
    device_bytes: float
    host_bytes: float
    disk_bytes: float
    host_to_device_bytes_per_s: float
    kv_to_host_bytes_per_s: float
    activations_to_host_bytes_per_s: float
    disk_read_bytes_per_s: float
    decode_weights_read_bytes_per_s: float
    kv_to_disk_bytes_per_s: float
    activations_to_disk_bytes_per_s: float
    decode_write_bytes_per_s: float
    prefill_flops: float
    decode_flops: float
    prefill_attention_flops: float
    decode_attention_flops: float
    host_attention_flops: float
    host_slowdown: tuple[float, float, float]

    def host_flops(self, gpu_batch_size: int, hidden_size: int) -> float:
        """Rate of attention on the host: less for small batches and small models (experimental/cost_model.py, 246-249)."""
        batch, hidden = (max(0.0, math.log2(most / size)) for most, size in ((64, gpu_batch_size), (4096, hidden_size)))
        c1, c2, c3 = self.host_slowdown
        return self.host_attention_flops * max(0.1, 1 + c1 * batch * hidden - c2 * batch - c3 * hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperModel:
    """The shape of an OPT model; embeddings are ignored, as in the paper."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int

    @property
    def layer_bytes(self) -> int:
        """Weights of one layer: 8 h1² + 4 h1 h2."""
        return BYTES_PER_NUMBER * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)

    @property
    def layer_flops_per_token(self) -> int:
        """A multiply and an add per weight."""
        return 2 * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """In one layer: a key and a value."""
        return 2 * BYTES_PER_NUMBER * self.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperWorkload:
    """Sequences without end, all of one length, in tokens."""

    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperPolicy:
    """The paper's policy: the block, and what share of weights, KV cache and hidden states lives where.

    Attention of decode steps runs where the KV lives, KV on disk counting as the host's.
    """

    gpu_batch_size: int
    num_gpu_batches: int
    weights: Fractions
    kv: Fractions
    activations: Fractions

    @property
    def num_sequences(self) -> int:
        """The block size: bls."""
        return self.gpu_batch_size * self.num_gpu_batches

    @classmethod
    def published(cls, gpu_batch_size: int, num_gpu_batches: int, percent: tuple[int, int, int, int, int, int]) -> PaperPolicy:
        """As the paper prints policies: percent of wg, wc, cg, cc, hg, hc; what is left lies on disk."""
        shares = (percent[:2], percent[2:4], percent[4:])
        weights, kv, activations = (Fractions(device=g / 100, host=c / 100, disk=(100 - g - c) / 100) for g, c in shares)
        return cls(gpu_batch_size=gpu_batch_size, num_gpu_batches=num_gpu_batches, weights=weights, kv=kv, activations=activations)


# Bytes of the stages of the prefill and of those of a decode step.
Scratch = Callable[[PaperModel, PaperWorkload, PaperPolicy], tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperVariant:
    """Where the paper's text and the released code (experimental/cost_model.py) differ.

    Attributes:
        prefill_overlap, decode_overlap: groups of terms; those of a group take place one after the other, groups at once.
        capacity_share: of each tier's capacity that a plan may fill (the code's alpha).
        activations_on_disk: whether hidden states may live there.
        host_holds_answers_in_prefill: whether the KV of all n tokens counts on the host from the start.
        scratch: stages of temporary device bytes in the prefill and in decode, no two of which exist at once.
        small_gpu_batches, gpu_batch_step: sizes that the search tries, then multiples of the step (0: powers of two from 4).
        most_gpu_batches: of a block, None for as many as fit.
        stops_at_first_drop: whether the search adds GPU batches only as long as throughput rises.
    """

    name: str
    prefill_overlap: tuple[tuple[str, ...], ...]
    decode_overlap: tuple[tuple[str, ...], ...]
    capacity_share: float
    activations_on_disk: bool
    host_holds_answers_in_prefill: bool
    scratch: Scratch
    small_gpu_batches: tuple[int, ...]
    gpu_batch_step: int
    most_gpu_batches: int | None
    stops_at_first_drop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCase:
    """What is priced: a model and a workload on a machine, by one variant of the equations."""

    machine: PaperMachine
    model: PaperModel
    workload: PaperWorkload
    variant: PaperVariant

    def capacities(self) -> dict[str, float]:
        """Bytes per tier that a plan may fill."""
        machine, share = self.machine, self.variant.capacity_share
        sizes = (machine.device_bytes, machine.host_bytes, machine.disk_bytes)
        return {tier: size * share for tier, size in zip(TIERS, sizes, strict=True)}
