"""Matrices of experts that stay as they are stored while their unit is open, until somebody asks for their numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexgen.kernels.encoded import EncodedMatrices


class EncodedNumbers:
    """A tensor of an open unit by which kernels multiply as it is stored; for all other uses it is decoded, once.

    Args:
        matrices: The tensor as it is stored.
        decode: A function that decodes it into memory of the unit; it is called once at most.

    Attributes:
        matrices: The tensor as it is stored.
    """

    def __init__(self, matrices: EncodedMatrices, decode: Callable[[], torch.Tensor]) -> None:
        self.matrices = matrices
        self._decode = decode
        self._decoded: torch.Tensor | None = None

    def __len__(self) -> int:
        """The number of experts."""
        return len(self.matrices.codes)

    def decoded(self) -> torch.Tensor:
        """Return the decoded tensor."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded
