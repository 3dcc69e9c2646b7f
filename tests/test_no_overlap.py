"""Runs without overlap: by their traces nothing is copied while something is computed, and answers are the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_trace import POLICIES, engine_of, requests
from traces import Trace, read_trace

from flexgen.base.recorder import (
    COMPUTE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    IO,
    KV_TO_DEVICE,
    PASSES,
    URGENT_TO_DEVICE,
    WEIGHTS_TO_DEVICE,
    Recorder,
)
from flexgen.plan.policy import Fractions, Policy

COMPUTING = (COMPUTE, "host attention", "disk attention")
COPYING = (
    "weights from disk", "KV from disk", "KV to disk", IO, WEIGHTS_TO_DEVICE, KV_TO_DEVICE, HOST_TO_DEVICE, URGENT_TO_DEVICE, DEVICE_TO_HOST
)  # fmt: skip
WAIT = "wait for"
CASES = {
    **POLICIES,
    "sim, all on the device": replace(
        POLICIES["sim"], weights=Fractions(device=1.0), kv=Fractions(device=1.0), kv_disk_bytes=0, kv_staging_bytes=0, kv_tail_bytes=0,
        kv_host_bytes=0,
    ),
    "sim, attention on the device": replace(POLICIES["sim"], host_attention=False, kv_ring_bytes=1 << 18),
}  # fmt: skip


@dataclass
class Run:
    trace: Trace
    answers: dict[int, tuple[int, ...]]
    moved: dict[str, int]
    waits: dict[str, float]
    units: list[Any]


def run(model: Path, policy: Policy, folder: Path, *, overlap: bool) -> Run:
    path = folder / f"{overlap}.json"
    recorder = Recorder(path)
    with engine_of(model, policy, folder, recorder, overlap=overlap) as engine:
        log = engine.new_log()
        answers = {each.index: each.token_ids for each in engine.generate(requests(), log=log)}
        units = list(engine.runner.model.layouts)
    recorder.close()
    return Run(read_trace(path), answers, log.bytes_moved(), log.passes.waits, units)


def microseconds(trace: Trace, tracks: tuple[str, ...], *, waits: bool = False) -> np.ndarray:
    """Whether each microsecond of a trace is within a slice of these tracks: of one that is a wait, or of one that is none."""
    end = max(each["ts"] + each["dur"] for slices in trace.slices.values() for each in slices)
    found = np.zeros(end + 1, dtype=bool)
    for track, slices in trace.slices.items():
        for each in slices if track.startswith(tracks) else ():
            if each["name"].startswith(WAIT) == waits:
                found[each["ts"] : each["ts"] + each["dur"]] = True
    return found


def both(trace: Trace) -> np.ndarray:
    """Whether something was copied and something computed in each microsecond; who waits for a copy does not compute."""
    computing = microseconds(trace, COMPUTING) & ~microseconds(trace, COMPUTING, waits=True)
    copying = microseconds(trace, COPYING)
    assert computing.any()
    assert copying.any()
    return computing & copying


@pytest.fixture(scope="module", params=CASES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return CASES[request.param]


@pytest.fixture(scope="module")
def serial(policy: Policy, novels_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(novels_opt, policy, tmp_path_factory.mktemp("serial"), overlap=False)


@pytest.fixture(scope="module")
def parallel(policy: Policy, novels_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(novels_opt, policy, tmp_path_factory.mktemp("parallel"), overlap=True)


def test_nothing_is_copied_while_something_is_computed(serial: Run) -> None:
    assert not both(serial.trace).any()


def test_otherwise_it_is(parallel: Run, policy: Policy) -> None:
    if policy.weights.disk or policy.kv.disk:
        assert both(parallel.trace).any()


def test_answers_are_the_same(serial: Run, parallel: Run) -> None:
    assert serial.answers == parallel.answers


def test_no_less_is_moved_and_links_bring_one_unit_at_a_time(serial: Run, parallel: Run, policy: Policy) -> None:
    assert set(serial.moved) == set(parallel.moved)
    for name, sizes in (("disk", "stored_bytes"), ("device", "carried_bytes")):
        rings = [each.trace.counters.get(f"ring of {name}-link", [0]) for each in (serial, parallel)]
        largest = max(getattr(layout, sizes) for layout in serial.units)
        assert (max(rings[0]) > 0) == (max(rings[1]) > 0)
        lag = 2 if name == "disk" and policy.device == "sim" else 1  # the link behind gives a slot back when computing goes on already
        assert max(rings[0]) <= lag * largest
    if policy.weights.disk:
        passes = len(serial.trace.slices[PASSES])
        read = [each["name"] for each in serial.trace.slices["weights from disk"]]
        assert all(read.count(name) in (1, passes) for name in set(read)), "what streams is read once in each pass"


def test_computing_waits_for_weights(serial: Run, policy: Policy) -> None:
    streams = policy.weights.disk > 0 or (policy.device == "sim" and policy.weights.host > 0)
    assert (serial.waits.get("weights", 0.0) > 0) == streams
    assert not serial.waits.get("attention"), "it is there when it is asked for"
