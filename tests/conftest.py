"""What all tests share: where the checkpoints are, and when a test does not apply here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded: OpenMP threads that wait by spinning would starve whatever shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads than that would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia").exists():  # before Triton is loaded: without a device, its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["fakes", "table_fakes", "sampling", "shortcuts", "crew"]

ROOT = Path(__file__).parent.parent

# A shared machine is no clock, and a failure must come back on the next run.
settings.register_profile("flexgen", deadline=None, derandomize=True)
settings.load_profile("flexgen")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the trials of faults first, and skip `gpu` tests, with the reason, where torch sees no CUDA device.

    The trials have one fixture that takes most of a minute.  At the front of the list, one worker runs all of them; later in it, some
    would be stolen by a second worker, which would make the fixture again while the others have finished.
    """
    items.sort(key=lambda item: "faults" not in item.path.parts)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def novels_opt() -> Path:
    """The bundled checkpoint: OPT, multi-head attention, learned positions."""
    return ROOT / "models" / "novels-opt-7m"


@pytest.fixture(scope="session")
def novels_qwen3() -> Path:
    """Its sister: Qwen3, grouped-query attention, RoPE, QK norm."""
    return ROOT / "tests" / "data" / "novels-qwen3-7m"


@pytest.fixture(scope="session")
def flexgen_command() -> Callable[..., str]:
    """Run the installed command and return what it prints, on a terminal so wide that nothing is wrapped."""

    def run(*args: str) -> str:
        command = [Path(sys.executable).with_name("flexgen"), *args]
        env = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    return run
