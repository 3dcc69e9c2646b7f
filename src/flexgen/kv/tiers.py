"""What follows from a policy about the KV of each tier before anything is opened: its pages, and what a pass may compute together there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen.kv.pages import KVGroup, divide_pool, of_positions, on_disk, with_tail
from flexgen.plan.machine import has_device_tier
from flexgen.plan.policy import KV_RING_BATCHES, Policy

TAIL_SLACK = 1.25  # shares are shares of tokens, and a tier may get more and shorter sequences


def pool_bytes(tier: str, policy: Policy) -> int:
    """Return the bytes of a block's pages on a tier."""
    return {"device": policy.kv_device_bytes, "host": policy.kv_host_bytes, "disk": policy.kv_disk_bytes}[tier]


def block_pages(tier: str, groups: Sequence[KVGroup], policy: Policy) -> list[int]:
    """Return the number of pages of each group that a block has on a tier: block b has the page ids from b times that number on."""
    stored = stored_groups(tier, groups)
    return divide_pool(stored, pool_bytes(tier, policy), policy.longest_sequence, _tail_count(tier, policy))


def stored_groups(tier: str, groups: Sequence[KVGroup]) -> tuple[KVGroup, ...]:
    """Return the groups with the layout that their pages have on a tier."""
    return on_disk(groups) if tier == "disk" else tuple(groups)


def _tail_count(tier: str, policy: Policy) -> int:
    """Return the tails that a block has on a tier if its KV is in a low-bit format: a little more than its share of the live sequences."""
    return min(policy.max_num_seqs, math.ceil(TAIL_SLACK * getattr(policy.kv, tier) * policy.max_num_seqs) + 1)


def _counts_tokens_only(position: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a pass may compute together of sequences whose KV has the same home.

    Attributes:
        chunks: Whether later chunks of a prompt may follow the first within a pass.
        mixes: Whether next tokens and prompts may share a micro-batch.
        share_of_batch: Returns the share of a micro-batch that the next token at a position takes by the KV that it sees.  The shares of
            its next tokens add up to 1 at most, unless there is only one; they are 0 where only the number of tokens counts.
    """

    chunks: bool
    mixes: bool
    share_of_batch: Callable[[int], float] = _counts_tokens_only


def traits_of(tier: str, groups: Sequence[KVGroup], policy: Policy) -> Traits:
    """Return what a pass may compute together where KV lives on a tier."""
    if tier == "disk":
        return Traits(chunks=False, mixes=False)  # a later chunk's read would race with an earlier one's write
    if tier == "device" or not has_device_tier(policy.device):
        return Traits(chunks=True, mixes=True)
    if policy.host_attention:
        return Traits(chunks=True, mixes=False)
    batch_bytes = max(policy.kv_ring_bytes // KV_RING_BATCHES, 1)
    return Traits(chunks=True, mixes=False, share_of_batch=functools.partial(_share_of_bytes, groups, batch_bytes))


def _share_of_bytes(groups: Sequence[KVGroup], batch_bytes: int, position: int) -> float:
    """Return the share of `batch_bytes` that the pages which a next token sees take, in the layer where they take most."""
    most = 0
    for index, group in enumerate(of_positions(groups)):
        count = position // group.page_tokens - group.first_page(position) + 1
        tails = sum(groups[each].layer_page_bytes for each in with_tail(groups, index)[1:])
        most = max(most, count * group.layer_page_bytes + tails)
    return most / batch_bytes
