"""Accounts for the memory that a policy reserves, tier by tier and part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flexgen.base.quantities import MIB
from flexgen.options import DTYPE_BYTES
from flexgen.plan.machine import Limits, has_device_tier
from flexgen.plan.model import ModelSpec, UnitSpec
from flexgen.plan.policy import (
    ATTENTION_BYTES,
    ATTENTION_COPIES,
    DECODED_AT_ONCE,
    DECODING_BYTES,
    DEVICE_SCRATCH_UNITS,
    EXPERTS_BYTES,
    INT8_SUMS_BYTES,
    SAMPLED_BLOCK_BYTES,
    SCORED_SLICE_BYTES,
    SCRATCH_UNITS,
    SPARSE_KV_BYTES,
    SPARSE_SCORES_BYTES,
    Fractions,
    Policy,
)
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.price.weights import needs_decode, unit_homes, weight_bytes, weights_work
from flexgen.plan.price.work import PassWork

# Kept free in addition to all that is accounted for: thread stacks, text, code loaded later, fragments of freed memory.
ALLOWANCE_BYTES = 48 * MIB
ALLOWANCE_SHARE = 0.02
# The allocator holds this many times the bytes of live tensors.
FRAGMENTATION = 1.25
# A ring holds at least this many of its largest units.
RING_UNITS = 3
# How many copies there are of the logits that are held at a time, while the model changes them and they are reduced.
SCORED_COPIES = 3
# How many tensors as large as the logits in float64 there are while a device draws tokens from them.
SAMPLED_COPIES = 10
# How many tensors as large as the scores there are while sparse attention sorts them.
SORTED_COPIES = 10
# What is kept of a scored position until its pass is over, and of each of the likeliest tokens beside it: float64 and int64 in tensors,
# then Python's numbers.
SCORE_BYTES, LIKELIEST_BYTES = 256, 128
# The parts of host memory for weights that are kept as stored and for what passes between stages, and that of device memory which belongs
# to no tensor.
ENCODED, HIDDEN, CUDA = "encoded weights", "hidden states", "CUDA context and libraries"


def footprint(policy: Policy, spec: ModelSpec, limits: Limits, *, process_bytes: int) -> dict[str, dict[str, int]]:
    """Return the bytes that the policy reserves, by tier and part."""
    homes = unit_homes(spec, policy.weights)
    return reserved(
        policy, limits, process_bytes=process_bytes, held=weight_bytes(spec, homes, policy.device),
        decoding_bytes=staging_to_decode_bytes(spec, homes, policy.device), small_bytes=spec.resident_bytes,
        embedding_bytes=embedding_table_bytes(spec),
    )  # fmt: skip


def reserved(
    policy: Policy,
    limits: Limits,
    *,
    process_bytes: int,
    held: Mapping[str, int],
    decoding_bytes: int,
    small_bytes: int,
    embedding_bytes: int,
) -> dict[str, dict[str, int]]:
    """Return the bytes that the policy reserves, by tier and part, for weights whose sizes are already known.

    Args:
        policy: The policy.
        limits: The budgets, which decide the allowance and whether KV on disk counts as host memory.
        process_bytes: The resident memory of the process before any weight is loaded.
        held: The bytes of the weights at each home.
        decoding_bytes: Host memory for decoding units before they cross the link to a device.
        small_bytes: The bytes of tensors that never move.
        embedding_bytes: The bytes of the whole input embedding.
    """
    computing = {"small tensors": small_bytes, "embedding": embedding_bytes * policy.embedding_resident}
    computing |= {"workspace": policy.workspace_bytes}
    host = {"process": process_bytes, "allowance": allowance_bytes(limits), "weights": held["host"], ENCODED: held["encoded"]}
    blocks = policy.num_blocks
    host |= {"KV": blocks * policy.kv_host_bytes, "weight staging": policy.host_ring_bytes}
    host |= {"KV staging": policy.kv_staging_bytes + blocks * policy.kv_tail_bytes}
    host |= {"copies": policy.copies_in_bytes + policy.copies_out_bytes + policy.kv_ring_bytes}
    if policy.hidden_bytes:
        host[HIDDEN] = policy.hidden_bytes
    tiers = {"host": host}
    if not has_device_tier(policy.device):
        host |= computing
    else:
        host["decoding"] = decoding_bytes
        device = {CUDA: limits.device_overhead_bytes, **computing, "weights": held["device"]}
        device |= {"weight staging": policy.device_ring_bytes, "KV": blocks * policy.kv_device_bytes}
        device |= {"copies": policy.copies_in_bytes + policy.kv_ring_bytes}
        tiers["device"] = device
    if limits.offload_in_memory:
        host["KV in a memory file system"] = blocks * policy.kv_disk_bytes
    elif policy.kv_disk_bytes:
        tiers["disk"] = {"KV": blocks * policy.kv_disk_bytes}
    return tiers


def embedding_table_bytes(spec: ModelSpec) -> int:
    """Return the memory of the whole embedding; an embedding that is tied to the head's units counts too, because it is a copy."""
    units = [unit for unit in spec.units if not unit.int8_flops_per_token]  # rounded ones say nothing about the dtype
    growth = max(sum(unit.decoded_bytes for unit in units) / max(sum(unit.disk_bytes for unit in units), 1), 1.0)
    return max(spec.embedding_bytes, int(spec.vocab_size * spec.embedding_row_bytes * growth))


def allowance_bytes(limits: Limits) -> int:
    """Return the host bytes that every plan leaves unused."""
    return ALLOWANCE_BYTES + int(ALLOWANCE_SHARE * limits.host_bytes)


def activation_bytes(spec: ModelSpec, sizes: JobSizes, policy: Policy, max_num_seqs: int | None = None) -> int:
    """Return the bytes of activations in the worst case: every micro-batch of the largest pass suspended inside an MLP, and one computing.

    They include the logits, the scores, and the copies that attention makes: q, k, v and the result, the KV of the longest sequence, and on
    a device its temporary tensors and those of experts.

    Args:
        spec: The model.
        sizes: The sizes of the job's requests.
        policy: The policy.
        max_num_seqs: The number of sequences to assume in place of the policy's.
    """
    size, hidden, intermediate = DTYPE_BYTES[policy.dtype], spec.hidden_size, spec.intermediate_size
    longest_prompt, most = sizes.longest_prompt, max_num_seqs or policy.max_num_seqs
    tokens, running = tokens_at_once(sizes, policy, most)
    suspended = tokens * (3 * hidden + 2 * intermediate) * size
    computing = running * ((4 * hidden + 3 * intermediate) * size + 8 * hidden)
    if spec.int8_flops_per_token:  # the codes of the input that was rounded last, the sums of products
        computing += running * max(intermediate, hidden) + INT8_SUMS_BYTES
    has_logits = sizes.has_answers and spec.has_head
    logits = most * spec.vocab_size * 4 * 2 * has_logits
    if has_device_tier(policy.device):  # the host chooses tokens from one row at a time
        logits += SAMPLED_COPIES * min(most * spec.vocab_size * 8, SAMPLED_BLOCK_BYTES) * has_logits
    decoded = 2 if spec.kv_format is None else 4  # prompts attend to their own pages as these are stored, too
    attention = 4 * max(running, longest_prompt) * hidden * size + decoded * sizes.layer + _sparse_bytes(spec, sizes, size)
    if has_device_tier(policy.device):
        attention += min(ATTENTION_BYTES, ATTENTION_COPIES * max(most, 1) * sizes.layer)
        computing += min(EXPERTS_BYTES, running * spec.expert_numbers_per_token * size)
    return int(FRAGMENTATION * (suspended + computing + logits + attention + _scoring_bytes(spec, sizes, policy, most)))


def tokens_at_once(sizes: JobSizes, policy: Policy, max_num_seqs: int) -> tuple[int, int]:
    """Return the most tokens of a pass, and of one of its micro-batches."""
    longest_prompt = sizes.longest_prompt
    prompt_tokens = {
        "diagonal": policy.prefill_tokens + longest_prompt - 1,  # the last prompt may overdraw the quota
        "zigzag": max_num_seqs * longest_prompt,
        "row": max(policy.micro_batch_tokens, longest_prompt),
    }[policy.schedule]
    tokens = max_num_seqs + min(prompt_tokens, sizes.prompt_tokens, max_num_seqs * longest_prompt)
    # Prompts whose KV goes to disk are never cut into chunks.
    return tokens, min(max(policy.micro_batch_tokens, longest_prompt * (policy.kv.disk > 0)), tokens)


def _sparse_bytes(spec: ModelSpec, sizes: JobSizes, size: int) -> int:
    """Return the bytes of computing generated tokens again, together, under sparse attention.

    They are those of the keys and values of a layer in one piece, of some key heads' in float32, values a second time, and of scores.
    """
    if spec.sparse_attention is None:
        return 0
    wide, heads = max(size, 4), min((group.key_heads for group in spec.kv_groups), default=1)
    layer = sizes.layer * wide // size
    at_a_time = min(layer, max(SPARSE_KV_BYTES * wide // 4, layer // heads))
    return sizes.layer + 2 * at_a_time + SORTED_COPIES * SPARSE_SCORES_BYTES * wide // 4


def _scoring_bytes(spec: ModelSpec, sizes: JobSizes, policy: Policy, max_num_seqs: int) -> int:
    """Return the bytes of a slice of the logits of scored positions, and of all scores of a pass."""
    scored = min(sizes.scored_tokens, max_num_seqs * sizes.most_scored) * spec.has_head
    held = min(SCORED_SLICE_BYTES, scored * spec.vocab_size * DTYPE_BYTES[policy.dtype])
    return SCORED_COPIES * held + scored * (SCORE_BYTES + LIKELIEST_BYTES * sizes.num_likeliest)


def scratch_bytes(spec: ModelSpec, homes: Sequence[str], device: str) -> int:
    """Return the memory, where computing happens, that units are decoded into in every pass, or once: some of the largest ones.

    On a CPU these are the units that come from disk or are kept encoded; all others are decoded once, at the start. On a device they are
    those that the device decodes; one that stays there arrives in the same memory.  Where it has no kernels for that, its operations need
    temporary tensors beside that.
    """
    if not has_device_tier(device):
        decoded = [unit.decoded_bytes for unit, home in _placed(spec, homes) if home in ("disk", "encoded") and needs_decode(unit)]
        return SCRATCH_UNITS * max(decoded, default=0)
    by_device = [(unit, home) for unit, home in _placed(spec, homes) if unit.encoded_bytes is not None]
    streamed = max((unit.decoded_bytes for unit, home in by_device if home != "device"), default=0)
    arriving = max((unit.carried_bytes for unit, home in by_device if home == "device"), default=0)
    largest = max((unit.decoded_bytes for unit, _ in by_device), default=0)
    temporary = DECODING_BYTES * min(DECODED_AT_ONCE, largest // DTYPE_BYTES[spec.dtype])
    return DEVICE_SCRATCH_UNITS * streamed + arriving + temporary


def staging_to_decode_bytes(spec: ModelSpec, homes: Sequence[str], device: str) -> int:
    """Return the host memory for the largest unit that the host decodes before it crosses the link to a device."""
    if not has_device_tier(device):
        return 0
    decoded = [unit.carried_bytes for unit, home in _placed(spec, homes) if home in ("disk", "encoded") and needs_decode(unit)]
    return max(decoded, default=0)


def _placed(spec: ModelSpec, homes: Sequence[str]) -> Iterator[tuple[UnitSpec, str]]:
    return zip(spec.units, homes, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A home for every unit, and the sizes that follow from it.

    Attributes:
        held: The bytes of the weights at each home.
        from_disk: The bytes that each pass reads from disk.
        largest_from_disk: The bytes of the largest unit among them.
        over_link: The bytes that each pass sends to a separate device.
        largest_over_link: The bytes of the largest unit among them.
        layer_over_link: The bytes of a layer among them, on average.
        scratch_bytes: Memory to decode into where computing happens.
        decoding_bytes: Host memory for decoding before the link to a device.
        work: The work of moving weights, the same in every pass.
        homes: The homes of at least one unit.
    """

    held: dict[str, int]
    from_disk: int
    largest_from_disk: int
    over_link: int
    largest_over_link: int
    layer_over_link: int
    scratch_bytes: int
    decoding_bytes: int
    work: PassWork
    homes: frozenset[str]


class PlacedWeights:
    """The placements of one model's weights on one kind of device, cached because a search needs them again and again."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._spec, self._device = spec, device
        self._known: dict[Fractions, Placement] = {}

    def __len__(self) -> int:
        """Return the number of cached placements."""
        return len(self._known)

    def of(self, weights: Fractions) -> Placement:
        """Return the placement that honours these shares."""
        if weights not in self._known:
            self._known[weights] = self._laid_out(weights)
        return self._known[weights]

    def _laid_out(self, weights: Fractions) -> Placement:
        homes = unit_homes(self._spec, weights)
        from_disk = [unit.disk_bytes for unit, home in zip(self._spec.units, homes, strict=True) if home == "disk"]
        crossing = [unit.carried_bytes for unit, home in zip(self._spec.units, homes, strict=True) if home != "device"]
        over_link = crossing if has_device_tier(self._device) else []
        return Placement(
            held=weight_bytes(self._spec, homes, self._device),
            from_disk=sum(from_disk),
            largest_from_disk=max(from_disk, default=0),
            over_link=sum(over_link),
            largest_over_link=max(over_link, default=0),
            layer_over_link=sum(over_link) // max(sum(group.num_layers for group in self._spec.kv_groups), 1),
            scratch_bytes=scratch_bytes(self._spec, homes, self._device),
            decoding_bytes=staging_to_decode_bytes(self._spec, homes, self._device),
            work=weights_work(self._spec, homes, self._device),
            homes=frozenset(homes),
        )
