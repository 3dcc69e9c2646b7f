"""A point of the space of policies: the choices that make one, as numbers that a search can move."""

from __future__ import annotations

from dataclasses import dataclass

AXES = ("on_device", "on_host", "encoded", "kv_homes", "kv_disk", "quota", "cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The choices that make a policy: numbers from 0 to 1, and discrete ones.

    By default all weights and no KV are on disk, and passes are large.

    Attributes:
        on_device: Of the weights that fit on the device, the share that lives there.
        on_host: Of the weights that fit on the host, the share that lives there.
        encoded: Of the weights on the host, the share that is kept as stored, where that takes less memory.
        kv_homes: 0 is the device, 1 the host, 0.5 all of both (see `kv_pools`).
        kv_disk: The disk's share of KV.
        quota: The prompt tokens per pass, from half of those that replace ending sequences (0) to a whole block (1).
        cap: The share of the sequences that fit which may be alive.
        embedding: Whether the embedding stays in memory, where that is useful and it fits.
        schedule: "diagonal", "zigzag" or "row".
        micro_batch_tokens: The most tokens computed together.
        host_attention: Whether the host attends to the KV in its memory for next tokens; if not, the device does.
    """

    on_device: float = 0.0
    on_host: float = 0.0
    encoded: float = 0.0
    kv_homes: float = 0.0
    kv_disk: float = 0.0
    quota: float = 1.0
    cap: float = 1.0
    embedding: bool
    schedule: str
    micro_batch_tokens: int
    host_attention: bool = True
