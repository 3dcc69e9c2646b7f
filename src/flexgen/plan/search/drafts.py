"""Draft policies, complete but for their KV, and the memory that they leave: budgets are hard, so every byte is accounted for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen.base.quantities import align_up
from flexgen.options import WEIGHT_HOMES
from flexgen.plan.machine import Limits, Machine, has_device_tier
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import PAGE_TOKENS, Fractions, Policy
from flexgen.plan.price.copies import with_copies, with_ring
from flexgen.plan.price.memory import RING_UNITS, PlacedWeights, activation_bytes, embedding_table_bytes, reserved
from flexgen.plan.price.requests import JobSizes
from flexgen.plan.price.weights import can_stay_encoded, unit_homes, weight_bytes

# A ring holds the bytes that a link delivers in this time, but (beyond its least number of units) at most this share of its tier.
RING_SECONDS = 0.3
RING_SHARE = 0.05
# A ring on a device holds what streams of so many layers: while units of one wait for attention, those of the next arrive.
RING_LAYERS = 2
DEVICE_RING_SHARE = 0.15


class Drafts:
    """Draft policies for one model, machine, job and budget.

    Args:
        spec: The model.
        machine: The machine.
        limits: The budgets.
        sizes: The needs of the job's requests.
        placed: The placements of the weights.
        dtype: The dtype of computing.
        process_bytes: The resident memory of the process before any weight is loaded.
        kv: The pinned shares of KV; None where they are free.
        num_seqs: The number of live sequences that a draft has workspace for.
        num_blocks: The number of blocks of sequences in flight.
    """

    def __init__(
        self,
        spec: ModelSpec,
        machine: Machine,
        limits: Limits,
        sizes: JobSizes,
        placed: PlacedWeights,
        *,
        dtype: str,
        process_bytes: int,
        kv: Fractions | None,
        num_seqs: int,
        num_blocks: int = 1,
    ) -> None:
        self._spec, self._machine, self._limits, self._sizes, self._placed = spec, machine, limits, sizes, placed
        self._dtype, self._process_bytes, self._kv, self._least_seqs, self._num_blocks = dtype, process_bytes, kv, num_seqs, num_blocks
        self._embedding_bytes = embedding_table_bytes(spec)
        self._known: dict[tuple[Fractions, str, int, int, bool, bool], Policy] = {}

    def draft(
        self, weights: Fractions, schedule: str, micro_batch_tokens: int, prefill_tokens: int, *, spills: bool, host_attention: bool = True
    ) -> Policy:
        """Return a policy with everything but KV, with workspace for the pinned number of sequences or one.

        If it `spills`, it has staging for KV on disk; without `host_attention`, a ring for pages on their way to the device.
        """
        key = (weights, schedule, micro_batch_tokens, prefill_tokens, spills, host_attention)
        if key not in self._known:
            self._known[key] = self._drafted(*key)
        return self._known[key]

    def _drafted(
        self, weights: Fractions, schedule: str, micro_batch_tokens: int, prefill_tokens: int, spills: bool, host_attention: bool
    ) -> Policy:
        placement, limits = self._placed.of(weights), self._limits
        ahead = self._machine.disk_read.best * RING_SECONDS
        host_ring = _ring(placement.largest_from_disk, placement.from_disk, ahead, RING_SHARE * limits.host_bytes)
        layers = RING_LAYERS * placement.layer_over_link
        device_ring = _ring(placement.largest_over_link, placement.over_link, layers, DEVICE_RING_SHARE * limits.device_bytes)
        draft = Policy(
            device=self._limits.device,
            dtype=self._dtype,
            weights=weights,
            kv=self._kv or Fractions(host=1.0 - spills, disk=float(spills)),
            kv_format=self._spec.kv_format,
            sparse_attention=self._spec.sparse_attention,
            host_attention=host_attention,
            num_blocks=self._num_blocks,
            kv_device_bytes=0,
            kv_host_bytes=0,
            kv_disk_bytes=0,
            host_ring_bytes=host_ring,
            kv_staging_bytes=self._sizes.layer * spills,
            kv_tail_bytes=PAGE_TOKENS * self._spec.exact_kv_bytes_per_token * spills,
            device_ring_bytes=device_ring,
            workspace_bytes=0,
            embedding_resident=False,
            schedule=schedule,
            max_num_seqs=self._least_seqs,
            prefill_tokens=prefill_tokens,
            micro_batch_tokens=micro_batch_tokens,
            page_tokens=PAGE_TOKENS,
            compute_threads=self._machine.cores,
            io_threads=self._machine.io_threads,
        )
        workspace_bytes = self._activations(draft, draft.max_num_seqs) + placement.scratch_bytes
        return self.with_copies(dataclasses.replace(draft, workspace_bytes=workspace_bytes))

    def with_copies(self, policy: Policy) -> Policy:
        """Return the policy with memory for the copies of its passes."""
        return with_ring(with_copies(policy, self._spec, self._sizes), self._spec, self._sizes, self._limits.device_bytes)

    def for_seqs(self, draft: Policy, max_num_seqs: int) -> Policy:
        """Return the draft with the workspace of so many sequences, and memory for their copies."""
        workspace_bytes = draft.workspace_bytes + self._activations(draft, max_num_seqs) - self._activations(draft, draft.max_num_seqs)
        grown = dataclasses.replace(draft, max_num_seqs=max_num_seqs, workspace_bytes=workspace_bytes)
        return self.with_copies(grown)

    def growth(self, draft: Policy, max_num_seqs: int) -> dict[str, int]:
        """Return the bytes that so many sequences take beyond the draft's, in memory that is not KV, by tier."""
        grown = self.for_seqs(draft, max_num_seqs)
        computing = "device" if has_device_tier(draft.device) else "host"
        into, out = grown.copies_in_bytes - draft.copies_in_bytes, grown.copies_out_bytes - draft.copies_out_bytes
        into += grown.kv_ring_bytes - draft.kv_ring_bytes
        out += grown.hidden_bytes - draft.hidden_bytes
        sizes = {"device": into, "host": into + out}
        return sizes | {computing: sizes[computing] + grown.workspace_bytes - draft.workspace_bytes}

    def free(self, draft: Policy) -> dict[str, int]:
        """Return the bytes of memory that the draft leaves in the device's and the host's budget; negative where it exceeds one."""
        used = self.used(draft)
        budgets = {"device": self._limits.device_bytes, "host": self._limits.host_bytes}
        return {tier: budget - sum(used.get(tier, {}).values()) for tier, budget in budgets.items()}

    def used(self, draft: Policy) -> dict[str, dict[str, int]]:
        """Return the bytes that the draft reserves, by tier and part, counted as `footprint` does."""
        placement = self._placed.of(draft.weights)
        return reserved(
            draft, self._limits, process_bytes=self._process_bytes, held=placement.held, decoding_bytes=placement.decoding_bytes,
            small_bytes=self._spec.resident_bytes, embedding_bytes=self._embedding_bytes,
        )  # fmt: skip

    def within(self, limits: Limits) -> Drafts:
        """Return the drafts for the same job within other budgets."""
        again = copy.copy(self)
        again._limits, again._known = limits, {}
        return again

    def _activations(self, draft: Policy, max_num_seqs: int) -> int:
        return align_up(activation_bytes(self._spec, self._sizes, draft, max_num_seqs), 4096)


def _ring(largest: int, streamed: int, wanted: float, most: float) -> int:
    """Return the size of a ring: a few of the largest units, or `wanted` bytes up to `most`, but no more than what streams."""
    return align_up(min(max(RING_UNITS * largest, int(min(wanted, most))), streamed), 4096)


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """The bytes that all weights of a model would take at one home.

    Attributes:
        by_home: The bytes, by home; none for the device on a CPU.
        can_stay_encoded: Whether keeping weights encoded in host memory takes less of it than keeping them in the host's usual form.
    """

    by_home: Mapping[str, int]
    can_stay_encoded: bool

    @classmethod
    def of(cls, spec: ModelSpec, device: str) -> WeightSizes:
        """Return the sizes of a model's weights where a device computes."""
        homes = {home: unit_homes(spec, Fractions(**{home: 1.0})) for home in WEIGHT_HOMES if has_device_tier(device) or home != "device"}
        sizes = {home: sum(weight_bytes(spec, placed, device).values()) for home, placed in homes.items()}
        encoded = [unit for unit in spec.units if can_stay_encoded(unit) and (not has_device_tier(device) or unit.encoded_bytes is None)]
        return cls(sizes, bool(encoded))

    def in_host_memory(self, encoded: float) -> float:
        """Return the bytes in host memory if this share of the weights there is kept encoded."""
        return max((1 - encoded) * self.by_home["host"] + encoded * self.by_home["encoded"], 1.0)

    def placed(self, room: Mapping[str, float], on_device: float, on_host: float, encoded: float) -> Fractions:
        """Return home shares.

        Args:
            room: The bytes that weights may take, by tier.
            on_device: Of the most that fits on the device, the share that is there.
            on_host: Of the most of the rest that fits in host memory, the share that is there.
            encoded: Of the weights in host memory, the share that is kept encoded.
        """
        device = on_device * self.most_on_device(room)
        host = on_host * min(max(room["host"], 0) / self.in_host_memory(encoded), 1.0 - device)
        disk = 1.0 - device - host
        return Fractions(device=device, host=host * (1 - encoded), encoded=host * encoded, disk=disk if disk > 1e-9 else 0.0)

    def most_on_device(self, room: Mapping[str, float]) -> float:
        """Return the largest share of the weights that the device can hold."""
        whole = self.by_home.get("device", 0)
        return min(max(room["device"], 0) / max(whole, 1), 1.0) if "device" in self.by_home else 0.0
