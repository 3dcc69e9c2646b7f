"""The geometry of a layer's cache: what it stores for each token, and which earlier tokens its queries see.  Plain values, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np

Positions = TypeVar("Positions", int, "np.ndarray")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """The shape of a layer's cached tensors and the reach of its queries.

    Layers with equal geometries share page tables and pools.  Latent attention caches the latent as its one key head
    and the rotary key as its one value head.

    Attributes:
        key_heads: The number of heads of the cached keys.
        key_dim: The size of a key head.
        value_heads: The number of heads of the cached values.
        value_dim: The size of a value head.
        window: The number of tokens that a query sees, itself included; None for all.
        chunk: The size of the aligned chunks within which tokens attend; None for no chunks.
        latent: Whether the tensors are latents and rotary keys.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None
    latent: bool = False

    @property
    def reach(self) -> int | None:
        """The most tokens that a query sees; None if it sees all."""
        return self.window or self.chunk

    @property
    def elements_per_token(self) -> int:
        """The number of elements that a layer caches for a token."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def first_visible(self, position: Positions) -> Positions:
        """Return the position of the earliest token that a query at `position` sees; of many positions in an array, those of all."""
        if self.window is not None:
            return (position - self.window + 1) * (position >= self.window)
        if self.chunk is not None:
            return position - position % self.chunk
        return position * 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """The cache of one attention layer.

    Attributes:
        layer: The index under which the model stores its keys and values.
        geometry: The geometry of the cache.
        flops_per_pair: The FLOPs of one (query, visible token) pair, over all heads of all calls that attend to this layer.
    """

    layer: int
    geometry: KVGeometry
    flops_per_pair: float


def by_geometry(layers: Iterable[LayerKV]) -> dict[KVGeometry, list[LayerKV]]:
    """Return the layers of each geometry, in the order of the first layer that has it."""
    groups: dict[KVGeometry, list[LayerKV]] = {}
    for layer in layers:
        groups.setdefault(layer.geometry, []).append(layer)
    return groups
