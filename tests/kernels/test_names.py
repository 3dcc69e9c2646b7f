"""Compiled functions are kept on disk under their names."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict

from numba.core.dispatcher import Dispatcher

import flexgen.kernels


def test_no_two_compiled_functions_have_one_name() -> None:
    """Numba tells them apart by a count that begins anew in each process: code that two processes kept may be taken for one another."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for module in pkgutil.walk_packages(flexgen.kernels.__path__, "flexgen.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Dispatcher):
                found[value.py_func.__module__, value.py_func.__qualname__].add(id(value))
    assert len(found) > 50
    assert [name for name, functions in found.items() if len(functions) > 1] == []
