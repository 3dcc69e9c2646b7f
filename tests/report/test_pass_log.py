"""Sums over passes, and what they would be at other rates."""

from __future__ import annotations

import pytest
from machines import machine_of

from flexgen.plan.model import KVGroupSpec, ModelSpec, UnitSpec
from flexgen.plan.policy import Fractions, Policy
from flexgen.plan.price.work import PassWork
from flexgen.report.pass_log import PassLog

SPEC = ModelSpec(
    name="tiny", model_type="opt", units=(UnitSpec(name="layers.0", disk_bytes=8, decoded_bytes=8, flops_per_token=8.0),),
    kv_groups=(KVGroupSpec(num_layers=1, bytes_per_token=4, attention_flops_per_pair=4.0),), resident_bytes=0, embedding_bytes=0,
    embedding_row_bytes=4, hidden_size=2, intermediate_size=4, vocab_size=8, max_position_embeddings=64,
)  # fmt: skip
POLICY = Policy(
    device="cpu", dtype="bfloat16", weights=Fractions(disk=1.0), kv=Fractions(host=1.0), kv_device_bytes=0, kv_host_bytes=64,
    kv_disk_bytes=0, host_ring_bytes=0, device_ring_bytes=0, workspace_bytes=0, embedding_resident=True, schedule="diagonal",
    max_num_seqs=1, prefill_tokens=1, micro_batch_tokens=1, page_tokens=1, compute_threads=1, io_threads=1,
)  # fmt: skip


@pytest.fixture
def log() -> PassLog:
    """Three seconds of reading beside one of computing, and the reverse."""
    machine = machine_of(disk_read=1e9, dense={"bfloat16": [(1, 1e9)]})
    log = PassLog(SPEC, machine, POLICY, ["disk"])
    for read, computed in ((3e9, 1e9), (1e9, 3e9)):
        log.add(5.0, PassWork(disk_read_bytes=read, dense_flops=computed), {})
    return log


def test_each_pass_is_decided_by_its_busiest_resource(log: PassLog) -> None:
    assert log.busiest_seconds == 6
    assert log.decided == {"disk_read": 3, "compute": 3}
    assert (log.ideal["disk_read"], log.ideal["compute"]) == (4, 4)


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [({}, 6), ({"compute": 1.0}, 6), ({"compute": 0.5}, 9), ({"compute": 0.5, "disk_read": 0.5}, 12), ({"compute": 0.1}, 40)],
)
def test_at_other_rates(log: PassLog, rates: dict[str, float], seconds: float) -> None:
    """The last: both passes are decided by computing then, of which there is 4 seconds at the best rate."""
    assert log.busiest_seconds_at(rates) == pytest.approx(seconds)
    assert log.busiest_seconds == 6


def test_passes_that_are_compared_with_no_machine() -> None:
    log = PassLog(SPEC, None, POLICY, ["disk"])
    work = PassWork(disk_read_bytes=3e9, dense_flops=1e9)
    for _ in range(2):
        log.add(5.0, work, {"disk": 1.5})
    assert (log.num_passes, log.seconds, log.waits) == (2, 10.0, {"disk": 3.0})
    assert (log.ideal, log.expected, log.busiest_seconds, log.expected_of(work)) == ({}, {}, 0.0, 0.0)
