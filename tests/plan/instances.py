"""Random small planning problems, drawn so that every resource is at times the bottleneck and every tier at times too small."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, replace

from machines import machine_of, steady

from flexgen.base.quantities import GIB, MIB
from flexgen.options import EngineOptions
from flexgen.plan.machine import LAYER_OPERATIONS, Limits, Machine, Overheads
from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.policy import PAGE_TOKENS
from flexgen.plan.price.weights import memory_bytes
from flexgen.plan.search.space import Space
from flexgen.plan.workload import Workload

PROCESS_BYTES = 100 * MIB
TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What `solve` is given."""

    options: EngineOptions
    spec: ModelSpec
    machine: Machine
    limits: Limits
    workload: Workload

    def space(self) -> Space:
        return Space(self.options, self.spec, self.machine, self.limits, self.workload, PROCESS_BYTES, TIERS)


def instance_of(seed: int, device: str | None = None) -> Instance:
    """The problem of that number, on any device; it may have no solution."""
    draw = random.Random(seed)
    drawn = draw.choice(["cpu", "cpu", "sim", "cuda"])
    device = device or drawn
    spec = _spec(draw)
    workload = _workload(draw)
    return Instance(
        options=_with_attention(_options(draw, device), seed, device),
        spec=spec,
        machine=_machine(draw, device),
        limits=_limits(draw, device, spec, workload),
        workload=workload,
    )


def copying_instance_of(seed: int) -> Instance:
    """A problem beside a device with what only that costs: many launches, units that it decodes, prompts that go on with stored KV."""
    instance, draw = instance_of(seed, "cuda"), random.Random(seed)
    spec, machine, workload = instance.spec, instance.machine, instance.workload
    units = [
        dataclasses.replace(unit, encoded_bytes=unit.disk_bytes) if unit.disk_bytes < unit.decoded_bytes else unit for unit in spec.units
    ]
    layers = sum(group.num_layers for group in spec.kv_groups)
    shared = min(workload.prompt_lens) // PAGE_TOKENS * PAGE_TOKENS * draw.choice([0, 1])
    tokens = instance.options.micro_batch_tokens or draw.choice([None, 32, 64])
    return dataclasses.replace(
        instance,
        options=dataclasses.replace(instance.options, micro_batch_tokens=tokens),
        spec=dataclasses.replace(
            spec, units=tuple(units), decoded_from={"int4": 1}, operations=round(draw.uniform(0.5, 8) * layers * LAYER_OPERATIONS)
        ),
        machine=dataclasses.replace(
            machine,
            overheads=dataclasses.replace(machine.overheads, per_operation=machine.overheads.per_layer_and_micro_batch / 60),
            elementwise={"bfloat16": steady(_log(draw, 1e9, 1e12))},
        ),
        workload=dataclasses.replace(workload, shared_lens=(0, *(shared,) * (len(workload) - 1))),
    )


def _log(draw: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** draw.random()


def _spec(draw: random.Random) -> ModelSpec:
    layers, hidden = draw.randint(2, 12), draw.choice([128, 256, 512])
    unit_bytes = int(_log(draw, 0.2, 8) * MIB)
    stored = draw.choice([1.0, 1.0, 1.0, 0.25, 2.0])
    experts = draw.choice([1.0, 1.0, 0.25])
    names = ["attention", "mlp"] if experts == 1.0 else ["attention", "experts.0", "experts.1"]
    units = [
        _unit(f"layers.{layer}.{name}", unit_bytes, stored, experts if "experts" in name else 1.0)
        for layer in range(layers)
        for name in names[: draw.randint(1, 3) if layer else None]
    ]
    units.append(_unit("head", unit_bytes * draw.randint(1, 2), stored, 1.0, head=True))
    windowed = draw.choice([0, 0, layers // 2])
    per_layer = draw.choice([hidden, 2 * hidden, 8 * hidden])
    groups = [KVGroupSpec(num_layers=layers - windowed, bytes_per_token=per_layer, attention_flops_per_pair=4.0 * hidden)]
    if windowed:
        groups.append(
            KVGroupSpec(num_layers=windowed, bytes_per_token=per_layer, attention_flops_per_pair=4.0 * hidden, window=draw.randint(20, 300))
        )
    return ModelSpec(
        name="small", model_type="llama", units=tuple(units), kv_groups=tuple(groups), resident_bytes=4096 * layers,
        embedding_bytes=draw.choice([0, 1, 4]) * MIB, embedding_row_bytes=2 * hidden, hidden_size=hidden, intermediate_size=3 * hidden,
        vocab_size=4000, max_position_embeddings=4096,
    )  # fmt: skip


def _unit(name: str, decoded: int, stored: float, active: float, *, head: bool = False) -> UnitSpec:
    return UnitSpec(
        name=name, disk_bytes=int(decoded * stored), decoded_bytes=decoded, flops_per_token=active * decoded, head=head, plain=stored == 1.0
    )


def _machine(draw: random.Random, device: str) -> Machine:
    flops = _log(draw, 2e10, 5e12 if device == "cpu" else 5e13)
    scale = draw.choice([1e-3, 0.1, 1.0])
    return machine_of(
        device=device,
        dense={"bfloat16": [(16, 0.3 * flops), (64, 0.7 * flops), (256, flops), (1024, flops)]},
        attention={"bfloat16": 0.2 * flops},
        disk_read=_log(draw, 1e8, 8e9),
        disk_write=_log(draw, 1e8, 4e9),
        host_to_device=_log(draw, 2e9, 3e10),
        device_to_host=_log(draw, 2e9, 3e10),
        host_memory=_log(draw, 1e10, 1e11),
        decode_attention={"host": {"bfloat16": ((1.0, steady(_log(draw, 2e9, 3e10))),)}},
        overheads=Overheads(
            per_pass=5e-3 * scale, per_sequence=1e-5 * scale, per_unit=3e-4 * scale, per_layer_and_micro_batch=3e-4 * scale,
            per_gathered_row=2e-5 * scale,
        ),
    )  # fmt: skip


def _workload(draw: random.Random) -> Workload:
    count, longest, answers = draw.choice([1, 8, 30, 60]), draw.choice([30, 150, 400]), draw.choice([2, 12, 40])
    lengths = {
        "equal": lambda: (longest, answers),
        "mixed": lambda: draw.choice([(longest, answers), (longest // 3, 2 * answers), (longest // 2, answers // 2)]),
        "ragged": lambda: (draw.randint(1, longest), draw.randint(1, 2 * answers)),
    }[draw.choice(["equal", "mixed", "ragged"])]
    drawn = [lengths() for _ in range(count)]
    return Workload(prompt_lens=tuple(s for s, _ in drawn), output_lens=tuple(n for _, n in drawn))


def _limits(draw: random.Random, device: str, spec: ModelSpec, workload: Workload) -> Limits:
    weights = sum(memory_bytes(unit, "host", "cpu") for unit in spec.units)
    kv = sum(spec.kv_bytes(s + n) for s, n in zip(workload.prompt_lens, workload.output_lens, strict=True))
    # Beside weights and KV a plan needs rings, activations, and pages for one sequence.
    needs = 4 * max(unit.decoded_bytes for unit in spec.units) + kv // len(workload) + 4 * MIB
    host = PROCESS_BYTES + 52 * MIB + needs + draw.uniform(0.0, 1.2) * (weights * draw.choice([0, 1]) + kv * draw.choice([0.2, 1]))
    room = needs + draw.uniform(0.0, 1.0) * (weights * draw.choice([0, 1]) + kv * draw.choice([0.2, 1]))
    return Limits(
        device=device, host_bytes=int(host / 0.98), host_source="test", host_total_bytes=24 * GIB, host_total_source="test",
        device_bytes=0 if device == "cpu" else int(room), device_total_bytes=8 * GIB,
        disk_bytes=draw.choice([0, kv // 2, 100 * GIB]), disk_total_bytes=100 * GIB, offload_dir="/tmp", offload_in_memory=False,
    )  # fmt: skip


def _options(draw: random.Random, device: str) -> EngineOptions:
    pins = {
        "weights": ["disk=1", "host=.5,disk=.5"] + (["device=.2,host=.3,disk=.5"] if device != "cpu" else []),
        "kv": ["host=1"] + (["device=.5,host=.5"] if device != "cpu" else []),
        "max_num_seqs": [3, 16],
        "micro_batch_tokens": [64, 100],
        "schedule": ["diagonal", "zigzag"],
    }
    return EngineOptions(dtype="bfloat16", **{name: draw.choice(values) for name, values in pins.items() if draw.random() < 0.15})


def _with_attention(options: EngineOptions, seed: int, device: str) -> EngineOptions:
    """The options, which now and then say where next tokens attend to KV in host memory."""
    pins = ("auto",) * 4 + (("on", "off") if device != "cpu" else ())
    return replace(options, host_attention=random.Random(f"{seed} attention").choice(pins))
