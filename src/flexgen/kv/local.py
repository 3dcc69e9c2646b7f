"""KV in the memory of the computing device: attention is computed immediately."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.kernels.reference import AttentionKernels
from flexgen.kv.pages import PagePool, layer_index
from flexgen.kv.place import Place
from flexgen.kv.plan import GroupPlans, KVPlan
from flexgen.kv.sparse import SparseAttention
from flexgen.kv.views import Heads
from flexgen.passes.calls import AttentionCall
from flexgen.passes.plan import Slice


class LocalPlace(Place):
    """The place for micro-batches whose pages are in the memory of the computing device.

    Args:
        pool: The pages.
        kernels: The kernels of the device.
        sparse: What generated tokens keep of what they see; None for all of it.
    """

    def __init__(self, pool: PagePool, kernels: AttentionKernels, sparse: SparseAttention | None = None) -> None:
        self.pool, self.kernels, self._sparse = pool, kernels, sparse
        self.where = layer_index(pool.groups)

    def view(self, slices: Sequence[Slice]) -> LocalView:
        return LocalView(self, KVPlan(self.pool.groups, slices, self._sparse, in_pages=self.kernels.attends_in_pages))

    def close(self) -> None:
        self.kernels.close()


class LocalView:
    """The KV of a micro-batch, over the pages of a `LocalPlace`."""

    def __init__(self, place: LocalPlace, plan: KVPlan) -> None:
        self._place, self.plan = place, plan
        self.device_groups: GroupPlans = plan.groups
        self._heads: dict[int, Heads] = {}  # by layer, for later calls of layers that share its keys

    def attend(self, call: AttentionCall) -> torch.Tensor:
        kernels, pages = self._place.kernels, self._place.pool.pages[call.layer]
        plan = self.device_groups[self._place.where[call.layer][0]]
        if call.new is not None:
            self._heads[call.layer] = plan.write(kernels, call.new, pages)
        return plan.attend(kernels, call, pages, self._heads[call.layer])
