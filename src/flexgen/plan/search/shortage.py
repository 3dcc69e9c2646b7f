"""Explains why nothing fits: what the smallest plan needs per tier, what is missing, and the smallest change that would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from flexgen.base.quantities import GIB, format_size
from flexgen.options import TIERS
from flexgen.plan.policy import Fractions
from flexgen.plan.search.space import Space

# How often the needs are computed again, because they depend on budgets (the allowance and rings are shares of them).
ROUNDS = 12
# Pools are cut to whole bytes.
ROUNDING_BYTES = 16
ONE_REQUEST = "KV of one request"
_OPTIONS = {"host": "host_mem", "device": "device_mem", "disk": "disk="}


def shortage(space: Space) -> str:
    """Return a sentence for each tier that is too small for the smallest plan and one request; empty where all are large enough."""
    plans = [_needs_met(space, weights, kv) for kv in _kv_homes(space) for weights in _weights_homes(space, kv)]
    needs = min(plans, key=lambda needs: sum(_missing(space, tier, parts) for tier, parts in needs.items()))
    return "; ".join(_sentence(space, tier, parts) for tier, parts in needs.items() if _missing(space, tier, parts))


def _needs_met(space: Space, weights: Fractions, kv: Fractions) -> dict[str, dict[str, int]]:
    """Return the needs of such a plan within budgets that are just large enough for it."""
    wanted = space
    for _ in range(ROUNDS):
        needed = {tier: sum(parts.values()) for tier, parts in _needs(wanted, weights, kv).items()}
        budgets = {f"{tier}_bytes": max(needed.get(tier, 0), getattr(space.limits, f"{tier}_bytes")) for tier in TIERS}
        wanted = space.within(dataclasses.replace(space.limits, **budgets))
    return _needs(wanted, weights, kv)


def _weights_homes(space: Space, kv: Fractions) -> list[Fractions]:
    """Return the possible homes of the weights: as pinned, or streaming; or all in memory, as a small model needs less than its staging.

    All weights are placed where they compute only if KV lives there, too (see space.py).
    """
    if space.weights is not None:
        return [space.weights]
    tiers = ["disk"] if space.on_cpu else ["disk", "host"]
    homes = [*tiers, *([space.computing] if getattr(kv, space.computing) == 1 else [])]
    homes += ["encoded"] * (space.weight_sizes.can_stay_encoded and (kv.host == 1 or not space.on_cpu))
    return [Fractions(**{home: 1.0}) for home in homes]


def _kv_homes(space: Space) -> list[Fractions]:
    """Return the possible homes of the one request's KV: as pinned, or wherever it may live."""
    return [space.kv] if space.kv is not None else [Fractions(**{tier: 1.0}) for tier in space.kv_tiers]


def _missing(space: Space, tier: str, parts: Mapping[str, int]) -> int:
    """Return the bytes by which the parts exceed the tier's budget."""
    return max(sum(parts.values()) - getattr(space.limits, f"{tier}_bytes"), 0)


def _needs(space: Space, weights: Fractions, homes: Fractions) -> dict[str, dict[str, int]]:
    """Return the needs of the smallest plan for one request, by tier and part; its largest tier of KV can hold the request."""
    draft = space.smallest(weights, spills=homes.disk > 0)
    largest = max(homes.device, homes.host, homes.disk)
    blocks = space.blocks.num_blocks
    kv = {tier: blocks * (math.ceil(space.sizes.smallest * getattr(homes, tier) / largest) + ROUNDING_BYTES) for tier in TIERS}
    needs = {tier: dict(parts) for tier, parts in space.drafts.used(draft).items()}
    on_disk = kv["disk"] if homes.disk else 0
    needs["host"]["KV staging"] += math.ceil(space.pools.staged * on_disk)
    on_disk = math.ceil(on_disk * space.spec.disk_kv_growth)
    if space.limits.offload_in_memory:
        needs["host"]["KV in a memory file system"] = on_disk
    if on_disk:
        needs["disk"] = {_kv_name(space): on_disk}
    for tier in ("host", "device"):
        if getattr(homes, tier):
            needs[tier][_kv_name(space)] = kv[tier]
    return needs


def _kv_name(space: Space) -> str:
    return ONE_REQUEST if space.blocks.num_blocks == 1 else f"{ONE_REQUEST} in each of {space.blocks.num_blocks} blocks"


def _sentence(space: Space, tier: str, parts: Mapping[str, int]) -> str:
    needed, budget = sum(parts.values()), getattr(space.limits, f"{tier}_bytes")
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    return (
        f"{space.spec.name} needs at least {_gib_above(needed)} GiB of {tier}{' memory' * (tier != 'disk')} ({listed}), "
        f"{format_size(budget)} are in the budget, {_gib_above(needed - budget)} GiB are missing: raise {_OPTIONS[tier]} to "
        f"{_gib_above(needed)}GiB{_advice(space, tier, shorter=parts.get(_kv_name(space), 0) > needed - budget)}"
    )


def _gib_above(size_bytes: int) -> str:
    """Format a size in GiB, rounded up, so that the size in the message is enough."""
    return f"{math.ceil(size_bytes / GIB * 1000) / 1000:.3f}"


def _advice(space: Space, tier: str, *, shorter: bool) -> str:
    """Return what else would help; `shorter` says whether shorter prompts would."""
    options = space.options
    pins = {"weights=": space.weights, "kv=": space.kv}
    advice = [f"give {tier} a smaller share in {name}" for name, pin in pins.items() if pin is not None and getattr(pin, tier) > 0]
    if tier == "host" and space.weights is not None and space.weights.host and space.weight_sizes.can_stay_encoded:
        advice.append('name "encoded" in place of "host" in weights=')
    if tier != "disk":
        for name in ("max_num_seqs", "prefill_tokens", "micro_batch_tokens"):
            if getattr(options, name) is not None:
                advice.append(f"lower {name}")
        if space.limits.offload_in_memory and space.kv is not None and space.kv.disk > 0 and tier == "host":
            advice.append("give an offload_dir that is not on a memory file system")
    if shorter:
        advice.append("shorten the longest prompts")
    return "".join(f", or {each}" for each in advice)
