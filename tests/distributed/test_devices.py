"""Each stage of a machine computes on a GPU of its own, and several named devices are stages."""

from __future__ import annotations

import pytest

from flexgen.distributed.devices import own_device
from flexgen.errors import OptionError
from flexgen.options import EngineOptions

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SHOWN = {"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}


@pytest.mark.parametrize(
    ("environment", "devices", "count", "wanted"),
    [
        ({}, None, 2, None),
        ({}, "cuda:2,cuda:0", 3, "2"),
        (RANK, "cuda:2,cuda:0", 3, "0"),
        (RANK, None, 2, "1"),
        (RANK, None, 1, None),  # both share what there is
        (RANK, None, None, None),
        (RANK | SHOWN, None, 2, "GPU-abc"),
        (SHOWN, "cuda:0,cuda:1", 2, "4"),
        (RANK | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None, 8, None),
    ],
)
def test_what_a_process_sees(environment: dict[str, str], devices: str | None, count: int | None, wanted: str | None) -> None:
    assert own_device(environment, devices, count) == wanted


@pytest.mark.parametrize(
    ("environment", "said"), [(SHOWN | RANK, "shows 2"), (RANK | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}, "one for each")]
)
def test_devices_that_are_missing(environment: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        own_device(environment, "cuda:0,cuda:7", 8)


def test_several_devices_are_stages() -> None:
    options = EngineOptions(device="cuda:1, cuda:0")
    assert (options.device, options.devices, options.stages) == ("cuda", "cuda:1,cuda:0", 2)
    with pytest.raises(OptionError, match="stages=3 on 2 devices"):
        EngineOptions(device="cuda:1,cuda:0", stages=3)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:0,cuda:0", "cuda:0,cpu", "cuda,cuda", "tpu"])
def test_other_names_are_refused(device: str) -> None:
    with pytest.raises(OptionError, match=r"is unknown|several devices are different GPUs"):
        EngineOptions(device=device)
