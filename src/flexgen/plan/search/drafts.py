"""Policies but for their KV, and the memory that these leave: budgets are hard, so every byte is accounted."""

from __future__ import annotations

import copy
import dataclasses

from flexgen.base.quantities import align_up
from flexgen.plan.machine import Limits, Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.play.sampling import JobSizes
from flexgen.plan.play.simulate import PAGE_TOKENS
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.layout import Layouts
from flexgen.plan.price.memory import RING_UNITS, activation_bytes, embedding_table_bytes, reserved

# A ring holds what a link delivers in this time, but never more than this share of its tier.
RING_SECONDS = 0.3
RING_SHARE = 0.05


class Drafts:
    """Of one model, machine, job and budget.

    Args:
        dtype: that is computed in. sizes: of the job's requests. process_bytes: resident before any weight is loaded.
        kv: pinned shares. num_seqs: live sequences that a draft has workspace for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        machine: Machine,
        limits: Limits,
        sizes: JobSizes,
        layouts: Layouts,
        *,
        dtype: str,
        process_bytes: int,
        kv: Fractions | None,
        num_seqs: int,
    ) -> None:
        self._spec, self._machine, self._limits, self._sizes, self._layouts = spec, machine, limits, sizes, layouts
        self._dtype, self._process_bytes, self._kv, self._least_seqs = dtype, process_bytes, kv, num_seqs
        self._embedding_bytes = embedding_table_bytes(spec)
        self._known: dict[tuple[Fractions, str, int, int, bool], Policy] = {}

    def draft(self, weights: Fractions, schedule: str, micro_batch_tokens: int, prefill_tokens: int, *, spills: bool) -> Policy:
        """A policy with everything but KV, for as many sequences as are pinned or one; if it `spills`, with staging for KV on disk."""
        key = (weights, schedule, micro_batch_tokens, prefill_tokens, spills)
        if key not in self._known:
            self._known[key] = self._drafted(*key)
        return self._known[key]

    def _drafted(self, weights: Fractions, schedule: str, micro_batch_tokens: int, prefill_tokens: int, spills: bool) -> Policy:
        layout = self._layouts.of(weights)
        draft = Policy(
            device=self._limits.device,
            dtype=self._dtype,
            weights=weights,
            kv=self._kv or Fractions(host=1.0 - spills, disk=float(spills)),
            kv_device_bytes=0,
            kv_host_bytes=0,
            kv_disk_bytes=0,
            host_ring_bytes=_ring(
                layout.largest_from_disk, layout.from_disk, self._machine.disk_read.best * RING_SECONDS, self._limits.host_bytes
            ),
            kv_staging_bytes=self._sizes.layer * spills,
            kv_tail_bytes=PAGE_TOKENS * self._spec.kv_bytes_per_token * spills,
            device_ring_bytes=_ring(layout.largest_over_link, layout.over_link, 0, self._limits.device_bytes),
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
        scratch = layout.scratch_bytes if self._limits.device == "cpu" else 0
        return dataclasses.replace(draft, workspace_bytes=self._activations(draft, draft.max_num_seqs) + scratch)

    def for_seqs(self, draft: Policy, max_num_seqs: int) -> Policy:
        """The draft with the workspace of so many sequences."""
        workspace_bytes = draft.workspace_bytes + self.growth(draft, max_num_seqs)
        return dataclasses.replace(draft, max_num_seqs=max_num_seqs, workspace_bytes=workspace_bytes)

    def growth(self, draft: Policy, max_num_seqs: int) -> int:
        """Bytes that the workspace of so many sequences takes beyond the draft's."""
        return self._activations(draft, max_num_seqs) - self._activations(draft, draft.max_num_seqs)

    def free(self, draft: Policy) -> dict[str, int]:
        """Bytes left in memory."""
        used = self.used(draft)
        budgets = {"device": self._limits.device_bytes, "host": self._limits.host_bytes}
        return {tier: budget - sum(used.get(tier, {}).values()) for tier, budget in budgets.items()}

    def used(self, draft: Policy) -> dict[str, dict[str, int]]:
        """What `footprint` says of the draft."""
        layout = self._layouts.of(draft.weights)
        return reserved(
            draft, self._limits, process_bytes=self._process_bytes, held=layout.held, decoding_bytes=layout.scratch_bytes,
            small_bytes=self._spec.resident_bytes, embedding_bytes=self._embedding_bytes,
        )  # fmt: skip

    def within(self, limits: Limits) -> Drafts:
        """The same with other budgets."""
        again = copy.copy(self)
        again._limits, again._known = limits, {}
        return again

    def _activations(self, draft: Policy, max_num_seqs: int) -> int:
        return align_up(activation_bytes(self._spec, self._sizes, draft, max_num_seqs), 4096)


def _ring(largest: int, streamed: int, wanted: float, tier_bytes: int) -> int:
    """A few of the largest units, and a while of the link where there is room, but no more than what streams."""
    return align_up(min(max(RING_UNITS * largest, int(min(wanted, RING_SHARE * tier_bytes))), streamed), 4096)
