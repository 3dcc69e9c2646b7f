"""The formats of keys and values in pages: how many bytes they take, and how they are written and read.

Only a format knows the dtype of a page; pools, files and links move its bytes.  Another format is one file beside this one
(low_bit.py is one) with two classes:

* a `KVFormat`, which says how many bytes a token takes and makes pages of memory;
* its `KVPages`, which must write and gather.  `decode` works through `gather` until the format overrides it with a
  kernel that reads its pages as they are.

`assemble_model` takes the format, so that the planner prices its bytes, and the engine passes it to every pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen.kernels.prompts import PagedPrompts
from flexgen.kernels.reference import AttentionKernels
from flexgen.passes.calls import AttentionCall
from flexgen.passes.geometry import KVGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSlot:
    """A page of one layer on disk, with each head's values behind its keys, so that it is read in one piece past the page cache.

    Attributes:
        heads: The number of heads.
        head_bytes: The bytes of a head's keys and values together, and of what pads them.
        values_at: The place of a head's values behind its keys.
    """

    heads: int
    head_bytes: int
    values_at: int

    @property
    def page_bytes(self) -> int:
        return self.heads * self.head_bytes


class KVFormat(Protocol):
    """A format in which keys and values are kept."""

    @property
    def name(self) -> str | None:
        """The name by which options and plans know the format; None for the plain numbers of the dtype of computing."""
        ...

    @property
    def tail(self) -> KVFormat | None:
        """The format of a sequence's last page, for a format that stores whole pages only; None if pages are written token by token."""
        ...

    def key_bytes(self, geometry: KVGeometry) -> int:
        """Return the bytes of a token's keys in one layer."""
        ...

    def value_bytes(self, geometry: KVGeometry) -> int:
        """Return the bytes of a token's values in one layer."""
        ...

    def disk_slot(self, geometry: KVGeometry, page_tokens: int) -> DiskSlot | None:
        """Return the layout of a page on disk, if that differs from keys and values apart."""
        ...

    def pages(self, keys: Tensor, values: Tensor, geometry: KVGeometry, page_tokens: int) -> KVPages:
        """Return one layer's pages in the given memory.

        Args:
            keys: Contiguous uint8 (pages, page_tokens * key_bytes), on any device; the pages write to it.  In a `DiskSlot` a head has more
                bytes than its keys, and what lies behind them must stay as it is.
            values: Contiguous uint8 (pages, page_tokens * value_bytes), on the same device; the same is true of them.
            geometry: The geometry of the layer.
            page_tokens: The number of tokens of a page.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The tokens that each of several next tokens attends to, its own included.

    Attributes:
        tables: The page ids of each sequence, int64 (steps, pages), from a page before which it sees nothing; positions count from there.
        starts: The first visible position, int64 (steps,).
        lengths: The position after the last visible one, int64 (steps,).
        tails: The tail page of each sequence, int64 (steps,); None for formats without tails.
        kept: How many positions each head of each sequence keeps for their scores, int64 (steps,); None where all attend to all that they
            see.
    """

    tables: Tensor
    starts: Tensor
    lengths: Tensor
    tails: Tensor | None = None
    kept: Tensor | None = None


class KVPages(ABC):
    """One layer's pages in the memory of one device.

    Keys and values are passed in the dtype of computing, in the shapes of `flexgen.kernels.reference`.  `kernels` are those of the
    device that holds the pages.
    """

    @abstractmethod
    def write(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        """Store keys and values (tokens, heads, dim) at these pages and offsets, both int64 (tokens,)."""

    def write_pages(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor) -> None:
        """Store complete pages, (pages * page_tokens, heads, dim), under these page ids, int64 (pages,)."""
        page_tokens = len(key) // len(page_ids)
        offsets = torch.arange(page_tokens, device=page_ids.device).repeat(len(page_ids))
        self.write(kernels, key, value, page_ids.repeat_interleave(page_tokens), offsets)

    @abstractmethod
    def gather(self, kernels: AttentionKernels, table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values, (length - start, heads, dim) in `dtype`, of one sequence, whose pages are `table`."""

    def beside(self, tails: KVPages) -> KVPages:
        """Return these pages together with the tails of their sequences, for a format that has tails."""
        raise NotImplementedError

    def decode(self, kernels: AttentionKernels, call: AttentionCall, query: Tensor, steps: Steps, out: Tensor) -> int:
        """Compute the attention of one query token per sequence.

        Args:
            kernels: The kernels of the device that holds the pages.
            call: The attention call, with scaling, cap and sinks of the scores.  If it has a latent projection, the pages hold latents as
                keys and rotary keys as values, and the result is a sum of latents.
            query: The queries, (steps, heads, key_dim), or (steps, heads, rank + rope) on latents.
            steps: The tokens that each query attends to.
            out: The result, (steps, heads, value_dim), or (steps, heads, rank) on latents; it is written.

        Returns:
            The number of visible values of a head that were not read.
        """
        assert steps.kept is None, "sparse attention needs a kernel"
        for row, (start, length) in enumerate(zip(steps.starts.clamp(min=0).tolist(), steps.lengths.tolist(), strict=True)):
            key, value = self.gather(kernels, steps.tables[row], start, length, query.dtype)
            if call.latent is not None:
                key, value = torch.cat([key, value], dim=-1), key
            kernels.prefill_attention(
                query[row : row + 1], key, value, steps.starts.new_zeros(1),
                scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, out=out[row : row + 1],
            )  # fmt: skip
        return 0

    def prefill(self, kernels: AttentionKernels, call: AttentionCall, prompts: PagedPrompts, out: Tensor) -> bool:
        """Compute the attention of prompts to these pages, which hold all their tokens, if that is possible.

        Args:
            kernels: The kernels of the device that holds the pages.
            call: The attention call; its last queries are those of the prompts.
            prompts: The prompts.
            out: The result, (tokens, heads, value_dim); it is written.

        Returns:
            Whether it was.
        """
        return False


@dataclass(frozen=True, slots=True)
class PlainKV:
    """A format of plain numbers.

    Attributes:
        dtype: The dtype of the numbers, which may differ from the dtype of computing.
    """

    dtype: torch.dtype

    @property
    def name(self) -> None:
        return None

    @property
    def tail(self) -> None:
        return None

    def key_bytes(self, geometry: KVGeometry) -> int:
        return geometry.key_heads * geometry.key_dim * self.dtype.itemsize

    def value_bytes(self, geometry: KVGeometry) -> int:
        return geometry.value_heads * geometry.value_dim * self.dtype.itemsize

    def disk_slot(self, geometry: KVGeometry, page_tokens: int) -> None:
        return None

    def pages(self, keys: Tensor, values: Tensor, geometry: KVGeometry, page_tokens: int) -> PlainPages:
        return PlainPages(
            keys.view(self.dtype).view(len(keys), geometry.key_heads, geometry.key_dim, page_tokens),
            values.view(self.dtype).view(len(values), geometry.value_heads, page_tokens, geometry.value_dim),
        )


def default_kv_format(dtype: torch.dtype) -> KVFormat:
    """Return the format of a model that computes in `dtype`, unless another one is asked for: plain numbers of that dtype."""
    return PlainKV(dtype)


class PlainPages(KVPages):
    """Pages of plain numbers in the layout that the kernels read.

    Attributes:
        keys: The keys, (pages, key_heads, key_dim, page_tokens).
        values: The values, (pages, value_heads, page_tokens, value_dim).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        dtype = self.keys.dtype
        kernels.write_kv(key.to(dtype), value.to(dtype), self.keys, self.values, page_ids, page_offsets)

    def gather(self, kernels: AttentionKernels, table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = kernels.gather_kv(self.keys, self.values, table, start, length)
        return key.to(dtype), value.to(dtype)

    def decode(self, kernels: AttentionKernels, call: AttentionCall, query: Tensor, steps: Steps, out: Tensor) -> int:
        where = self.keys, self.values, steps.tables, steps.starts, steps.lengths
        if query.dtype != self.keys.dtype:  # the kernels compute in the dtype of the pages
            return super().decode(kernels, call, query, steps, out)
        if call.latent is not None:
            assert steps.kept is None, "models with latents are refused"
            rank = out.shape[-1]
            latent, rope = query[..., :rank].contiguous(), query[..., rank:].contiguous()
            kernels.decode_latent_attention(latent, rope, *where, scaling=call.scaling, out=out)
            return 0
        how: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sinks": call.sinks, "out": out}
        if steps.kept is not None:
            return kernels.decode_sparse_attention(query, *where, steps.kept, **how)
        kernels.decode_attention(query, *where, **how)
        return 0

    def prefill(self, kernels: AttentionKernels, call: AttentionCall, prompts: PagedPrompts, out: Tensor) -> bool:
        if call.latent is not None or call.query.dtype != self.keys.dtype:  # pages hold no keys, or not those that are computed with
            return False
        query = call.query[0, :, call.query.shape[2] - len(out) :].transpose(0, 1)  # (tokens, heads, key_dim)
        if not kernels.covers_in_pages(query, out.shape[2]):
            return False
        how: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sinks": call.sinks, "out": out}
        kernels.prefill_paged_attention(query, self.keys, self.values, prompts, **how)
        return True
