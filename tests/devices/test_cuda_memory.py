"""What this process takes on a card, over a card without CUDA that counts as a driver does."""

from __future__ import annotations

import torch

from flexgen.base.quantities import GIB, MIB
from flexgen.devices.cuda_memory import LATER_BYTES, CudaMemory, cuda_memory
from flexgen.plan.machine import CUDA_BYTES

OTHERS, CONTEXT, LIBRARIES, WORKSPACE = 3 * GIB, 300 * MIB, 90 * MIB, 20 * MIB


class FakeCard:
    """A card of 24 GiB, of which other programs have 3; asking CUDA for its memory makes a context."""

    def __init__(self, *, sees_before: bool) -> None:
        self.sees_before = sees_before
        self.context = self.libraries = self.tensors = self.peak = self.code = 0
        self.others, self.shares = OTHERS, list[float]()

    def used(self) -> int:
        self.context = self.context if self.sees_before else CONTEXT  # CUDA is asked
        return self.others + self.context + self.libraries + self.code + self.tensors

    def free_and_total(self) -> tuple[int, int]:
        self.context = CONTEXT
        return 24 * GIB - self.used(), 24 * GIB

    def multiply(self) -> None:
        self.context, self.libraries = CONTEXT, LIBRARIES
        self.take(WORKSPACE)

    def take(self, size_bytes: int) -> None:
        self.tensors += size_bytes
        self.peak = max(self.peak, self.tensors)

    def reserved(self) -> int:
        return self.tensors

    def peak_reserved(self) -> int:
        return self.peak

    def forget_peak(self) -> None:
        self.peak = self.tensors

    def limit(self, share: float) -> None:
        self.shares.append(share)


def test_context_and_libraries_are_measured() -> None:
    memory = CudaMemory(FakeCard(sees_before=True))
    assert memory.taken_bytes() == CONTEXT + LIBRARIES + WORKSPACE
    assert memory.overhead_bytes == CONTEXT + LIBRARIES + WORKSPACE + LATER_BYTES
    assert memory.total_bytes == 24 * GIB
    assert memory.free_bytes() == 24 * GIB - OTHERS - CONTEXT - LIBRARIES - WORKSPACE


def test_a_context_that_was_there_before_counts_as_a_usual_one() -> None:
    """So does every context where the management library cannot be asked."""
    memory = CudaMemory(FakeCard(sees_before=False))
    assert memory.overhead_bytes == CUDA_BYTES + LIBRARIES + WORKSPACE + LATER_BYTES


def test_a_context_that_was_made_unnoticed_counts_as_a_usual_one() -> None:
    card = FakeCard(sees_before=True)
    card.context, card.libraries = CONTEXT, LIBRARIES
    assert CudaMemory(card).overhead_bytes == CUDA_BYTES + WORKSPACE + LATER_BYTES


def test_a_budget_is_that_of_the_whole_process() -> None:
    """With all that torch's allocator may hold, context, libraries and later kernels stay within it."""
    card = FakeCard(sees_before=True)
    memory = CudaMemory(card)
    memory.limit(16 * GIB)
    allowed = round(card.shares[-1] * 24 * GIB)
    assert allowed + CONTEXT + LIBRARIES + LATER_BYTES == 16 * GIB
    memory.limit(30 * GIB)
    assert card.shares[-1] == 1.0
    memory.limit(1 * MIB)
    assert card.shares[-1] == 0.0
    memory.lift_limit()
    assert card.shares[-1] == 1.0


def test_the_peak_is_the_drivers() -> None:
    card = FakeCard(sees_before=True)
    memory = CudaMemory(card)
    card.take(9 * GIB)
    card.take(-9 * GIB)
    memory.limit(16 * GIB)
    card.take(2 * GIB)
    card.take(-1 * GIB)
    assert memory.peak_bytes() == CONTEXT + LIBRARIES + WORKSPACE + 2 * GIB, "of the time since there is a limit"
    card.code = 30 * MIB
    assert memory.peak_bytes() == CONTEXT + LIBRARIES + WORKSPACE + 2 * GIB + 30 * MIB
    card.others -= 2 * GIB
    assert memory.peak_bytes() >= WORKSPACE + 2 * GIB, "what torch holds is no one else's"


def test_there_is_no_card_without_cuda() -> None:
    if not torch.cuda.is_available():
        assert cuda_memory() is None
