"""The pools of KV: what they take of the memory that a draft leaves, tier by tier, and what KV on disk takes of the host beside them.

Each block of sequences in flight has pools of its own, all alike; sizes of pools are those of one block.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flexgen.options import TIERS
from flexgen.plan.machine import Limits
from flexgen.plan.model import ModelSpec
from flexgen.plan.policy import PAGE_TOKENS, Fractions, Policy
from flexgen.plan.price.requests import JobSizes


class KVHomes(NamedTuple):
    """Where KV lives: in memory according to a point's `kv_homes`, and the share on disk."""

    memory: float
    disk: float


class KVPools:
    """The pools of one model, job and budget, in bytes of KV; only policies and budgets count what pads pages on disk.

    Args:
        spec: The model.
        sizes: The needs of the job's requests.
        limits: The budgets.
        disk_bytes: The bytes for KV on disk.
        kv: The pinned shares of KV; None where they are free.
        num_blocks: The number of blocks of sequences in flight.

    Attributes:
        staged: The host bytes that a byte of KV on disk takes, of whatever block.
    """

    def __init__(
        self, spec: ModelSpec, sizes: JobSizes, limits: Limits, disk_bytes: int, kv: Fractions | None, num_blocks: int = 1
    ) -> None:
        self._spec, self._sizes, self._limits, self._disk_bytes, self._kv = spec, sizes, limits, disk_bytes, kv
        self._num_blocks = num_blocks
        # Staging holds two layers of a block's KV on disk (one that is attended to, one on its way), and a page per sequence of all blocks.
        layer = max((group.disk_bytes_per_token for group in spec.kv_groups), default=0)
        self._read_ahead = 2 * layer / max(spec.kv_bytes_per_token, 1)
        self._tails = PAGE_TOKENS * spec.exact_kv_bytes_per_token / sizes.mean
        self.staged = self._read_ahead / num_blocks + self._tails

    def sized(self, free: dict[str, int], homes: KVHomes, max_num_seqs: int | None = None) -> dict[str, int]:
        """Return the pool bytes per tier, at most what so many sequences (by default all requests) can need.

        Args:
            free: The bytes of memory left per tier.
            homes: Where KV lives, unless it is pinned.
            max_num_seqs: The most live sequences; None for all requests.
        """
        sizes = self._sizes
        if self._kv is None:
            on_disk = int(self._disk_bytes / self._spec.disk_kv_growth)
            pools = kv_pools(free, on_disk, homes.memory, homes.disk, staged=self.staged)
        else:
            pools = self._pinned(self._kv, {tier: max(size, 0) for tier, size in free.items()})
        pools = {tier: size // self._num_blocks for tier, size in pools.items()}
        # A sequence's KV has one home, so each tier may leave almost the bytes of the largest sequence unused.
        live = sizes.all if max_num_seqs is None else min(sizes.all, max_num_seqs * sizes.largest)
        enough = live + sizes.largest * sum(size > 0 for size in pools.values())
        if self._kv is None:
            return first_of(pools, enough)
        share = min(enough / max(sum(pools.values()), 1), 1.0)
        return {tier: int(size * share) for tier, size in pools.items()}

    def _pinned(self, kv: Fractions, free: dict[str, int]) -> dict[str, int]:
        """Return the largest pools of all blocks in the given proportion.

        Those on disk take staging, or all of a folder in memory, from the host's.
        """
        growth = self._spec.disk_kv_growth
        host = kv.host + kv.disk * (self.staged + growth * self._limits.offload_in_memory)
        totals = [free["host"] / host] if host else []
        totals += [free["device"] / kv.device] if kv.device else []
        totals += [self._limits.disk_bytes / growth / kv.disk] if kv.disk else []
        return {tier: int(getattr(kv, tier) * min(totals)) for tier in TIERS}

    def given_to(self, draft: Policy, pools: dict[str, int], max_num_seqs: int) -> Policy:
        """Return the draft with these pools, and with the staging that so many sequences need for those on disk."""
        return dataclasses.replace(
            draft,
            kv=self._kv or pool_fractions(pools),
            kv_device_bytes=pools["device"],
            kv_host_bytes=pools["host"],
            kv_disk_bytes=int(pools["disk"] * self._spec.disk_kv_growth),
            kv_staging_bytes=draft.kv_staging_bytes + int(self._read_ahead * pools["disk"]),
            kv_tail_bytes=min(draft.kv_tail_bytes + int(self._tails * pools["disk"]), draft.kv_tail_bytes * max_num_seqs),
        )


def kv_pools(free: dict[str, int], disk_bytes: int, kv_homes: float, kv_disk: float, *, staged: float = 0.0) -> dict[str, int]:
    """Return the pool bytes per tier.

    Args:
        free: The bytes of memory left per tier.
        disk_bytes: The bytes available on disk.
        kv_homes: 0 takes the device, 1 the host, 0.5 all of both; values in between take all of one and a part of the other.
        kv_disk: The disk's share of all KV.
        staged: The host bytes of staging that a byte on disk takes.
    """
    device = int(max(free["device"], 0) * min(2 - 2 * kv_homes, 1.0))
    room = max(free["host"], 0)
    host = int(room * min(2 * kv_homes, 1.0)) if free["device"] > 0 else room
    most = min(disk_bytes, int(room / staged) if staged else disk_bytes)
    if kv_disk >= 1:
        return {"device": 0, "host": 0, "disk": most}
    # Each byte in memory entails `ratio` bytes on disk, and these need staging on the host.
    ratio = kv_disk / (1 - kv_disk)
    host = min(host, int(max(room - staged * ratio * device, 0) / (1 + staged * ratio)))
    return {"device": device, "host": host, "disk": min(int((device + host) * ratio), most)}


def first_of(pools: dict[str, int], enough: int) -> dict[str, int]:
    """Cut pools to `enough` bytes together; the fastest tiers keep their bytes."""
    kept: dict[str, int] = {}
    for tier in TIERS:
        kept[tier] = min(pools[tier], enough)
        enough -= kept[tier]
    return kept


def pool_fractions(pools: dict[str, int]) -> Fractions:
    """Return the shares of all KV bytes that pools of these sizes hold."""
    total = max(sum(pools.values()), 1)
    return Fractions(**{tier: size / total for tier, size in pools.items()})
