"""KV in few bits: complete pages are sealed, which means rounded to codes, and a sequence's last page stays in the dtype of computing.

The latents of multi-head latent attention have 8 bits under every format, because they are keys and values of all heads at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexgen.base.quantities import align_up
from flexgen.io.aligned import ALIGNMENT
from flexgen.kernels.codes import HeadCodes, SealedPages
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.format import DiskSlot, KVFormat, KVPages, PlainKV, PlainPages, Steps, default_kv_format
from flexgen.passes.calls import AttentionCall
from flexgen.passes.geometry import KVGeometry

MOST_PADDING = 1 / 3  # of a page's bytes on disk; with more, reading through the page cache costs less


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBitKV:
    """A format of codes with a scale per group of a token's head.

    Attributes:
        name: The name by which options and plans know it.
        dtype: The dtype of computing, which is that of the last page.
        key_bits: The bits of a key's numbers.
        value_bits: The bits of a value's numbers.
        rotates_keys: Whether keys are rotated before they are rounded, and queries with them.  With a few large numbers in each key, as
            biases make them, that lowers the error of 8 bits to a quarter, and without them it does no harm (docs/kv-cache.md).
    """

    name: str
    dtype: torch.dtype
    key_bits: int
    value_bits: int
    rotates_keys: bool = True

    @property
    def tail(self) -> PlainKV:
        return PlainKV(self.dtype)

    def key_codes(self, geometry: KVGeometry) -> HeadCodes:
        """Return the codes of a key head."""
        bits = 8 if geometry.latent else self.key_bits
        return HeadCodes(dim=geometry.key_dim, bits=bits, rotated=self.rotates_keys and not geometry.latent)

    def value_codes(self, geometry: KVGeometry) -> HeadCodes:
        """Return the codes of a value head."""
        return HeadCodes(dim=geometry.value_dim, bits=8 if geometry.latent else self.value_bits)

    def key_bytes(self, geometry: KVGeometry) -> int:
        return geometry.key_heads * self.key_codes(geometry).token_bytes

    def value_bytes(self, geometry: KVGeometry) -> int:
        return geometry.value_heads * self.value_codes(geometry).token_bytes

    def disk_slot(self, geometry: KVGeometry, page_tokens: int) -> DiskSlot | None:
        """Return the layout of a page on disk: padded, head by head, to a multiple of what direct I/O moves, unless that wastes much."""
        heads = geometry.key_heads
        if heads != geometry.value_heads:
            return None
        values_at = page_tokens * self.key_codes(geometry).token_bytes
        used = values_at + page_tokens * self.value_codes(geometry).token_bytes
        head_bytes = align_up(used, ALIGNMENT // math.gcd(heads, ALIGNMENT))
        if head_bytes > (1 + MOST_PADDING) * used:
            return None
        return DiskSlot(heads=heads, head_bytes=head_bytes, values_at=values_at)

    def pages(self, keys: Tensor, values: Tensor, geometry: KVGeometry, page_tokens: int) -> LowBitPages:
        return LowBitPages(
            SealedPages(
                keys=keys.view(len(keys), geometry.key_heads, -1),
                values=values.view(len(values), geometry.value_heads, -1),
                key_codes=self.key_codes(geometry),
                value_codes=self.value_codes(geometry),
                page_tokens=page_tokens,
            )
        )


def kv_format(name: str, dtype: torch.dtype) -> KVFormat:
    """Return the format that an option names ("auto" for plain numbers), for a model that computes in `dtype`."""
    formats: dict[str, KVFormat] = {
        "auto": default_kv_format(dtype),
        "int8": LowBitKV(name="int8", dtype=dtype, key_bits=8, value_bits=8),
        "k8v4": LowBitKV(name="k8v4", dtype=dtype, key_bits=8, value_bits=4),
        "int4": LowBitKV(name="int4", dtype=dtype, key_bits=4, value_bits=4),
    }
    return formats[name]


class LowBitPages(KVPages):
    """One layer's sealed pages, and the tails of its sequences.

    Attributes:
        sealed: The complete pages.
    """

    def __init__(self, sealed: SealedPages, tails: PlainPages | None = None) -> None:
        self.sealed, self._tails = sealed, tails

    def beside(self, tails: KVPages) -> LowBitPages:
        assert isinstance(tails, PlainPages)
        return LowBitPages(self.sealed, tails)

    @property
    def tails(self) -> PlainPages:
        """The last pages of sequences."""
        assert self._tails is not None
        return self._tails

    def write(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor, page_offsets: Tensor) -> None:
        """Store keys and values (tokens, heads, dim) in tails; see `seal`."""
        self.tails.write(kernels, key, value, page_ids, page_offsets)

    def write_pages(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor) -> None:
        self.seal(kernels, key, value, page_ids)

    def seal(self, kernels: AttentionKernels, key: Tensor, value: Tensor, page_ids: Tensor) -> None:
        """Store complete pages, (pages * page_tokens, heads, dim), under these page ids."""
        kernels.seal(key, value, self.sealed, page_ids)

    def seal_tails(self, kernels: AttentionKernels, tails: Tensor, page_ids: Tensor) -> None:
        """Seal tails that have become complete, under these page ids."""
        if len(tails):
            key = self.tails.keys[tails].permute(0, 3, 1, 2).flatten(0, 1)  # (tokens, heads, dim)
            self.seal(kernels, key, self.tails.values[tails].transpose(1, 2).flatten(0, 1), page_ids)

    def gather(self, kernels: AttentionKernels, table: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values of complete pages, as for any format."""
        return kernels.unseal(self.sealed, table, start, length, dtype)

    def decode(self, kernels: AttentionKernels, call: AttentionCall, query: Tensor, steps: Steps, out: Tensor) -> int:
        assert steps.tails is not None
        where = self.sealed, self.tails.keys, self.tails.values, steps.tables, steps.tails, steps.starts, steps.lengths
        if call.latent is None:
            how: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sinks": call.sinks, "out": out}
            if steps.kept is not None:
                return kernels.decode_sparse_sealed_attention(query, *where, steps.kept, **how)
            kernels.decode_sealed_attention(query, *where, **how)
            return 0
        assert steps.kept is None, "models with latents are refused"
        rank = out.shape[-1]
        latent, rope = query[..., :rank].contiguous(), query[..., rank:].contiguous()
        kernels.decode_sealed_latent_attention(latent, rope, *where, scaling=call.scaling, out=out)
        return 0
