"""What CUDA refuses is refused by the simulated device, what CUDA takes works, and waiting for the device is counted."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from flexgen.devices.sim import SimulatedDevice
from flexgen.devices.sim_tensor import Timeline

Make = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def sim() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice(1 << 20)
    with torch.no_grad():
        yield device
    device.close()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


ILLEGAL: dict[str, Callable[[Make], Any]] = {
    "a host tensor beside": lambda on: on(numbers(4, 8)) + torch.ones(8),
    "a host tensor before": lambda on: torch.ones(8) + on(numbers(4, 8)),
    "a host tensor in place": lambda on: torch.ones(8).add_(on(numbers(8))),
    "a host tensor as result": lambda on: torch.add(on(numbers(8)), 1, out=torch.empty(8)),
    "host weights": lambda on: functional.linear(on(numbers(4, 8)), numbers(3, 8)),
    "a host mask": lambda on: on(numbers(4, 8)).masked_fill(torch.zeros(8, dtype=torch.bool), 0),
    "joining": lambda on: torch.cat([on(numbers(4, 8)), numbers(4, 8)]),
    "a host tensor indexed": lambda on: torch.zeros(9)[on(torch.tensor([1]))],
    "a host tensor written by index": lambda on: torch.zeros(9).__setitem__(on(torch.tensor([1])), 1.0),
    "host values at positions": lambda on: on(numbers(4, 8)).__setitem__(torch.tensor([0, 1]), numbers(2, 8)),
    "host ids": lambda on: functional.embedding(torch.tensor([0, 1]), on(numbers(4, 8))),
    "host positions of index_select": lambda on: on(numbers(4, 8)).index_select(0, torch.tensor([0])),
    "numpy": lambda on: on(numbers(4)).numpy(),
}
LEGAL: dict[str, Callable[[Make], torch.Tensor]] = {
    "a number of the host beside": lambda on: on(numbers(4, 8)) * torch.tensor(2.0) + torch.tensor(1.0) * on(numbers(4, 8)),
    "host positions": lambda on: on(numbers(4, 8))[torch.tensor([0, 2])],
    "writing to host positions": lambda on: on(numbers(4, 8)).index_put_((torch.tensor([0, 2]),), on(torch.ones(2, 8))),
    "writing a slice": lambda on: _written(on(numbers(4, 8)), on(torch.ones(4, 2))),
    "a mask": lambda on: on(numbers(4, 8))[on(numbers(4, 8)) > 0],
    "a result": lambda on: torch.add(on(numbers(8)), 1, out=on(torch.empty(8))),
    "a new tensor": lambda on: on(numbers(8)).new_zeros(3),
    "joined": lambda on: torch.cat([on(numbers(4, 8)), on(numbers(4, 8))]),
    "bytes as numbers": lambda on: on(torch.zeros(64, dtype=torch.uint8))[16:32].view(torch.float32).view(2, 2),
    "attention": lambda on: functional.scaled_dot_product_attention(x := on(numbers(1, 2, 4, 8)), x, x),
    "a sum over letters": lambda on: torch.einsum("td,nd->tn", on(numbers(4, 8)), on(numbers(3, 8))),
    "a norm": lambda on: functional.layer_norm(on(numbers(4, 8)), (8,)),
    "a lookup": lambda on: functional.embedding(on(torch.tensor([0, 1])), on(numbers(4, 8))),
    "the largest": lambda on: on(numbers(4, 8)).topk(2)[0],
    "another dtype": lambda on: on(numbers(4, 8)).to(torch.bfloat16),
    "a parameter": lambda on: torch.nn.Parameter(on(numbers(4)), requires_grad=False) + 0,
}


def _written(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    target[:, 2:4] = values
    target[0] += 1
    return target


@pytest.mark.parametrize("name", list(ILLEGAL))
def test_what_cuda_refuses(sim: SimulatedDevice, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"on the same device|not supported"):
        ILLEGAL[name](lambda tensor: tensor.to(sim.device))


@pytest.mark.parametrize("name", list(LEGAL))
def test_what_cuda_takes(sim: SimulatedDevice, name: str) -> None:
    """The same numbers as on the host."""
    result = LEGAL[name](lambda tensor: tensor.to(sim.device))
    assert result.device == sim.device
    torch.testing.assert_close(result.cpu(), LEGAL[name](lambda tensor: tensor))


@pytest.mark.parametrize(
    "create",
    [
        lambda device: torch.empty(3, device=device).fill_(1), lambda device: torch.zeros(3, device=device),
        lambda device: torch.full((3,), 7, device=device), lambda device: torch.arange(1, 6, 2, device=device),
        lambda device: torch.tensor([1, 2, 3], device=device), lambda device: torch.linspace(-1, 1, 3, device=device),
    ],
)  # fmt: skip
def test_tensors_are_created_on_the_device(sim: SimulatedDevice, create: Callable[[Any], torch.Tensor]) -> None:
    made = create(sim.device)
    assert made.device == sim.device
    assert made.tolist() == create("cpu").tolist()


def test_modules_move(sim: SimulatedDevice) -> None:
    module = torch.nn.BatchNorm1d(8).eval()
    wanted, moved = module(numbers(4, 8)), module.to(sim.device)
    assert {each.device for each in (*moved.parameters(), *moved.buffers())} == {sim.device}
    torch.testing.assert_close(moved(numbers(4, 8).to(sim.device)).cpu(), wanted)


def test_an_operation_in_place_gives_its_tensor_back(sim: SimulatedDevice) -> None:
    tensor = numbers(4).to(sim.device)
    assert tensor.add_(1) is tensor
    assert tensor.to(sim.device) is tensor


WAITS: dict[str, tuple[int, Callable[[torch.Tensor], Any]]] = {
    "item": (1, lambda x: x.sum().item()),
    "tolist": (1, lambda x: x.tolist()),
    "truth": (1, lambda x: bool((x > 0).any())),
    "to the host": (1, lambda x: x.cpu()),
    "into a host tensor": (1, lambda x: torch.empty(4, 8).copy_(x)),
    "finding": (1, lambda x: torch.where(x > 0)),
    "masking": (1, lambda x: x[x > 0]),
    "computing": (0, lambda x: (x @ x.T).softmax(-1)),
    "to the device": (1, lambda x: x.copy_(torch.ones(4, 8))),
    "a host tensor moved": (1, lambda x: torch.ones(4, 8).to(x.device)),
    "a number of the host copied": (1, lambda x: x.copy_(torch.tensor(1.0))),
    "a list": (1, lambda x: torch.tensor([1.0, 2.0], device=x.device)),
    "host positions": (1, lambda x: x[torch.tensor([0])]),
    "a number beside": (0, lambda x: x * 2.0 + 1),
    "a number written": (0, lambda x: x.__setitem__(0, 1.0)),
    "between tensors of the device": (0, lambda x: x.copy_(torch.ones_like(x))),
}


@pytest.mark.parametrize("name", list(WAITS))
def test_synchronisations_are_counted(sim: SimulatedDevice, name: str) -> None:
    wanted, call = WAITS[name]
    tensor, before = numbers(4, 8).to(sim.device), sim.synchronisations
    call(tensor)
    assert sim.synchronisations - before == wanted


def test_a_process_without_it_does_not_know_the_device() -> None:
    code = "import torch, flexgen.devices.sim; assert torch._C._get_privateuse1_backend_name() == 'privateuseone'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_of_links_share_the_timeline() -> None:
    """A link finishes the same use as the computing, between the moment at which that looks at it and the one at which it drops it."""
    timeline, raw = Timeline(), torch.empty(4)
    tensor: Any = SimpleNamespace(in_arena=True, raw=raw)
    links: list[threading.Thread] = []

    class Uses(deque[tuple[int, int, int]]):
        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            if not links:
                links.append(threading.Thread(target=timeline.finish, args=(timeline.now,)))
                links[0].start()
                links[0].join(0.5)
            return found

    timeline._uses = Uses()
    timeline.use([tensor])
    timeline.finish(timeline.now)
    links[0].join()
    assert not timeline.used_since(0, raw)
