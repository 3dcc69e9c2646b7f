"""A pytest plugin: what tests of other things need not wait for, the measuring of this machine and the search for the best plan.

A process that runs thousands of tests grows to gigabytes; plans of tests start from the size of a process that has just begun.

`tests/profile/` measures, on a small scale; `tests/plan/` and the tests of `flexgen plan` search with all the effort of a user's run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import machine_of, steady

from flexgen.options import KV_FORMATS
from flexgen.plan.machine import Machine, int8_name, kv_rate_name
from flexgen.plan.search import solve
from flexgen.plan.search.optimise import Search

ROOT = Path(__file__).parent.parent
DEVICES, DTYPES = ("cpu", "sim"), ("bfloat16", "float16", "float32", "float64")
# Of the usual effort of a search: any plan that fits is as good as the best one where answers are tested.
PATIENCE = 0.1
# The largest size of a process that has loaded torch and the kernels and has run nothing yet.
FRESH_PROCESS = 1 << 30


@pytest.fixture(scope="session", autouse=True)
def cache_home_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What flexgen keeps is kept in a folder of this run of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache_home")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def kept_rates(cache_home_of_tests: Path) -> None:
    """There are rates of this machine, as if it had been measured thoroughly before."""
    from flexgen.profile.kept import keep

    for device, dtype, folder in itertools.product(DEVICES, DTYPES, (ROOT, cache_home_of_tests)):
        keep(_machine(device, dtype), [dtype], folder)


@pytest.fixture(scope="session", autouse=True)
def _stand_ins_beside_torch(request: pytest.FixtureRequest) -> None:
    """All tests have these stand-ins, but those that run without torch do not wait until it is imported."""
    if "torch" in sys.modules:
        request.getfixturevalue("kept_rates")
        request.getfixturevalue("fresh_process")


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[None]:
    """Plan for a process of the size that it has at the start, whatever earlier tests have left in this one."""
    from flexgen.session import prepare

    measured = prepare.resident_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "resident_bytes", lambda: min(measured(), FRESH_PROCESS))
        yield


@pytest.fixture(scope="module", autouse=True)
def hasty_plans() -> Iterator[None]:
    """Search for plans with little effort; a module that tests plans has a fixture of this name that does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Search.__init__.__kwdefaults__, "patience", PATIENCE)
        patch.setattr(solve, "EFFORT", PATIENCE * solve.EFFORT)
        yield


def _machine(device: str, dtype: str) -> Machine:
    """Return a machine of about the rates of two cores."""
    dense = {name: [(1, 4e9), (16, 4e10), (64, 6e10), (512, 8e10)] for name in (dtype, int8_name(dtype))}
    stored = (dtype, *(kv_rate_name(dtype, kv_format) for kv_format in KV_FORMATS if kv_format != "auto"))
    decode = {name: ((1.0, steady(3e9)), (8.0, steady(6e9))) for name in stored}
    links = {} if device == "sim" else {"host_to_device": None, "device_to_host": None}
    return machine_of(
        device=device,
        dense=dense,
        attention={dtype: 2e10},
        decode_attention={"host": decode},
        elementwise={dtype: 5e9},
        casts={int8_name(dtype): 4e9},
        **links,
    )
