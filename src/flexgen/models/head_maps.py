"""Models that rearrange heads between cache and attention: how their calls become plain grouped-query attention.

A map receives (query, key, value) as passed to attention and (key, value) as cached, all (1, heads, tokens, dim).  It returns None
for a call that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Mapped:
    """A plain attention call, in which query head h attends to head h // groups of `key` and `value`, which are stored.

    Attributes:
        query: The queries.
        key: The keys to store.
        value: The values to store.
        restore: A function from the result of that call, (1, tokens, heads, dim), to the result that the model expects.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    restore: Callable[[Tensor], Tensor]


def _tiled(query: Tensor, key: Tensor, value: Tensor, cached_key: Tensor, cached_value: Tensor) -> Mapped | None:
    """Map JetMoe (arXiv:2404.07413): query head h attends to head h % kv_heads, so the query heads are reordered into groups."""
    kv_heads, heads = cached_key.shape[1], query.shape[1]
    if key.shape[1] != heads or heads % kv_heads or cached_value.shape[1] != kv_heads:
        return None
    groups = heads // kv_heads
    grouped = query.unflatten(1, (groups, kv_heads)).transpose(1, 2).flatten(1, 2)

    def restore(out: Tensor) -> Tensor:
        return out.unflatten(2, (kv_heads, groups)).transpose(2, 3).flatten(2, 3)

    return Mapped(grouped, cached_key, cached_value, restore)


def _halved(query: Tensor, key: Tensor, value: Tensor, cached_key: Tensor, cached_value: Tensor) -> Mapped | None:
    """Map DiffLlama (arXiv:2410.05258): two calls, for the first and for the second half of the value heads, each tiled twice.

    Both halves are stored side by side under every key head, and each call takes its part of the result.
    """
    if key is not cached_key or value.shape != cached_value.shape or cached_value.shape[1] % 2:
        return None
    first, second = cached_value.chunk(2, dim=1)
    dim = value.shape[3]
    given = value[:, : first.shape[1]]
    begin = 0 if torch.equal(given, first) else dim
    if begin and not torch.equal(given, second):
        return None
    both = torch.cat([first, second], dim=-1).repeat(1, 2, 1, 1)  # (1, kv_heads, tokens, 2 * dim)
    return Mapped(query, cached_key, both, lambda out: out[..., begin : begin + dim])


HeadMap = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Mapped | None]
HEAD_MAPS: dict[str, HeadMap] = {"jetmoe": _tiled, "diffllama": _halved}
