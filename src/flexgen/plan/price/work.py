"""The work of a pass, resource by resource: bytes and FLOPs, and the least seconds that they can take.

Knows nothing of schedules. `price` turns the load of a pass into work; `ideal_seconds` divides work by best rates. The numbers may be
scalars (one pass, as the engine counts it) or equally long arrays (all passes of a simulation).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import Machine, has_device_tier, int8_name
from flexgen.plan.model import KVGroupSpec, ModelSpec
from flexgen.plan.policy import KV_RING_BATCHES, LEAST_KEPT, Policy

# Earlier keys and values for a prompt on a device are read in their pages, written side by side in the dtype of computing, and read and
# written again into the memory from which the link takes them.
GATHERED_COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """The bytes that one pass moves and the FLOPs that it computes.

    Attributes:
        disk_read_bytes: The bytes of streamed units, gathered embedding rows and spilled KV that are read.
        disk_write_bytes: The bytes of spilled KV that are written.
        host_to_device_bytes: The bytes over the link to a separate device; 0 on a CPU device.
        device_to_host_bytes: The bytes over the link back; 0 on a CPU device.
        dense_flops: The FLOPs of linear layers in the dtype of computing; those of the head for sampled and scored positions only.
        int8_flops: The FLOPs of linear layers in int8.
        attention_flops: The FLOPs of the visible (query, key) pairs of prompts.
        step_flops: The FLOPs of next tokens' attention to KV on the device.
        step_bytes: The KV bytes that this attention sees.
        sparse_step_bytes: Those of them that count as attended to sparsely (see `sparse_bytes`).
        host_step_flops: The FLOPs of next tokens' attention that the host computes.
        host_step_bytes: The KV bytes that the host's attention sees.
        host_sparse_step_bytes: Those of them that count as attended to sparsely.
        host_memory_bytes: The bytes that cross the host's memory bus: disk transfers, copies, decoding, and the KV that next tokens attend
            to where it lives on the host (weights read by a matrix product are part of its rate).
        gathered_bytes: The bytes that the host reads and writes to gather earlier keys and values for prompts on a device.
        decoded_bytes: The bytes that decode stages of the host yield.
        device_decoded_bytes: The bytes that those of a device yield, where a unit may be decoded several times in a pass.
        num_tokens: The tokens that are computed, prompts included.
        num_prompt_tokens: The number of those tokens that belong to prompts.
        num_sequences: The sequences whose last token so far is computed: next tokens, and prompts that end.
        num_sampled: The positions that yield a token.
        num_scored: The positions at which known tokens are scored.
        num_micro_batches: The micro-batches, as few as the policy's size, homes and kinds allow.
        num_streamed_units: The units that stream.
        num_disk_requests: The reads and writes of KV pages on disk: one each of keys and of values, or of both, per sequence and layer.
    """

    disk_read_bytes: float = 0
    disk_write_bytes: float = 0
    host_to_device_bytes: float = 0
    device_to_host_bytes: float = 0
    dense_flops: float = 0
    int8_flops: float = 0
    attention_flops: float = 0
    step_flops: float = 0
    step_bytes: float = 0
    sparse_step_bytes: float = 0
    host_step_flops: float = 0
    host_step_bytes: float = 0
    host_sparse_step_bytes: float = 0
    host_memory_bytes: float = 0
    gathered_bytes: float = 0
    decoded_bytes: float = 0
    device_decoded_bytes: float = 0
    num_tokens: float = 0
    num_prompt_tokens: float = 0
    num_sequences: float = 0
    num_sampled: float = 0
    num_scored: float = 0
    num_micro_batches: float = 0
    num_streamed_units: float = 0
    num_disk_requests: float = 0

    def __add__(self, other: PassWork) -> PassWork:
        return PassWork(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """The tokens that one pass carries; each number may be an array over passes.

    Attributes:
        prompt_tokens: The prompt tokens of sequences admitted by this pass, by home tier of their KV.
        num_prompts: The number of those sequences, by home tier of their KV.
        next_tokens: The number of sequences that decode, by home tier of their KV.
        prompt_pairs: The visible pairs of the prompts, per KV group (all layers of a group are alike).
        attended_tokens: The visible tokens of the next tokens, by home tier and then per KV group.
        repeated_tokens: The attended tokens that need not be brought to where they are attended to, from disk or from host memory to the
            device, because another sequence of the micro-batch has brought them; indexed like `attended_tokens`.
        earlier_tokens: The visible tokens before prompts and before later chunks of them, which others or earlier chunks have stored;
            indexed like `attended_tokens`. Homes may be left out where that is not wanted.
        num_sampled: The number of positions that yield a token.
        num_scored: The number of positions at which known tokens are scored.
    """

    prompt_tokens: Mapping[str, Any]
    num_prompts: Mapping[str, Any]
    next_tokens: Mapping[str, Any]
    prompt_pairs: Sequence[Any]
    attended_tokens: Mapping[str, Sequence[Any]]
    repeated_tokens: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    earlier_tokens: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    num_sampled: Any
    num_scored: Any = 0


def attended_flops(groups: Sequence[KVGroupSpec], pairs: Sequence[Any]) -> Any:
    """Return the attention FLOPs of `pairs` visible pairs per group."""
    return sum(group.num_layers * group.attention_flops_per_pair * each for group, each in zip(groups, pairs, strict=True))


def attended_bytes(groups: Sequence[KVGroupSpec], tokens: Sequence[Any]) -> Any:
    """Return the KV bytes that next tokens with `tokens` visible tokens per group see."""
    return sum(group.num_layers * group.bytes_per_token * each for group, each in zip(groups, tokens, strict=True))


def exact_bytes(groups: Sequence[KVGroupSpec], tokens: Sequence[Any]) -> Any:
    """Return the KV bytes of `tokens` tokens per group in the dtype of computing."""
    sizes = [group.num_layers * (group.exact_bytes_per_token or group.bytes_per_token) for group in groups]
    return sum(size * each for size, each in zip(sizes, tokens, strict=True))


def sparse_bytes(spec: ModelSpec, tokens: Sequence[Any], num_steps: Any) -> Any:
    """Return how many KV bytes of `num_steps` next tokens with `tokens` visible tokens per group count as attended to sparsely.

    Tokens that see many positions leave out all but their share.  Others keep the least number, which is more; of what they see as much
    counts as they leave out, relative to that.
    """
    share = spec.sparse_attention
    if share is None:
        return 0
    left_out = [np.maximum(seen - np.maximum(share * seen, LEAST_KEPT * num_steps), 0) for seen in tokens]
    return attended_bytes(spec.kv_groups, left_out) / (1 - share)


def unread_bytes(spec: ModelSpec, tokens: Sequence[Any], num_steps: Any) -> Any:
    """Return how many bytes of values `num_steps` next tokens with `tokens` visible tokens per group leave out.

    The heads that share a key head are assumed to keep different positions, each its share or the least that it keeps.
    """
    share = spec.sparse_attention
    if share is None:
        return 0
    total: Any = 0
    for group, seen in zip(spec.kv_groups, tokens, strict=True):
        kept = np.maximum(share * seen, LEAST_KEPT * num_steps) * group.queries_per_key
        total = total + group.num_layers * group.value_bytes_per_token * np.maximum(seen - kept, 0)
    return total


def brought_bytes(spec: ModelSpec, tokens: Sequence[Any], num_steps: Any, page_tokens: int) -> list[Any]:
    """Return, for a layer of each group, the bytes of the pages in which `num_steps` next tokens see `tokens` tokens.

    A token's own page is on average half filled; where it is a page of its own format, all of that is brought.
    """
    own = [
        page_tokens * group.exact_bytes_per_token if group.exact_bytes_per_token else (page_tokens - 1) / 2 * group.bytes_per_token
        for group in spec.kv_groups
    ]
    return [group.bytes_per_token * seen + num_steps * rest for group, seen, rest in zip(spec.kv_groups, tokens, own, strict=True)]


def comes_to_the_device(home: str, policy: Policy) -> bool:
    """Return whether the pages of next tokens whose KV lives there come to the device to be attended to."""
    return home == "host" and has_device_tier(policy.device) and not policy.host_attention


def price(load: PassLoad, spec: ModelSpec, policy: Policy, weights: PassWork) -> PassWork:
    """Return the work of a pass: `weights` (from `weights_work`), and the work that its slices add under the policy's homes."""
    groups, device = spec.kv_groups, policy.device
    prompt_tokens, next_tokens = sum(load.prompt_tokens.values()), sum(load.next_tokens.values())
    tokens = prompt_tokens + next_tokens
    disk_read, disk_write, memory = weights.disk_read_bytes, weights.disk_write_bytes, weights.host_memory_bytes
    to_device, to_host = weights.host_to_device_bytes, weights.device_to_host_bytes
    steps: dict[str, Any] = {f"{where}{kind}": 0 for where in ("", "host_") for kind in ("step_flops", "step_bytes", "sparse_step_bytes")}
    requests: Any = 0
    gathered: Any = 0
    if not policy.embedding_resident:
        rows = tokens * spec.embedding_row_bytes
        disk_read = disk_read + rows
        if has_device_tier(device):
            to_device, memory = to_device + rows, memory + rows
    # With a separate device, q goes to the host, which attends to the KV there, and the result comes back: about hidden_size each.
    crossing = sum(group.num_layers for group in groups) * spec.hidden_size * DTYPE_BYTES[policy.dtype]
    for home, attended in load.attended_tokens.items():
        flops, read = attended_flops(groups, attended), attended_bytes(groups, attended)
        linked = comes_to_the_device(home, policy)
        where = "" if home == "device" or linked else "host_"
        steps[f"{where}step_flops"] = steps[f"{where}step_flops"] + flops
        steps[f"{where}step_bytes"] = steps[f"{where}step_bytes"] + read
        sparsely = sparse_bytes(spec, attended, load.next_tokens[home])
        steps[f"{where}sparse_step_bytes"] = steps[f"{where}sparse_step_bytes"] + sparsely
        if home == "device":
            continue
        new_tokens = load.prompt_tokens[home] + load.next_tokens[home]
        written = new_tokens * spec.kv_bytes_per_token
        if has_device_tier(device) and home in load.earlier_tokens:
            crosses = exact_bytes(groups, load.earlier_tokens[home])
            moved = attended_bytes(groups, load.earlier_tokens[home]) + GATHERED_COPIES * crosses
            gathered, to_device, memory = gathered + moved, to_device + crosses, memory + moved + crosses
        if linked:  # pages are read, written to pinned memory, and read by the link
            repeated = load.repeated_tokens.get(home, [0] * len(groups))
            seen = [tokens_seen - again for tokens_seen, again in zip(attended, repeated, strict=True)]
            pages = brought_bytes(spec, seen, load.next_tokens[home], policy.page_tokens)
            brought = sum(group.num_layers * each for group, each in zip(groups, pages, strict=True))
            memory, to_device = memory + 3 * brought + written, to_device + brought
            to_host = to_host + new_tokens * spec.exact_kv_bytes_per_token
            continue
        memory = memory + read + written
        if home == "host":  # elsewhere values are read before it is known which are kept
            memory = memory - unread_bytes(spec, attended, load.next_tokens[home])
        if has_device_tier(device):
            to_host = to_host + new_tokens * spec.exact_kv_bytes_per_token + load.next_tokens[home] * crossing
            to_device = to_device + load.next_tokens[home] * crossing
        if home == "disk":
            fetched = read - attended_bytes(groups, load.repeated_tokens[home]) if home in load.repeated_tokens else read
            fetched, written = fetched * spec.disk_kv_growth, written * spec.disk_kv_growth
            disk_read, disk_write, memory = disk_read + fetched, disk_write + written, memory + fetched + written
            # Each sequence's keys and values are read in one piece each, or in one; a next token fills a page once in page_tokens.
            pieces = load.num_prompts[home] + load.next_tokens[home] * (1 + 1 / policy.page_tokens)
            requests = requests + sum(group.num_layers * (1 if group.slot_bytes_per_token else 2) for group in groups) * pieces
    in_int8, number = spec.int8_flops_per_token, _num_micro_batches(load, spec, policy)
    return PassWork(
        disk_read_bytes=disk_read,
        disk_write_bytes=disk_write,
        host_to_device_bytes=to_device,
        device_to_host_bytes=to_host,
        dense_flops=tokens * (spec.flops_per_token - in_int8) + (load.num_sampled + load.num_scored) * spec.head_flops_per_token,
        int8_flops=tokens * in_int8,
        attention_flops=attended_flops(groups, load.prompt_pairs),
        host_memory_bytes=memory,
        gathered_bytes=gathered,
        decoded_bytes=weights.decoded_bytes,
        device_decoded_bytes=weights.device_decoded_bytes * _times_decoded(load, policy, number),
        num_tokens=tokens,
        num_prompt_tokens=prompt_tokens,
        num_sequences=sum(load.num_prompts.values()) + next_tokens,
        num_sampled=load.num_sampled,
        num_scored=load.num_scored,
        num_micro_batches=number,
        num_streamed_units=weights.num_streamed_units,
        num_disk_requests=requests,
        **steps,
    )


def _times_decoded(load: PassLoad, policy: Policy, num_micro_batches: Any) -> Any:
    """Return how often a device decodes a unit in a pass, at most.

    Each micro-batch that waits for the host's attention decodes it anew, while others compute with later units; those share it.
    """
    waiting = [home for home in load.attended_tokens if home != "device" and not comes_to_the_device(home, policy)]
    apart: Any = sum(-(-load.next_tokens[home] // policy.micro_batch_tokens) for home in waiting)
    return np.maximum(apart + (num_micro_batches > apart), 1)


def _num_micro_batches(load: PassLoad, spec: ModelSpec, policy: Policy) -> Any:
    """Return the number of micro-batches, of one KV home each.

    Next tokens and prompts share one only where computing and all KV are in the same memory. Where pages come to the device, those of a
    micro-batch have room in their part of the ring.
    """
    mixed = not has_device_tier(policy.device)
    number: Any = 0
    for home in load.attended_tokens:
        kinds = [load.prompt_tokens[home], load.next_tokens[home]]
        for tokens in [kinds[0] + kinds[1]] if mixed and home == "host" else kinds:
            number = number - (-tokens // policy.micro_batch_tokens)
        if comes_to_the_device(home, policy) and policy.kv_ring_bytes:
            pages = brought_bytes(spec, load.attended_tokens[home], load.next_tokens[home], policy.page_tokens)
            most = functools.reduce(np.maximum, pages, 0)
            by_number, by_bytes = -(-kinds[1] // policy.micro_batch_tokens), -(-most // (policy.kv_ring_bytes // KV_RING_BATCHES))
            number = number + np.maximum(by_bytes - by_number, 0)
    return number


def ideal_seconds(work: PassWork, machine: Machine, dtype: str) -> dict[str, Any]:
    """Return the least seconds for `work` per resource: work / best rate.

    Attention of unknown rate counts as dense; a link of unknown rate counts as a copy in host memory, which is what a simulated device's
    links are.

    Raises:
        OptionError: The machine was not measured in `dtype`.
    """
    dense = machine.dense_flops(dtype)
    in_int8 = work.int8_flops / machine.dense_flops(int8_name(dtype)) if np.any(work.int8_flops) else 0.0
    attention = machine.attention[dtype].best if dtype in machine.attention else dense
    memory = machine.host_memory
    return {
        "disk_read": work.disk_read_bytes / machine.disk_read.best,
        "disk_write": work.disk_write_bytes / machine.disk_write.best,
        "host_to_device": work.host_to_device_bytes / (machine.host_to_device or memory).best,
        "device_to_host": work.device_to_host_bytes / (machine.device_to_host or memory).best,
        "compute": work.dense_flops / dense + in_int8 + (work.attention_flops + work.step_flops) / attention,
        "host_memory": work.host_memory_bytes / memory.best,
    }


def busiest(seconds: Mapping[str, float]) -> tuple[str, float]:
    """Return the resource that takes longest, and its seconds: no pass can be shorter."""
    resource = max(seconds, key=seconds.__getitem__)
    return resource, seconds[resource]
