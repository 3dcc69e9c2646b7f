"""What the micro-batches of a pass carry, counted for pricing.  No tensors."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.engine.schedule import Slice
from flexgen.engine.sweep import MicroBatch
from flexgen.kv.views import KVSlice, is_decode
from flexgen.plan.price.work import PassLoad


def kv_slice(each: Slice) -> KVSlice:
    """A slice as the KV cache sees it."""
    assert each.sequence.kv is not None
    return KVSlice(start=each.start, length=each.length, tables=each.sequence.kv.tables)


def pass_load(batches: Sequence[MicroBatch], homes: Sequence[str], num_groups: int) -> PassLoad:
    """What a pass carries.

    Args:
        homes: the tiers that have places for KV. num_groups: of layers with KV of one shape.
    """
    prompts = dict.fromkeys(homes, 0)
    starts = dict.fromkeys(homes, 0)
    steps = dict.fromkeys(homes, 0)
    pairs = [0] * num_groups
    attended = {home: [0] * num_groups for home in homes}
    repeated = {"disk": [0] * num_groups} if "disk" in homes else {}
    for batch in batches:
        plan = batch.view.plan
        read = plan.decode_tokens_read()
        visible = plan.visible_pairs()
        home = batch.home
        for each in batch.slices:
            if is_decode(kv_slice(each)):
                steps[home] += 1
            else:
                prompts[home] += each.length
                starts[home] += each.last
        for group in range(num_groups):
            attended[home][group] += read[group]
            pairs[group] += visible[group] - read[group]
        if home in repeated:
            repeated[home] = [total + shared for total, shared in zip(repeated[home], plan.decode_tokens_shared(), strict=True)]
    return PassLoad(
        prompt_tokens=prompts, num_prompts=starts, next_tokens=steps, prompt_pairs=pairs, attended_tokens=attended,
        repeated_tokens=repeated,
    )  # fmt: skip
