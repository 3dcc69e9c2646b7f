"""Compiles kernels ahead for a device that is not there, and then launches them: nothing may be compiled by that.

    python tests/kernels/compile_ahead.py

Prints the programs that were compiled and loaded, and how many launches there were.
"""

from __future__ import annotations

import json
from typing import Any

import cross_compile  # this script's folder is searched
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flexgen.kernels.triton.compiling import compile_ahead
from flexgen.kernels.triton.grids import on_grid


class Launching(cross_compile.Driver):
    """A driver of one device, which loads programs and launches them without computing anything."""

    def __init__(self) -> None:
        self.device, self.utils = 90, self
        self.loaded: list[str] = []
        self.launched = 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any) -> None:
        self.launched += 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, *args: Any) -> tuple[object, object, int, int, int]:
        self.loaded.append(name)
        return object(), object(), 0, 0, 1024


@triton.jit
def broken(out):
    tl.store(out, there_is_no_such_name)  # noqa: F821


def calls() -> list[Any]:
    bfloat16 = torch.bfloat16
    short, long = (cross_compile.decode(bfloat16, 8, 2, 64, 64, tokens=tokens) for tokens in (256, 4096))
    return [short, long, cross_compile.prefill(bfloat16, 8, 2, 64, 64), cross_compile.drawing]


def main() -> None:
    active = Launching()
    driver.set_active(active)
    number = compile_ahead(calls(), 2)
    assert number == len(active.loaded)
    assert not active.launched
    assert compile_ahead(calls(), 2) == 0, "nothing is missing"
    found: list[str] = []
    try:
        compile_ahead([lambda: on_grid(broken, (1,), cross_compile.META)(torch.empty(1, device=cross_compile.META))], 2)
    except triton.CompilationError as error:
        found.append(type(error).__name__)
    assert compile_ahead([], 2) == 0, "others can be compiled after that"

    def compiled(self: JITFunction[Any], *args: Any, **how: Any) -> None:
        raise AssertionError(f"{self.__name__} is compiled when it is launched")

    JITFunction._do_compile = compiled  # type: ignore[method-assign]
    cross_compile.META = torch.device("cpu")  # the same calls, whose tensors now have memory
    for call in calls():
        call()
    print(json.dumps({"loaded": sorted(active.loaded), "launched": active.launched, "errors": found}))


if __name__ == "__main__":
    main()
