"""Next tokens' attention to pages that are gathered into padded buffers, piece by piece.  Letters of shapes are those of reference.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen.kernels.codes import SealedPages, unsealed
from flexgen.kernels.padded_buffers import Part, attend_at_once, attend_in_parts
from flexgen.plan.policy import ATTENTION_BYTES

ReadPages = Callable[[slice, slice, slice], Part]  # ranges of sequences, of key heads and of columns of the page tables
ReadTails = Callable[[slice, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesToGather:
    """Pages that next tokens see, in a form that `attend_to_pages` takes piece by piece.

    Attributes:
        read: A function from ranges of sequences, key heads and columns of the page tables to what these hold.
        heads: The number of key heads.
        columns: The number of columns of the page tables.
        page_tokens: The positions of a column.
        position_bytes: The bytes of temporary tensors for each position of one head.
    """

    read: ReadPages
    heads: int
    columns: int
    page_tokens: int
    position_bytes: int

    @property
    def page_bytes(self) -> int:
        """The bytes of temporary tensors for each page of one head."""
        return self.page_tokens * self.position_bytes


def visible_in(columns: slice, page_tokens: int, starts: Tensor, lengths: Tensor) -> Tensor:
    """Return which positions of some columns of the page tables sequences see, bool (B, 1, 1, N)."""
    positions = torch.arange(columns.start * page_tokens, columns.stop * page_tokens, device=starts.device)
    return ((starts[:, None] <= positions) & (positions < lengths[:, None]))[:, None, None]


def cleared(numbers: Tensor, visible: Tensor) -> Tensor:
    """Return numbers (B, K, N, dim) with zeros wherever nothing is visible, since memory that is not in use may hold anything."""
    return numbers.masked_fill_(~visible.mT, 0)


def temporary_bytes(query: Tensor, head_dims: int, rows: int, *, decodes: bool = False) -> int:
    """Return the bytes of temporary tensors for each position of one head, more than are held at a time.

    Args:
        query: The queries.
        head_dims: The dimensions of a key and of a value together.
        rows: The queries that share the key.
        decodes: Whether numbers are decoded from codes, rather than gathered as they are.
    """
    wide = torch.promote_types(query.dtype, torch.float32).itemsize
    return head_dims * (4 * wide if decodes else 2 * query.dtype.itemsize + wide) + rows * 5 * wide


def attend_to_pages(query: Tensor, pages: PagesToGather, out: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> None:
    """Write the attention of next tokens, (S, H, Dv), for queries (S, H, Dk), a few sequences, or a few heads of one, at a time."""
    groups = pages.heads, query.shape[1] // pages.heads
    queries, found = query.unflatten(1, groups), out.unflatten(1, groups)  # (S, K, G, dim)
    logits = None if sinks is None else sinks.detach().unflatten(0, groups)  # (K, G)
    for some, heads, columns in _pieces(len(query), pages):
        rows, own = queries[some, heads], None if logits is None else logits[heads]
        if len(columns) == 1 and softcap is None:
            found[some, heads] = attend_at_once(rows, pages.read(some, heads, columns[0]), scaling, own)
        else:
            parts = [partial(pages.read, some, heads, each) for each in columns]
            found[some, heads] = attend_in_parts(rows, parts, scaling, softcap, own)


def _pieces(num_sequences: int, pages: PagesToGather) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Yield ranges of sequences and of heads, with the ranges of columns in which their pages are read."""
    left = max(ATTENTION_BYTES // max(pages.page_bytes, 1), 1)  # pages of one head
    columns = min(left, pages.columns)
    heads = min(left // columns, pages.heads)
    sequences = left // (columns * heads) if heads == pages.heads else 1
    parts = list(ranges(pages.columns, columns))
    for some in ranges(num_sequences, sequences):
        for each in ranges(pages.heads, heads):
            yield some, each, parts


def ranges(number: int, at_once: int) -> Iterator[slice]:
    """Yield ranges of so many things that are taken at once."""
    for first in range(0, number, at_once):
        yield slice(first, min(first + at_once, number))


def plain_reader(key_pages: Tensor, value_pages: Tensor, page_tables: Tensor, starts: Tensor, lengths: Tensor) -> ReadPages:
    """Return what reads pages of plain numbers; the arguments are those of `decode_attention`."""
    size = key_pages.shape[3]

    def read(some: slice, heads: slice, columns: slice) -> Part:
        ids = page_tables[some, columns].long().clamp(min=0)
        seen = visible_in(columns, size, starts[some], lengths[some])
        key = key_pages[:, heads][ids].permute(0, 2, 1, 4, 3).flatten(2, 3).contiguous()  # (B, K, N, Dk)
        value = value_pages[:, heads][ids].transpose(1, 2).flatten(2, 3)
        return cleared(key, seen), cleared(value, seen), seen

    return read


def sealed_reader(
    pages: SealedPages, page_tables: Tensor, starts: Tensor, lengths: Tensor, of_tails: ReadTails, wide: torch.dtype, *, turned: bool
) -> ReadPages:
    """Return what reads sealed pages, and behind the last column the tails.

    Args:
        pages: The pages.
        page_tables: Integers (S, columns).
        starts: The first visible position of each sequence, int64 (S,).
        lengths: The position after the last visible one, int64 (S,).
        of_tails: A function from ranges of sequences and of heads to the tails' keys (B, K, page_tokens, Dk) and values, in new memory.
        wide: The dtype of all numbers.
        turned: Whether keys that were rotated stay so.
    """
    size = pages.page_tokens

    def read(some: slice, heads: slice, columns: slice) -> Part:
        borders = (lengths[some] - 1) // size * size  # the first position of each tail
        ids = page_tables[some, columns].long().clamp(min=0)  # short sequences may have no sealed page
        seen = visible_in(slice(columns.start, columns.start + ids.shape[1]), size, starts[some], borders)
        key, value = (each.transpose(1, 2).flatten(2, 3) for each in unsealed(pages, ids, wide, heads, turned=turned))  # (B, K, N, dim)
        key, value = cleared(key, seen), cleared(value, seen)
        if columns.stop < page_tables.shape[1]:
            return key, value, seen
        of_tail = visible_in(slice(0, 1), size, starts[some] - borders, lengths[some] - borders)
        tail_key, tail_value = of_tails(some, heads)
        key, value = torch.cat([key, cleared(tail_key, of_tail)], dim=2), torch.cat([value, cleared(tail_value, of_tail)], dim=2)
        return key, value, torch.cat([seen, of_tail], dim=-1)

    return read
