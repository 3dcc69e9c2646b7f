"""Prices single operations on a machine at the typical rates by which passes are priced: for a device that is only simulated."""

from __future__ import annotations

from collections.abc import Callable

from flexgen.plan.machine import Machine
from flexgen.plan.model import ModelSpec
from flexgen.plan.price.pass_time import Expectation, device_decoding_rate, rate_at


class OperationPrices:
    """The seconds of operations of one model, in one dtype, where they take place.

    Args:
        spec: The model.
        machine: The machine.
        dtype: The dtype of computing.
        place: "device" or "host".

    Raises:
        OptionError: The machine was not measured in `dtype`.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, dtype: str, place: str) -> None:
        self._expectation, self._place = Expectation(spec, machine, dtype), place
        elementwise = machine.elementwise.get(dtype, machine.host_memory)
        self._memory = (elementwise if place == "device" else machine.host_memory).typical
        self._dense, self._decoding = machine.dense[dtype], device_decoding_rate(spec, machine, dtype)
        self._attention = machine.attention[dtype].typical if dtype in machine.attention else self._dense[-1][1].typical
        self._kinds: dict[str, Callable[[float, float, float], float]] = {
            "product": self._product, "memory": self._bytes, "decoding": self._decoded, "prompts": self._prompts, "steps": self._steps,
        }  # fmt: skip

    def seconds(self, kind: str, flops: float, nbytes: float, rows: float) -> float:
        """Return the seconds of an operation.

        Args:
            kind: "product", "memory" (reads and writes), "decoding" (of stored numbers), "prompts" or "steps" (attention of prompts, and of
                next tokens).
            flops: The FLOPs of products and attention.
            nbytes: The bytes that are read and written; of decoding those that it yields, of next tokens' attention those of keys and
                values.
            rows: The rows of a product, which decide its rate.
        """
        return float(self._kinds[kind](flops, nbytes, rows))

    def _product(self, flops: float, nbytes: float, rows: float) -> float:
        return max(flops / float(rate_at(self._dense, rows)), nbytes / self._memory)

    def _bytes(self, flops: float, nbytes: float, rows: float) -> float:
        return nbytes / self._memory

    def _decoded(self, flops: float, nbytes: float, rows: float) -> float:
        return nbytes / min(self._decoding, self._memory)

    def _prompts(self, flops: float, nbytes: float, rows: float) -> float:
        return flops / self._attention

    def _steps(self, flops: float, nbytes: float, rows: float) -> float:
        return self._expectation.steps_seconds(self._place, flops, nbytes, 0)
