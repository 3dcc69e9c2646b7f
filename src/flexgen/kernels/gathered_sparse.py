"""Sparse attention of next tokens to pages that are gathered into padded buffers, several sequences at once.

Nothing waits for the device.  What a head keeps is said in sparse.py.  Letters of shapes are those of reference.py and padded_buffers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen.kernels.gathered_pages import PagesToGather, ranges
from flexgen.kernels.padded_buffers import Part
from flexgen.kernels.sparse import chosen, kept_weights
from flexgen.plan.policy import ATTENTION_BYTES

# Of a score while positions are chosen: as a product, sorted with its place, ranked, masked, as a weight.
SORTED_BYTES = 64


def attend_sparsely(
    query: Tensor, pages: PagesToGather, borders: Tensor, kept: Tensor, out: Tensor, scaling: float, softcap: float | None,
    sinks: Tensor | None,
) -> None:  # fmt: skip
    """Write the sparse attention of next tokens, (S, H, Dv), a few sequences, or a few heads of one, at a time.

    All positions of a head are ranked together, so that one head of one sequence is the least that is held.

    Args:
        query: The queries, (S, H, Dk).
        pages: The pages that they see.
        borders: The place in the buffer at which each query's own page begins, int64 (S,).
        kept: How many positions each head keeps besides that page, int64 (S,).
        out: The results; written.
        scaling: As for `decode_attention`.
        softcap: As for `decode_attention`.
        sinks: As for `decode_attention`.
    """
    groups = pages.heads, query.shape[1] // pages.heads
    queries, found = query.unflatten(1, groups), out.unflatten(1, groups)  # (S, K, G, dim)
    logits = None if sinks is None else sinks.detach().unflatten(0, groups)[..., None]  # (K, G, 1)
    num_positions = (pages.columns + 1) * pages.page_tokens  # with a tail, if there are tails
    pairs = max(ATTENTION_BYTES // (num_positions * (pages.position_bytes + groups[1] * SORTED_BYTES)), 1)  # of a sequence and a head
    at_once = min(pairs, pages.heads)
    for some in ranges(len(query), pairs // at_once if at_once == pages.heads else 1):
        for heads in ranges(pages.heads, at_once):
            part = pages.read(some, heads, slice(0, pages.columns))
            own = logits if logits is None else logits[heads]
            found[some, heads] = _attend(queries[some, heads], part, borders[some], kept[some], scaling, softcap, own)


def _attend(
    query: Tensor, part: Part, borders: Tensor, kept: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    key, value, visible = part  # (B, K, N, dim), and bool (B, 1, 1, N)
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = query.to(dtype) @ key.to(dtype).mT  # (B, K, G, N)
    own = visible & (torch.arange(key.shape[2], device=key.device) >= borders[:, None, None, None])
    keeps = chosen(products, visible, own, kept[:, None, None, None])
    weights = kept_weights(products, keeps, scaling, softcap, sinks)
    wanted = keeps.any(dim=2)[..., None]  # (B, K, N, 1)
    return weights @ value.to(dtype).masked_fill(~wanted, 0.0)
