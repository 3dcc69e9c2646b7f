"""Attention of micro-batches on tensors without memory, so that a device's kernels are compiled for all that a model's layers launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from flexgen.devices.packed import mapped
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.local import LocalPlace, LocalView
from flexgen.kv.pages import KVGroup, PagePool
from flexgen.kv.plan import KVPlan
from flexgen.passes.calls import AttentionCall, without_memory
from flexgen.passes.plan import Slice

META = torch.device("meta")
# Kernels cut long sequences into parts, and take fewer queries at a time where prompts are short.
FEW_TOKENS, MANY_TOKENS = 9, 40
FAR_POSITION = 2048


def attend_without_memory(groups: Sequence[KVGroup], kernels: AttentionKernels, calls: Sequence[AttentionCall]) -> None:
    """Attend as passes do: with next tokens of short and long sequences, and with prompts, new ones and those that go on.

    Prompts are attended to in pages, where kernels can, and with what was stored before in tensors of its own, as if it came from the host.

    Args:
        groups: The layer groups of a model.
        kernels: The kernels of the device.
        calls: The model's attention calls, without memory; all of them pass keys and values to store.
    """
    pool = PagePool(groups, [1] * len(groups), lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8, device=META))
    place = LocalPlace(pool, kernels)
    known: set[object] = set()
    for call in calls:
        kind = _kind(call), place.where[call.layer][0]
        if kind in known or call.new is None:
            continue
        known.add(kind)
        for slices in _micro_batches(groups):
            tokens = sum(each.length for each in slices)
            for in_pages in {kernels.attends_in_pages, False}:
                view = LocalView(place, KVPlan(groups, slices, in_pages=in_pages))
                view.device_groups = mapped(view.plan.groups, lambda tensor: tensor.to(META))
                view.attend(without_memory(call, call.new, tokens))


def _kind(call: AttentionCall) -> tuple[object, ...]:
    """Return what distinguishes a call from others for kernels."""
    assert call.new is not None
    tensors = call.query, call.key, call.value, *call.new
    shapes = tuple((each.shape, each.dtype) for each in tensors)
    latent = None if call.latent is None else (call.latent.key_up.shape, call.latent.value_up.shape)
    return shapes, call.softcap is None, None if call.sinks is None else call.sinks.dtype, latent


def _micro_batches(groups: Sequence[KVGroup]) -> Iterator[list[Slice]]:
    """Yield the slices of micro-batches; the pages that windows begin in may be any of their tokens."""
    size = groups[0].page_tokens
    for start in (1, *range(FAR_POSITION, FAR_POSITION + size)):
        yield [_slice(groups, start, 1)]
    for start in (0, size + 3, FAR_POSITION):
        for length in (FEW_TOKENS, MANY_TOKENS):
            yield [_slice(groups, start, length)]


def _slice(groups: Sequence[KVGroup], start: int, length: int) -> Slice:
    tables = tuple((0,) * group.num_pages(start + length) for group in groups)
    stop = start + length
    return Slice(sequence=0, token_ids=(0,) * length, start=start, prompt_len=max(start, 1), total=stop, tables=tables)
