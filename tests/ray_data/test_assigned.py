"""Budgets, device and processors from what Ray has assigned."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen.base.quantities import GIB
from flexgen.errors import OptionError
from flexgen.options import EngineOptions
from flexgen.profile.limits import spare_disk_bytes
from flexgen.ray_data.assigned import Assigned, assigned, granted


def of(cpus: float = 0, gpus: float = 0, memory_bytes: float = 0) -> Assigned:
    """What an actor has of a node with 16 CPUs, 2 GPUs and 100 GiB."""
    return Assigned(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes, node_cpus=16, node_gpus=2, node_memory_bytes=100 * GIB)


@pytest.mark.parametrize(
    ("resources", "share", "host_gib"),
    [
        ({"cpus": 4}, 1 / 4, 20),
        ({"cpus": 16}, 1, 80),
        ({"gpus": 1}, 1 / 2, 40),
        ({"gpus": 0.5, "cpus": 1}, 1 / 4, 20),
        ({"gpus": 1, "cpus": 12}, 3 / 4, 60),
        ({"cpus": 1, "memory_bytes": 30 * GIB}, 0.3, 30),
    ],
)
def test_the_share_of_a_node(resources: dict[str, float], share: float, host_gib: float) -> None:
    found = of(**resources)
    assert found.share == pytest.approx(share)
    assert found.host_bytes == pytest.approx(host_gib * GIB, rel=1e-9)


def test_they_are_options_of_an_engine() -> None:
    share = of(cpus=4)
    found = EngineOptions(**granted({"dtype": "float32"}, share))
    assert (found.host_mem, found.device, found.dtype) == (share.host_bytes, "cpu", "float32")


@pytest.mark.parametrize("each", [{"cpus": 1}, {"cpus": 5}, {"gpus": 0.3}, {"gpus": 1, "cpus": 8}, {"memory_bytes": 7 * GIB}])
def test_actors_of_a_node_have_no_more_than_it(monkeypatch: pytest.MonkeyPatch, each: dict[str, float]) -> None:
    monkeypatch.setattr("flexgen.ray_data.assigned.spare_disk_bytes", lambda folder: 50 * GIB)
    whole = {"cpus": 16, "gpus": 2, "memory_bytes": 100 * GIB}
    fitting = int(min(whole[name] / amount for name, amount in each.items()))
    share = of(**each)
    assert fitting * share.host_bytes <= 100 * GIB
    assert fitting * granted({}, share)["disk"] <= 50 * GIB
    assert fitting * share.num_processors(16) <= 16 + fitting  # none has less than one


def test_a_share_that_is_unknown() -> None:
    with pytest.raises(OptionError, match="give host_mem, or memory=, num_cpus= or num_gpus= of map_batches"):
        granted({}, of())
    found = granted({"host_mem": "4GiB"}, of())
    assert (found["host_mem"], found["device"]) == ("4GiB", "cpu")


def test_what_is_given_stays() -> None:
    given = {"host_mem": "3GiB", "disk": "1GB", "device": "sim", "device_mem": "1GiB", "dtype": "float32"}
    assert granted(given, of(cpus=2)) == given


@pytest.mark.parametrize(
    ("resources", "given", "device", "device_mem"),
    [
        ({"cpus": 2}, {}, "cpu", None),
        ({"cpus": 2}, {"device": "auto"}, "cpu", None),
        ({"gpus": 1}, {}, "cuda", None),
        ({"gpus": 0.5}, {}, "cuda", "45.0000%"),
        ({"gpus": 0.5}, {"gpu_memory_utilization": 0.4}, "cuda", None),
        ({"gpus": 1}, {"device": "cpu"}, "cpu", None),
    ],
)
def test_the_device(resources: dict[str, float], given: dict[str, Any], device: str, device_mem: str | None) -> None:
    found = granted(given, of(**resources))
    assert (found["device"], found.get("device_mem")) == (device, device_mem)


@pytest.mark.parametrize(
    ("resources", "device", "said"), [({"cpus": 1}, "cuda", "assigned no GPU"), ({"gpus": 2}, None, "an engine runs on one device")]
)
def test_devices_that_no_engine_has(resources: dict[str, float], device: str | None, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        granted({"device": device}, of(**resources))


@pytest.mark.parametrize(
    ("resources", "available", "count"),
    [
        ({"cpus": 4}, 16, 4),
        ({"cpus": 0.5}, 16, 1),
        ({"cpus": 15}, 8, 8),
        ({"gpus": 1}, 16, 8),
        ({"gpus": 1, "cpus": 3}, 16, 3),
        ({}, 16, 16),
    ],
)
def test_processors(resources: dict[str, float], available: int, count: int) -> None:
    assert of(**resources).num_processors(available) == count


def test_spilled_bytes_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    mounts = tmp_path / "proc" / "self" / "mountinfo"
    mounts.write_text("1 0 0:1 / / rw - tmpfs tmpfs rw\n")
    assert spare_disk_bytes(None, tmp_path) == 0
    mounts.write_text("1 0 254:0 / / rw - ext4 /dev/root rw\n")
    assert spare_disk_bytes(None, tmp_path) > 0


def fake_ray(actor_id: str | None, initialized: bool = True) -> SimpleNamespace:
    context = SimpleNamespace(
        get_actor_id=lambda: actor_id, get_node_id=lambda: "n2", get_assigned_resources=lambda: {"CPU": 2.0, "memory": 5.0}
    )
    nodes = [
        {"NodeID": "n1", "Resources": {"CPU": 1.0}},
        {"NodeID": "n2", "Resources": {"CPU": 8.0, "memory": 50.0, "node:10.0.0.2": 1.0}},
    ]
    return SimpleNamespace(is_initialized=lambda: initialized, get_runtime_context=lambda: context, nodes=lambda: nodes)


def test_what_ray_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake_ray("a1"))
    assert assigned() == Assigned(cpus=2, gpus=0, memory_bytes=5, node_cpus=8, node_gpus=0, node_memory_bytes=50)


@pytest.mark.parametrize("ray", [fake_ray(None), fake_ray("a1", initialized=False), None], ids=["driver", "no cluster", "no Ray"])
def test_outside_of_an_actor(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert assigned() is None
