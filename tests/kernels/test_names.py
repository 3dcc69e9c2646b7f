"""Compiled functions are kept on disk under their names."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from numba.core.dispatcher import Dispatcher

import flexgen

PACKAGE = Path(flexgen.__file__).parent


def modules_with_compiled_functions() -> Iterator[ModuleType]:
    """Those that name Numba, or what compiles with it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "flexgen.base.compiled" in text or "numba" in text:
            yield importlib.import_module(".".join(("flexgen", *path.relative_to(PACKAGE).with_suffix("").parts)))


def test_no_two_compiled_functions_have_one_name() -> None:
    """Numba tells them apart by a count that begins anew in each process: code that two processes kept may be taken for one another."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for module in modules_with_compiled_functions():
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                found[value.py_func.__module__, value.py_func.__qualname__].add(id(value))
    assert len(found) > 50
    assert {name.split(".")[1] for name, _ in found} == {"kernels", "plan", "quantize"}
    assert [name for name, functions in found.items() if len(functions) > 1] == []
