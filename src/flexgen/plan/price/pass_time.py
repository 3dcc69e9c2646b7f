"""Expected times of passes on a machine: work at typical rates, with everything that ideal times leave out.

They are linear in the work of a pass, so that the same numbers price a simulated job, a counted pass and a linear program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import (
    LAYER_OPERATIONS,
    Curve,
    Machine,
    has_device_tier,
    int8_name,
    kv_rate_name,
    rounded_from,
    sparse_rate_name,
)
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import Policy
from flexgen.plan.price.weights import active_share
from flexgen.plan.price.work import PassWork

RESOURCES = ("disk", "host_to_device", "device_to_host", "compute", "host_compute", "host_memory", "lead")

# How often elementwise operations of a decoder layer read or write each number of a hidden and of an intermediate state:
# two norms (in float32 inside), two residuals and the rotation; activation and gate.  Rates are measured by the same count.
PASSES_PER_HIDDEN, PASSES_PER_INTERMEDIATE = 40, 5
# As many reads and writes of a float32 take as long as reducing a logit does (to a sum of exponentials, and the largest one).
PASSES_PER_LOGIT, LOGIT_BYTES = 3, 4
# The rate at which formats that were not measured are decoded, as a share of that of casts.
DECODING_OF_CASTS = 0.5


def elementwise_bytes(hidden_size: int, intermediate_size: int, dtype: str) -> int:
    """Return the bytes that one token's elementwise operations in one layer read and write."""
    return (PASSES_PER_HIDDEN * hidden_size + PASSES_PER_INTERMEDIATE * intermediate_size) * DTYPE_BYTES[dtype]


class Expectation:
    """Prices the passes of one model on one machine in one dtype.

    Raises:
        OptionError: The machine was not measured in `dtype`.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, dtype: str) -> None:
        self.spec, self.machine, self.dtype = spec, machine, machine.known(dtype)
        self._dense = machine.dense[dtype]
        self._body: dict[float, float] = {}
        self._head: dict[float, float] = {}
        for unit in spec.units:
            part = self._head if unit.head else self._body
            share = active_share(unit, dtype)
            part[share] = part.get(share, 0.0) + unit.flops_per_token - unit.int8_flops_per_token
        self._int8 = {1.0: spec.int8_flops_per_token} if spec.int8_flops_per_token else {}
        self._int8_dense = machine.dense[machine.known(int8_name(dtype))] if self._int8 else self._dense
        self._kv_name = dtype if spec.kv_format is None else kv_rate_name(dtype, spec.kv_format)
        self._expansion = spec.exact_kv_bytes_per_token / max(spec.kv_bytes_per_token, 1)
        self._num_layers = sum(group.num_layers for group in spec.kv_groups)
        self._issuing_seconds = _issuing_seconds(spec, machine, self._num_layers)
        elementwise = machine.elementwise.get(dtype, machine.host_memory).typical
        of_layer = elementwise_bytes(spec.hidden_size, spec.intermediate_size, dtype)
        self._token_seconds = (self._num_layers * of_layer + spec.expert_bytes_per_token) / elementwise
        self._score_seconds = PASSES_PER_LOGIT * LOGIT_BYTES * spec.vocab_size / elementwise * spec.has_head
        self._attention = machine.attention[dtype].typical if dtype in machine.attention else self._dense[-1][1].typical
        self._decoding, self._device_decoding = decoding_rate(spec, machine, dtype), device_decoding_rate(spec, machine, dtype)

    def resources(self, work: PassWork, policy: Policy, *, times: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Return, by resource, the least seconds that a pass (or each of many) can take because of it.

        On a CPU device, reading and computing slow each other down. While both go on, each takes its factor longer; when one ends, the
        other goes on at its own pace. That makes both linear in both: whichever ends later has the larger value. Beside another device the
        same is true of its link's two directions, of the link and attention on the host, and of that and reading.

        Args:
            work: The work of a pass; its numbers may be arrays over passes.
            policy: The policy that the pass executes.
            times: By resource, how many times as fast it is assumed to be.
        """
        apart = self.apart(work, policy)
        for name, faster in (times or {}).items():
            apart[name] = apart[name] / faster
        return self._together(apart, policy)

    def _together(self, apart: dict[str, Any], policy: Policy) -> dict[str, Any]:
        together = dict(apart)
        for one, other, factor, of_other in self._pairs(policy):
            together[one] = together[one] + apart[other] * of_other * (1 - 1 / factor)
            together[other] = together[other] + apart[one] * factor * (1 - 1 / of_other)
        return together

    def _pairs(self, policy: Policy) -> list[tuple[str, str, float, float]]:
        """Return the pairs of resources that slow each other down, and how many times longer each takes beside the other."""
        machine = self.machine
        if not has_device_tier(policy.device):
            return [("disk", "compute", machine.disk_slowdown, machine.compute_slowdown)]
        return [
            ("host_to_device", "device_to_host", machine.duplex_slowdown, machine.duplex_slowdown),
            ("host_to_device", "host_compute", machine.link_slowdown, machine.host_slowdown),
            ("disk", "host_compute", machine.disk_slowdown, machine.compute_slowdown),
        ]

    def busy(self, work: PassWork, policy: Policy) -> dict[str, Any]:
        """Return the seconds that each resource is in use in a pass, which are more where another resource slows it down."""
        apart = self.apart(work, policy)
        together, slowed = self._together(apart, policy), dict.fromkeys(apart, 1.0)
        for one, other, factor, of_other in self._pairs(policy):
            slowed[one], slowed[other] = slowed[one] * factor, slowed[other] * of_other
        return {name: np.minimum(seconds * slowed[name], together[name]) for name, seconds in apart.items()}

    def apart(self, work: PassWork, policy: Policy) -> dict[str, Any]:
        """Return, by resource, the seconds of a pass (or of each of many), as if each resource worked alone.

        On a CPU device the host's own work (attention to KV, decoding, reading, the modules' code) is part of "compute".
        """
        machine, overheads = self.machine, self.machine.overheads
        micro_batches = np.maximum(work.num_micro_batches, 1)
        compute = _dense_seconds(self._body, self._dense, work.num_tokens, work.num_tokens / micro_batches)
        compute = compute + _dense_seconds(self._int8, self._int8_dense, work.num_tokens, work.num_tokens / micro_batches)
        compute = compute + _dense_seconds(self._head, self._dense, work.num_sampled, work.num_sampled)
        compute = compute + _dense_seconds(self._head, self._dense, work.num_scored, work.num_scored / micro_batches)
        compute = compute + work.num_scored * self._score_seconds
        compute = compute + work.num_tokens * self._token_seconds + work.attention_flops / self._attention
        compute = compute + self.steps_seconds("device", work.step_flops, work.step_bytes, work.sparse_step_bytes)
        compute = compute + work.device_decoded_bytes / self._device_decoding
        lead = micro_batches * self._issuing_seconds + work.num_streamed_units * overheads.per_unit
        lead = lead + work.num_sequences * overheads.per_sequence
        lead = lead + work.num_tokens * overheads.per_gathered_row * (not policy.embedding_resident and self.spec.embedding_row_bytes > 0)
        host = self.steps_seconds("host", work.host_step_flops, work.host_step_bytes, work.host_sparse_step_bytes)
        host = host + work.decoded_bytes / self._decoding
        working = work.disk_read_bytes * machine.disk_core_seconds_per_byte + work.num_disk_requests * machine.disk_request.core_seconds
        host = host + working / machine.cores + work.gathered_bytes / machine.host_memory.typical
        if not has_device_tier(policy.device):
            compute, host, lead = compute + host + lead, 0.0, 0.0
        memory = machine.host_memory
        disk = work.disk_read_bytes / machine.disk_read.typical + work.disk_write_bytes / machine.disk_write.typical
        return {
            "disk": disk + work.num_disk_requests * machine.disk_request.seconds,
            "host_to_device": work.host_to_device_bytes / (machine.host_to_device or memory).typical,
            "device_to_host": work.device_to_host_bytes / (machine.device_to_host or memory).typical,
            "compute": compute,
            "host_compute": host,
            "host_memory": work.host_memory_bytes / memory.typical,
            "lead": lead,
        }

    def seconds(self, work: PassWork, policy: Policy, *, times: Mapping[str, float] | None = None) -> Any:
        """Return the seconds of a pass (or of each of many): its busiest resource's, plus the overhead; `times` as in `resources`."""
        resources = [np.asarray(each, dtype=np.float64) for each in self.resources(work, policy, times=times).values()]
        return functools.reduce(np.maximum, resources) + self.machine.overheads.per_pass

    def sparse_over_dense(self, work: PassWork) -> float | None:
        """Return the time of next tokens' attention in some passes, as a share of that without sparse attention; 1 if there are none.

        None without sparse attention, and where the machine has no rates for it.
        """
        if all(self._sparse_curve(place) is None for place in ("device", "host")):
            return None
        dense = self._attention_seconds(dataclasses.replace(work, sparse_step_bytes=0, host_sparse_step_bytes=0))
        return self._attention_seconds(work) / dense if dense else 1.0

    def _attention_seconds(self, work: PassWork) -> float:
        on_device = self.steps_seconds("device", work.step_flops, work.step_bytes, work.sparse_step_bytes)
        on_host = self.steps_seconds("host", work.host_step_flops, work.host_step_bytes, work.host_sparse_step_bytes)
        return float(np.sum(on_device) + np.sum(on_host))

    def steps_seconds(self, place: str, flops: Any, kv_bytes: Any, sparse_bytes: Any) -> Any:
        """Return the seconds of next tokens' attention to KV, to `sparse_bytes` of it sparsely.

        Where sparse attention has no rate, it counts as dense. Where the rate of a low-bit format is unknown, its numbers are assumed to be
        attended to as fast as those of the dtype of computing.
        """
        sparsely, flops_per_byte = 0.0, flops / np.maximum(kv_bytes, 1)
        if (curve := self._sparse_curve(place)) is not None:
            sparsely, kv_bytes = sparse_bytes / _rate_of_steps(curve, flops_per_byte), kv_bytes - sparse_bytes
            flops = flops_per_byte * kv_bytes
        curves = self.machine.decode_attention.get(place, {})
        curve = curves.get(self._kv_name)
        if curve is None and self.spec.kv_format is not None:
            curve, kv_bytes = curves.get(self.dtype), kv_bytes * self._expansion
        if curve is None:
            memory = self.machine.host_memory.typical
            return sparsely + (kv_bytes / memory if place == "host" else flops / self._attention)
        return sparsely + kv_bytes / _rate_of_steps(curve, flops / np.maximum(kv_bytes, 1))

    def _sparse_curve(self, place: str) -> Curve | None:
        """Return the rates of sparse attention with the model's share; None where there are none."""
        share = self.spec.sparse_attention
        return None if share is None else self.machine.decode_attention.get(place, {}).get(sparse_rate_name(self._kv_name, share))


def _issuing_seconds(spec: ModelSpec, machine: Machine, num_layers: int) -> float:
    """Return the seconds that issuing a micro-batch's work takes: that of layers as they were measured, more or less for other layers.

    The launches of a measured layer are part of its seconds, so only the difference in operations counts.
    """
    overheads = machine.overheads
    others = spec.operations - num_layers * LAYER_OPERATIONS if spec.operations else 0
    return max(num_layers * overheads.per_layer_and_micro_batch + others * overheads.per_operation, 0.0)


def _dense_seconds(flops_by_share: dict[float, float], rates: Curve, tokens: Any, rows: Any) -> Any:
    """Return the seconds of linear layers; experts see their share of the rows."""
    return sum(tokens * flops / rate_at(rates, rows * share) for share, flops in flops_by_share.items())


def decoding_rate(spec: ModelSpec, machine: Machine, dtype: str) -> float:
    """Return the bytes/s of decoded numbers over a model's units, each tensor at the rate of the format or dtype that it is stored in.

    A dtype that was not measured counts as the fastest one that was, or as reading and writing memory; another format that was not
    measured takes DECODING_OF_CASTS of that rate.
    """
    sizes = spec.decoded_from or {spec.number_format: 1}
    seconds = sum(size / _decoding_rate(name, machine, dtype) for name, size in sizes.items())
    return sum(sizes.values()) / seconds


def device_decoding_rate(spec: ModelSpec, machine: Machine, dtype: str) -> float:
    """Return the bytes/s of decoded numbers where the device decodes a model's units; infinite where it decodes none.

    A format that was not measured is estimated: decoding it takes as long as elementwise operations take to read what is stored and to
    write the numbers.
    """
    sizes = _device_formats(spec)
    units = [unit for unit in spec.units if unit.encoded_bytes is not None]
    stored = sum(unit.carried_bytes for unit in units) / max(sum(unit.decoded_bytes for unit in units), 1)
    estimate = machine.elementwise.get(dtype, machine.host_memory).typical / (1 + stored)
    known = {name: rate.typical for name in sizes if (rate := machine.device_casts.get(f"{name} {dtype}")) is not None}
    seconds = sum(size / known.get(name, estimate) for name, size in sizes.items())
    return sum(sizes.values()) / seconds if seconds else math.inf


def estimated_on_device(spec: ModelSpec, machine: Machine, dtype: str) -> list[str]:
    """Return the formats for which `device_decoding_rate` has an estimate only."""
    return [name for name in _device_formats(spec) if f"{name} {dtype}" not in machine.device_casts]


def _device_formats(spec: ModelSpec) -> dict[str, int]:
    """Return the decoded bytes by format; the host casts what is stored in another dtype, and decodes what does not cross as stored."""
    if all(unit.encoded_bytes is None for unit in spec.units):
        return {}
    sizes = spec.decoded_from or {spec.number_format: 1}
    return {name: size for name, size in sizes.items() if name not in DTYPE_BYTES}


def _decoding_rate(stored: str, machine: Machine, dtype: str) -> float:
    if (numbers := rounded_from(stored)) is not None:
        rounding = _rounding_rate(machine, dtype)
        decoded = 1 / DTYPE_BYTES[dtype]  # numbers in each byte that is decoded first
        return rounding if numbers in DTYPE_BYTES else 1 / (1 / rounding + 1 / (decoded * _decoding_rate(numbers, machine, dtype)))
    if (known := machine.casts.get(f"{stored} {dtype}")) is not None:
        return known.typical
    pairs = ((name.split(), rate.typical) for name, rate in machine.casts.items())
    casts = [rate for (source, computed), rate in pairs if computed == dtype and source in DTYPE_BYTES]
    fastest = max(casts, default=machine.host_memory.typical / 3)
    return fastest if stored in DTYPE_BYTES else DECODING_OF_CASTS * fastest


def _rounding_rate(machine: Machine, dtype: str) -> float:
    """Return the bytes/s of numbers that are rounded to int8; where that was not measured, as if each were read twice from memory."""
    known = machine.casts.get(int8_name(dtype))
    return machine.host_memory.typical / (2 * DTYPE_BYTES[dtype]) if known is None else known.typical


def rate_at(curve: Curve, rows: Any) -> Any:
    """Return the typical rate at these row counts; below the smallest one measured, fewer rows take no less time."""
    known = np.array([(size, rate.typical) for size, rate in curve], dtype=np.float64)
    rates = _interpolated(rows, known[:, 0], known[:, 1])
    return rates * np.minimum(np.maximum(rows, 1.0) / known[0, 0], 1.0)


def _rate_of_steps(curve: Curve, flops_per_byte: Any) -> Any:
    """Return the bytes/s of next tokens' attention, between the points of a curve by the logarithm of FLOPs per byte."""
    sizes = np.log([size for size, _ in curve])
    return _interpolated(np.log(np.maximum(flops_per_byte, 1e-9)), sizes, [rate.typical for _, rate in curve])


def _interpolated(at: Any, sizes: Any, values: Any) -> Any:
    """Call `np.interp`, whose types are only partly known."""
    return np.interp(at, sizes, values)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
