"""Attention of one micro-batch where complete pages are sealed.

A query sees the pages before its own page as they are stored, and its own page exactly.  Which numbers it sees is therefore a function of
its position alone: not of how a prompt was cut, of who computed a shared page, nor of where pages live.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexgen.kernels.reference import AttentionKernels
from flexgen.kernels.sparse import attend_chosen, row_blocks
from flexgen.kv.format import KVPages
from flexgen.kv.low_bit import LowBitPages
from flexgen.kv.pages import KVGroup, with_tail
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.sparse_plan import sparse_rows, step_parts
from flexgen.kv.views import Heads, Past, SparseRows, StepsAndPrompts, as_attended
from flexgen.passes.arrays import ranges, starts_of
from flexgen.passes.calls import AttentionCall, KeyValue
from flexgen.passes.plan import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedPrompt:
    """Index tensors of one prompt slice in one layer group.  Positions are counted from that of the first visible page.

    Attributes:
        length: The number of new tokens.
        head_length: The number of tokens that the page of the first new token held before.
        tail: The tail, int64 (1,).
        past: (page table, first position, position after the last) of earlier pages, in the sequence; None if none is visible.
        page_start: The position of the page of the first new token.
        num_seen_stored: The number of tokens from there on that later new tokens see as they are stored.
        complete: The pages that the slice completes, int64 (pages,).
        starts: The first position that each token sees, int64 (length,).
        borders: The first position of each token's own page, int64 (length,).
        sparse: What the generated tokens at its end keep, if they leave something out.
    """

    length: int
    head_length: int
    tail: torch.Tensor
    past: tuple[torch.Tensor, int, int] | None
    page_start: int
    num_seen_stored: int
    complete: torch.Tensor
    starts: torch.Tensor
    borders: torch.Tensor
    sparse: SparseRows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedGroupPlan(StepsAndPrompts):
    """Index tensors of a micro-batch in one layer group, and attention by them; the counterpart of `GroupPlan`.

    Attributes:
        group: The layer group.
        tail_rows: The new tokens that are kept in tails, int64 (rows,).
        tail_ids: Their tails, int64 (rows,).
        tail_offsets: Their positions in the page, int64 (rows,).
        full_tails: The tails that next tokens complete, int64 (pages,).
        full_pages: The pages that these become, int64 (pages,).
    """

    group: KVGroup
    tail_rows: torch.Tensor
    tail_ids: torch.Tensor
    tail_offsets: torch.Tensor
    full_tails: torch.Tensor
    full_pages: torch.Tensor
    prompts: tuple[SealedPrompt, ...]

    def write(self, kernels: AttentionKernels, new: KeyValue, pages: KVPages) -> Heads:
        """Store the micro-batch's new keys and values (1, heads, tokens, dim), and seal the pages that become complete.

        Returns:
            What the tails of prompts held before.
        """
        assert isinstance(pages, LowBitPages)
        key, value = (each[0].transpose(0, 1) for each in new)
        heads = [self._head(kernels, each, pages, key.dtype) for each in self.prompts]
        pages.write(kernels, key[self.tail_rows], value[self.tail_rows], self.tail_ids, self.tail_offsets)
        pages.seal_tails(kernels, self.full_tails, self.full_pages)
        row = self.num_steps
        for each, head in zip(self.prompts, heads, strict=True):
            if len(each.complete):
                whole = _joined(head, (key[row : row + each.length], value[row : row + each.length]))
                num_tokens = len(each.complete) * self.group.page_tokens
                pages.seal(kernels, whole[0][:num_tokens], whole[1][:num_tokens], each.complete)
            row += each.length
        return heads

    @staticmethod
    def _head(kernels: AttentionKernels, prompt: SealedPrompt, pages: LowBitPages, dtype: torch.dtype) -> KeyValue | None:
        return pages.tails.gather(kernels, prompt.tail, 0, prompt.head_length, dtype) if prompt.head_length else None

    def each_past(self, kernels: AttentionKernels, pages: KVPages, dtype: torch.dtype, heads: Heads) -> Iterator[Past]:
        """Yield, for each prompt slice, what is visible of the pages before its own first page, and the head of that page."""
        for each, head in zip(self.prompts, heads, strict=True):
            if each.past is None and head is None:
                yield None
                continue
            geometry = self.group.geometry
            none = (
                torch.empty(0, geometry.key_heads, geometry.key_dim, dtype=dtype, device=each.tail.device),
                torch.empty(0, geometry.value_heads, geometry.value_dim, dtype=dtype, device=each.tail.device),
            )
            yield (*(none if each.past is None else pages.gather(kernels, *each.past, dtype)), *(head or none))

    def attend_prompts(self, kernels: AttentionKernels, call: AttentionCall, past: Iterable[Past], out: torch.Tensor) -> None:
        """Write the attention of the prompt slices to their rows of `out`, (1, tokens, heads, value_dim); one past is held at a time."""
        cached = (call.key, call.value) if call.latent is None else call.new
        assert cached is not None, "layers with latents share none"
        row, past = self.num_steps, iter(past)
        for each in self.prompts:
            self._attend_prompt(kernels, call, cached, each, next(past), slice(row, row + each.length), out)
            row += each.length

    def _attend_prompt(
        self, kernels: AttentionKernels, call: AttentionCall, cached: KeyValue, prompt: SealedPrompt, before: Past, rows: slice,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the attention of one prompt slice to its rows of `out`; `cached` has the new keys and values as they are stored."""
        own = cached[0][0, :, rows].transpose(0, 1), cached[1][0, :, rows].transpose(0, 1)  # (length, heads, dim)
        exact, head = own, None
        if before is not None and before[2].shape[0]:
            head = before[2], before[3]
            exact = _joined(head, own)
        stored = self._as_stored(kernels, exact, prompt.num_seen_stored)
        if before is not None:
            stored = _joined((before[0], before[1]), stored)
        key, value = call.key[0, :, rows].transpose(0, 1), call.value[0, :, rows].transpose(0, 1)
        if head is not None:
            key, value = _joined(_attended(call, head), (key, value))
        stored, query, found = _attended(call, stored), call.query[0, :, rows].transpose(0, 1), out[0, rows]
        num_dense = prompt.length if prompt.sparse is None else prompt.sparse.num_dense
        if prompt.sparse is not None:
            _attend_sparse(call, query[num_dense:], stored, (key, value), prompt, prompt.sparse, found[num_dense:])
        if num_dense:
            end = key.shape[0] - (prompt.length - num_dense)
            kernels.prefill_sealed_attention(
                query[:num_dense], stored[0], stored[1], key[:end], value[:end], prompt.starts[:num_dense], prompt.borders[:num_dense],
                prompt.page_start, scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=found[:num_dense],
            )  # fmt: skip

    def _as_stored(self, kernels: AttentionKernels, exact: KeyValue, num_tokens: int) -> KeyValue:
        """Return the first tokens of (tokens, heads, dim) as they come back from sealed pages."""
        key, value = exact[0][:num_tokens], exact[1][:num_tokens]
        if not num_tokens:
            return key, value
        group, number = self.group, num_tokens // self.group.page_tokens
        keys, values = (
            torch.empty(number, size, dtype=torch.uint8, device=key.device) for size in (group.key_page_bytes, group.value_page_bytes)
        )
        pages = group.format.pages(keys, values, group.geometry, group.page_tokens)
        assert isinstance(pages, LowBitPages)
        ids = torch.arange(number, device=key.device)
        pages.seal(kernels, key, value, ids)
        return pages.gather(kernels, ids, 0, num_tokens, key.dtype)


def _attend_sparse(
    call: AttentionCall, query: torch.Tensor, stored: KeyValue, exact: KeyValue, prompt: SealedPrompt, sparse: SparseRows, out: torch.Tensor
) -> None:
    """Write the attention of the last tokens of a prompt slice, which keep a part of what they see; the page of each is its own exactly."""
    num_queries, num_stored, num_exact = query.shape[0], stored[0].shape[0], exact[0].shape[0]
    as_stored = torch.arange(num_stored, device=query.device)
    exactly = torch.arange(prompt.page_start, prompt.page_start + num_exact, device=query.device)
    keys, values = torch.cat([stored[0], exact[0]]), torch.cat([stored[1], exact[1]])
    first_visible, borders = prompt.starts[sparse.num_dense :, None], sparse.borders[:, None]
    for some in row_blocks(num_queries, query.shape[1], num_stored + num_exact):
        starts, border, places = first_visible[some], borders[some], exactly[num_exact - num_queries :][some, None]
        earlier = (starts <= as_stored) & (as_stored < border)
        own = (starts <= exactly) & (border <= exactly) & (exactly <= places)
        out[some] = attend_chosen(
            query[some], keys, values, torch.cat([earlier, own], dim=1), torch.cat([torch.zeros_like(earlier), own], dim=1),
            sparse.kept[some], scaling=call.scaling, softcap=call.softcap, sinks=call.sinks,
        )  # fmt: skip


def _joined(one: KeyValue | None, other: KeyValue) -> KeyValue:
    """Return the tokens of both, (tokens, heads, dim)."""
    if one is None or not one[0].shape[0]:
        return other
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def _attended(call: AttentionCall, cached: KeyValue) -> KeyValue:
    """Return cached (tokens, heads, dim) tensors as keys and values, (tokens, heads, dim)."""
    key, value = as_attended(call, cached)
    return key.transpose(0, 1), value.transpose(0, 1)


def sealed_plan(
    groups: Sequence[KVGroup], index: int, steps: Sequence[Slice], prompts: Sequence[Slice], sparse: SparseAttention | None = None
) -> SealedGroupPlan:
    """Return the plan of a group whose pages are sealed, for slices that are next tokens and for others.

    Args:
        groups: The layer groups.
        index: The index of the group.
        steps: The slices that are next tokens.
        prompts: The other slices.
        sparse: What generated tokens keep; None where they keep all that they see.
    """
    group, (_, tail) = groups[index], with_tail(groups, index)
    size, slices = group.page_tokens, (*steps, *prompts)
    tails = np.array([each.tables[tail][0] for each in slices], dtype=np.int64)
    starts, stops = starts_of(slices), np.array([each.stop for each in slices], dtype=np.int64)
    first_kept = np.maximum((stops - 1) // size * size, starts)  # the first position of each slice that is kept in its tail
    num_kept = stops - first_kept
    positions = ranges(first_kept, num_kept)
    first_rows = np.cumsum(stops - starts) - stops  # the row of each slice's position 0, as if it were there
    full = [each for each in steps if each.stop % size == 0]
    return SealedGroupPlan(
        group=group,
        tail_rows=torch.from_numpy(positions + np.repeat(first_rows, num_kept)),
        tail_ids=torch.from_numpy(np.repeat(tails, num_kept)),
        tail_offsets=torch.from_numpy(positions % size),
        full_tails=torch.tensor([each.tables[tail][0] for each in full], dtype=torch.int64),
        full_pages=torch.tensor([each.tables[index][each.start // size] for each in full], dtype=torch.int64),
        num_steps=len(steps),
        steps=step_parts(group, index, steps, tail, sparse),
        prompts=tuple(_sealed_prompt(group, each.tables[index], each.tables[tail][0], each, sparse) for each in prompts),
    )


def _sealed_prompt(group: KVGroup, table: Sequence[int], tail: int, each: Slice, sparse: SparseAttention | None) -> SealedPrompt:
    size, ids, positions = group.page_tokens, torch.tensor(table, dtype=torch.int64), np.arange(each.start, each.stop)
    starts = group.geometry.first_visible(positions)
    origin = min(int(starts[0]), each.start) // size * size  # of the first visible page
    page_start = each.start // size * size
    last_border = (each.stop - 1) // size * size
    return SealedPrompt(
        length=each.length,
        head_length=each.start - page_start,
        tail=torch.tensor([tail], dtype=torch.int64),
        past=(ids, origin, page_start) if origin < page_start else None,
        page_start=page_start - origin,
        num_seen_stored=last_border - page_start,
        complete=ids[each.start // size : each.stop // size],
        starts=torch.from_numpy(starts - origin),
        borders=torch.from_numpy(positions // size * size - origin),
        sparse=sparse_rows(group, each, origin, sparse),
    )
