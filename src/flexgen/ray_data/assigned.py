"""What Ray has assigned to an actor, and the options of an engine that keeps within it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen.base.quantities import MIB, format_size
from flexgen.errors import OptionError
from flexgen.plan.machine import DEVICE_SHARE, HOST_SHARE
from flexgen.profile.limits import spare_disk_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """The resources of Ray that an actor has, and those of its node.  All but the memory are counts, which may be fractions.

    Attributes:
        cpus: The CPUs of the actor.
        gpus: The GPUs of the actor.
        memory_bytes: The memory that the actor asked for; 0 if it asked for none.
        node_cpus: The CPUs of the node.
        node_gpus: The GPUs of the node.
        node_memory_bytes: The memory of the node that Ray leaves to actors and tasks, which is not that of its object store.
    """

    cpus: float
    gpus: float
    memory_bytes: float
    node_cpus: float
    node_gpus: float
    node_memory_bytes: float

    @property
    def share(self) -> float:
        """The share of the node: Ray lets no more such actors run there than have 1 together.  0 if it has assigned nothing."""
        of_node = ((self.cpus, self.node_cpus), (self.gpus, self.node_gpus), (self.memory_bytes, self.node_memory_bytes))
        return min(max(mine / all_ if all_ else 0.0 for mine, all_ in of_node), 1.0)

    @property
    def host_bytes(self) -> int:
        """The budget of host memory: what the actor asked for, otherwise its share of what the node's actors may have.

        Raises:
            OptionError: Ray has assigned nothing.
        """
        if self.memory_bytes:
            return int(self.memory_bytes)
        if not self.share:
            raise OptionError(
                "host_mem is not given, and Ray has assigned neither memory nor CPUs nor GPUs to this actor, so that its share of the "
                "node's memory is unknown: give host_mem, or memory=, num_cpus= or num_gpus= of map_batches"
            )
        return int(HOST_SHARE * self.share * self.node_memory_bytes)

    def num_processors(self, available: int) -> int:
        """Return how many of the available processors the actor computes on: its CPUs, otherwise its share; all if it has none."""
        wanted = self.cpus or (self.share or 1.0) * available
        return max(1, min(int(wanted), available))

    def __str__(self) -> str:
        memory = format_size(self.node_memory_bytes)
        return f"Ray has assigned {self.share:.0%} of a node with {self.node_cpus:g} CPUs, {self.node_gpus:g} GPUs and {memory}"


def assigned() -> Assigned | None:
    """Return what Ray has assigned to the actor that runs in this process; None if none does."""
    ray: Any = sys.modules.get("ray")  # it has been imported by whoever runs an actor
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None
    own: Mapping[str, float] = context.get_assigned_resources()
    node_id = context.get_node_id()
    node: Mapping[str, float] = next((each["Resources"] for each in ray.nodes() if each["NodeID"] == node_id), {})
    return Assigned(
        cpus=own.get("CPU", 0), gpus=own.get("GPU", 0), memory_bytes=own.get("memory", 0),
        node_cpus=node.get("CPU", 0), node_gpus=node.get("GPU", 0), node_memory_bytes=node.get("memory", 0),
    )  # fmt: skip


def granted(given: Mapping[str, Any], share: Assigned) -> dict[str, Any]:
    """Return the keywords of an `LLM` that keeps within what Ray has assigned; what is given stays as it is.

    Actors of one node share its memory, its disk and its GPUs: each gets its share of the budgets that an `LLM` would take by default.

    Args:
        given: The keywords that the user gave.
        share: What Ray has assigned.

    Raises:
        OptionError: The device is not one that Ray has assigned, or the share is unknown.
    """
    found = dict(given)
    found["device"] = _device(given.get("device"), share)
    if found.get("host_mem") is None:
        found["host_mem"] = share.host_bytes
    if found.get("disk") is None:
        spare = int((share.share or 1.0) * spare_disk_bytes(found.get("offload_dir")))
        found["disk"] = spare if spare >= MIB else 0
    budgets = [found.get(name) for name in ("device_mem", "gpu_memory_utilization")]
    if str(found["device"]).startswith("cuda") and share.gpus < 1 and budgets == [None, None]:
        found["device_mem"] = f"{100 * DEVICE_SHARE * share.gpus:.4f}%"
    return found


def _device(asked: Any, share: Assigned) -> Any:
    """Return the device: that which is asked for, otherwise a GPU if Ray has assigned one.

    Ray shows an actor its own GPUs only (CUDA_VISIBLE_DEVICES), but may show all of them to one that has none.
    """
    if share.gpus > 1:
        raise OptionError(f"num_gpus={share.gpus:g}: an engine runs on one device: give num_gpus=1, and a larger concurrency")
    if asked is None or asked == "auto":
        return "cuda" if share.gpus else "cpu"
    if str(asked).startswith("cuda") and not share.gpus:
        raise OptionError(f"device={str(asked)!r}: Ray has assigned no GPU to this actor: give num_gpus=1 of map_batches")
    return asked
