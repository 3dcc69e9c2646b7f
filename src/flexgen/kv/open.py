"""Opens the KV pools of a policy, and the place of each tier, from a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexgen.base.recorder import Recorder
from flexgen.devices.base import HOST, Device
from flexgen.devices.staging import Staging
from flexgen.errors import EngineError
from flexgen.io.pool import IOPool
from flexgen.kernels.attention import attention_kernels
from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.cache import KVCache
from flexgen.kv.disk import DiskPlace
from flexgen.kv.flow import KVFlow
from flexgen.kv.host import HostAttention, HostPlace
from flexgen.kv.link import KVLink
from flexgen.kv.linked import LinkedPlace
from flexgen.kv.local import LocalPlace
from flexgen.kv.pages import KVGroup, PagePool, Pool
from flexgen.kv.place import Place
from flexgen.kv.sparse import SparseAttention, ValueCounter
from flexgen.kv.spill import DiskPool
from flexgen.kv.tiers import block_pages, pool_bytes
from flexgen.plan.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSetup:
    """The inputs from which places are built.

    Attributes:
        groups: The model's layer groups.
        policy: The policy, which states the sizes of the pools.
        backend: The computing device; None if that is the host.
        staging: What copies tensors between the two.
        flow: What counts the prompts whose keys and values are on the way, on all tiers together.
        io: The threads that read and write pages on disk.
        offload_dir: The folder of the spill file; None if there is none.
        notify: A function that wakes the ready loop.
        verify: Whether to compare the bytes that are read from disk with those that were written.
        values: What counts the values that sparse attention does not read.
        recorder: The recorder of the trace; None without one.
        overlap: Whether the host attends, reads and writes while others compute.
    """

    groups: Sequence[KVGroup]
    policy: Policy
    backend: Device | None
    staging: Staging
    flow: KVFlow
    io: IOPool
    offload_dir: Path | None
    notify: Callable[[], None]
    verify: bool = False
    values: ValueCounter = field(default_factory=ValueCounter)
    recorder: Recorder | None = None
    overlap: bool = True

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.backend.device if self.backend is not None else HOST

    def num_pages(self, tier: str) -> list[int]:
        """Return the pages of each group in the pool of a tier, those of all blocks together."""
        return [self.policy.num_blocks * count for count in block_pages(tier, self.groups, self.policy)]

    @property
    def host_device(self) -> torch.device:
        """The device of host memory."""
        return self.backend.host_device if self.backend is not None else HOST

    def kernels(self, device: torch.device) -> AttentionKernels:
        return attention_kernels(device, self.policy.compute_threads)

    def sparse(self, *, saves: bool = True) -> SparseAttention | None:
        """Return what generated tokens keep; None for all.  It `saves` where values are read after it is known which ones are kept."""
        share = self.policy.sparse_attention
        return None if share is None else SparseAttention(share, self.values, saves=saves)

    def host_attention(self, worker: str, sparse: SparseAttention | None, *, has_two: bool) -> HostAttention:
        """Return host attention with a worker thread of this name, or with two (see `HostAttention`)."""
        kernels, device_kernels = self.kernels(self.host_device), self.kernels(self.device)
        return HostAttention(
            self.groups, kernels, device_kernels, self.staging, self.flow, self.notify, worker, sparse, self.recorder,
            overlap=self.overlap, apart=self.kernels(self.host_device) if has_two else None,
        )  # fmt: skip


Opened = tuple[Pool, Place]


def _open_device(setup: KVSetup) -> Opened:
    assert setup.backend is not None
    pool = PagePool(setup.groups, setup.num_pages("device"), setup.backend.allocate)
    return pool, LocalPlace(pool, setup.kernels(setup.device), setup.sparse())


def _open_host(setup: KVSetup) -> Opened:
    if setup.backend is None:
        pool = PagePool(setup.groups, setup.num_pages("host"))
        return pool, LocalPlace(pool, setup.kernels(HOST), setup.sparse())
    pool = PagePool(setup.groups, setup.num_pages("host"), setup.backend.allocate_pages)
    if setup.policy.host_attention:
        return pool, HostPlace(pool, setup.host_attention("flexgen-host-attention", setup.sparse(), has_two=True))
    ring_bytes = setup.policy.kv_ring_bytes
    if not ring_bytes:
        raise EngineError("attention on the device to KV in host memory needs a ring for its pages")
    link = KVLink(pool, setup.backend, ring_bytes, setup.notify, setup.recorder, overlap=setup.overlap)
    attention = setup.host_attention("flexgen-host-attention", setup.sparse(), has_two=True)
    return pool, LinkedPlace(pool, attention, link, setup.sparse(saves=False))  # values come with the keys


def _open_disk(setup: KVSetup) -> Opened:
    if setup.offload_dir is None:
        raise EngineError("KV on disk needs an offload folder")
    policy = setup.policy
    pages = setup.num_pages("disk")
    tail_bytes = policy.num_blocks * policy.kv_tail_bytes
    pool = DiskPool(setup.groups, pages, setup.offload_dir, tail_bytes=tail_bytes, verify=setup.verify)
    attention = setup.host_attention(
        "flexgen-disk-attention", setup.sparse(saves=False), has_two=False
    )  # values are read ahead with the keys
    return pool, DiskPlace(pool, attention, setup.io, policy.kv_staging_bytes, overlap=setup.overlap)


PLACES: dict[str, Callable[[KVSetup], Opened]] = {"device": _open_device, "host": _open_host, "disk": _open_disk}


def open_places(setup: KVSetup) -> tuple[dict[str, Place], KVCache]:
    """Return the place of each tier, and the cache over all tiers, for the pools of the policy and all of its blocks.

    Raises:
        StorageError: The spill file cannot be created.
        CapacityError: A pool does not fit the device.
    """
    pools: dict[str, Pool] = {}
    places: dict[str, Place] = {}
    with contextlib.ExitStack() as undo:
        for tier, open_place in PLACES.items():
            if pool_bytes(tier, setup.policy):
                pools[tier], places[tier] = open_place(setup)
                undo.callback(places[tier].close)
        undo.pop_all()
    return places, KVCache(setup.groups, pools)
