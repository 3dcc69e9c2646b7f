"""Hidden states that leave a stage and enter another one: both halves of a model, each with a runner of its own, answer as the whole does.

The halves are whole models that are left before a layer, or entered there; that a stage needs only its own layers is tested where models
are cut.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen.base.recorder import COMPUTE, WAITING, Recorder
from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.boundary import Boundary, CheckedBoundary
from flexgen.engine.choosing import BatchAnswer, Chooser
from flexgen.engine.engine import Engine
from flexgen.engine.pipeline import Pipeline, PipelineEngine
from flexgen.engine.runner import ModelRunner
from flexgen.engine.sequence import LiveSequence
from flexgen.io.direct_io import FileSet
from flexgen.kv.lanes import Lanes, StageKV, lanes_of
from flexgen.models.assemble import AssembledModel, assemble_model
from flexgen.models.coroutine import current_forward
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import TokenRequest
from tests.traces import read_trace

BEFORE = 2  # the layer at which the second half begins
CPU = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=1.0), kv=Fractions(host=1.0), kv_host_bytes=4 << 20, embedding_resident=False,
    schedule="diagonal", max_num_seqs=4, prefill_tokens=32, micro_batch_tokens=12, page_tokens=16, compute_threads=1, io_threads=1,
    host_ring_bytes=0, longest_sequence=64, num_blocks=2,
)  # fmt: skip
DISK = replace(
    CPU, kv=Fractions(host=0.5, disk=0.5), kv_host_bytes=2 << 20, kv_disk_bytes=2 << 20, kv_staging_bytes=1 << 20, kv_tail_bytes=1 << 20
)
SIM = replace(
    CPU, device="sim", weights=Fractions(device=1.0), kv=Fractions(device=0.5, host=0.5), kv_device_bytes=2 << 20, kv_host_bytes=2 << 20
)
STAGES = {"cpu, cpu": (CPU, CPU), "disk, cpu": (DISK, CPU), "cpu, sim": (CPU, SIM), "sim, disk": (SIM, DISK), "sim, sim": (SIM, SIM)}


class Ended(Exception):
    """The end of a half of the model."""


class Queue(Boundary):
    """Hidden states by micro-batch: those that come, or those that leave."""

    def __init__(self, *, receives: bool = False, there: dict[int, torch.Tensor] | None = None) -> None:
        self.receives, self.sends = receives, not receives
        self.there: dict[int, torch.Tensor] = {} if there is None else there
        self.error: Exception | None = None

    def arrived(self, batch: int) -> bool:
        if self.error is not None:
            raise self.error
        return batch in self.there

    def take(self, batch: int) -> torch.Tensor:
        return self.there.pop(batch)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        assert type(hidden) is torch.Tensor
        assert hidden.device.type == "cpu"
        assert batch not in self.there
        self.there[batch] = hidden


def half(folder: Path, *, first: bool) -> AssembledModel:
    """A model that is left before a layer, or entered there."""
    model = assemble_model(folder, AutoConfig.from_pretrained(folder), torch.float32)
    whole: Any = model.bound.model
    forward: Callable[..., Any] = model.bound.forward

    def leave(module: object, args: tuple[torch.Tensor, ...], how: dict[str, Any]) -> None:
        current: Any = current_forward()
        current.stage_output(args[0] if args else how["hidden_states"])
        raise Ended

    def enter(module: object, args: tuple[torch.Tensor, ...], how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current: Any = current_forward()
        hidden = current.stage_input()
        return ((hidden, *args[1:]), how) if args else ((), how | {"hidden_states": hidden})

    def until(*args: Any) -> torch.Tensor | None:
        try:
            return forward(*args)
        except Ended:
            return None

    whole.model.decoder.layers[BEFORE].register_forward_pre_hook(leave if first else enter, with_kwargs=True)
    if not first:
        return model
    model.bound.forward = until  # type: ignore[method-assign]
    return replace(model, layers=model.layers[:BEFORE])


@contextlib.contextmanager
def runner_of(model: AssembledModel, policy: Policy, folder: Path, recorder: Recorder | None = None) -> Iterator[ModelRunner]:
    backend = SimulatedDevice(96 << 20, max_delay_seconds=0.0002) if policy.device == "sim" else None
    with contextlib.closing(ModelRunner(model, policy, backend=backend, offload_dir=folder, poison=True, recorder=recorder)) as runner:
        runner.load()
        yield runner


class Halves(Pipeline):
    """Both halves, one after the other."""

    def __init__(self, runners: tuple[ModelRunner, ModelRunner], lanes: Lanes) -> None:
        self._runners, self._lanes = runners, lanes
        self._answers: dict[int, list[BatchAnswer]] = {}

    def begin(self, block: int, plan: PassPlan, requests: Mapping[int, LiveSequence], on_unit: Callable[[int], None]) -> None:
        first, second = self._runners
        leaving = Queue()
        outputs, _ = first.run(self._lanes.for_stage(plan, 0), on_unit, leaving)
        assert outputs == []
        assert sorted(leaving.there) == list(range(len(plan.micro_batches)))
        outputs, _ = second.run(self._lanes.for_stage(plan, 1), boundary=Queue(receives=True, there=leaving.there))
        chooser, self._answers[block] = Chooser(second.copies), []
        for batch, output in zip(plan.micro_batches, outputs, strict=True):
            wanted = [requests[sequence] for sequence, _ in batch.wanted]
            answer = chooser.start(batch, output, [each.request for each in wanted], [each.generated for each in wanted])
            self._answers[block].append(answer())

    def finish(self, block: int) -> tuple[list[BatchAnswer], dict[str, float]]:
        return self._answers.pop(block), {}

    def forget(self, sequence_ids: Collection[int]) -> None:
        self._runners[1].forget(sequence_ids)


def requests() -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(5, 120, (3 + 7 * index % 31,), generator=generator).tolist()) for index in range(12)]
    kinds: list[dict[str, Any]] = [{}, {"num_prompt_logprobs": 1}, {"temperature": 0.8, "seed": 5}]
    return [
        TokenRequest(index=index, prompt_token_ids=prompt, max_tokens=2 + 5 * index % 9, **kinds[index % 3])
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def wanted(novels_opt: Path) -> dict[int, tuple[int, ...]]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, replace(CPU, num_blocks=1), poison=True) as engine:
        return {each.index: each.token_ids for each in engine.generate(requests())}


@pytest.mark.parametrize("name", STAGES)
def test_two_stages_answer_as_one(name: str, wanted: dict[int, tuple[int, ...]], novels_opt: Path, tmp_path: Path) -> None:
    """Whatever their devices are and wherever the KV of each lives."""
    policies = STAGES[name]
    with (
        runner_of(half(novels_opt, first=True), policies[0], tmp_path) as first,
        runner_of(half(novels_opt, first=False), policies[1], tmp_path) as second,
    ):
        lanes = lanes_of([
            StageKV(groups=runner.cache.groups, policy=policy) for runner, policy in zip((first, second), policies, strict=True)
        ])  # fmt: skip
        engine = PipelineEngine(first, lanes, Halves((first, second), lanes))
        results = list(engine.generate(requests()))
        assert all(used == 0 for block in engine.blocks for used in block.cache.used_bytes.values())
        for runner in (first, second):
            disk: Any = runner.cache.pools.get("disk")
            assert disk is None or all(not slots for slots in disk.tails._slots), "tails are free again"
    assert {each.index: each.token_ids for each in results} == wanted
    scored = [each for each in results if each.prompt_logprobs is not None]
    assert [len(each.prompt_logprobs or ()) for each in scored] == [len(requests()[each.index].prompt_token_ids) - 1 for each in scored]


# -- one pass of the second half, whose hidden states come from another thread ------------------------------------------------------------


def plan_of(runner: ModelRunner, count: int) -> PassPlan:
    """Micro-batches of one prompt each, but the last, which goes on where the first ends."""
    batches: list[MicroBatch] = []
    for number in range(count - 1):
        kv = runner.cache.admit("host")
        assert runner.cache.reserve(kv, 5)
        tables = tuple(map(tuple, kv.tables))
        piece = Slice(sequence=number, token_ids=(7, 8, 9, 10, 11), start=0, prompt_len=5, total=5, wanted=range(4, 5), tables=tables)
        batches.append(MicroBatch(home="host", slices=(piece,)))
    (whole,) = batches[0].slices
    batches.append(replace(batches[0], slices=(replace(whole, token_ids=whole.token_ids[2:], start=2),), after=(0,)))
    batches[0] = replace(batches[0], slices=(replace(whole, token_ids=whole.token_ids[:2], wanted=range(5, 5)),))
    return PassPlan(micro_batches=tuple(batches))


def hidden_states(folder: Path, tmp_path: Path, count: int) -> dict[int, torch.Tensor]:
    """What the first half hands over."""
    leaving = Queue()
    with runner_of(half(folder, first=True), CPU, tmp_path) as first, torch.no_grad():
        first.run(plan_of(first, count), boundary=leaving)
    return leaving.there


def test_micro_batches_begin_when_their_hidden_states_have_arrived(novels_opt: Path, tmp_path: Path) -> None:
    """In any order; the loop is woken by each, and what it waits for is the link."""
    left = hidden_states(novels_opt, tmp_path, 4)
    recorder = Recorder(tmp_path / "trace.json")
    with runner_of(half(novels_opt, first=False), CPU, tmp_path, recorder) as second, torch.no_grad():
        coming, begun, may_send = Queue(receives=True), list[int](), threading.Event()
        taken = coming.take

        def take(batch: int) -> torch.Tensor:
            begun.append(batch)
            may_send.set()
            return taken(batch)

        coming.take = take  # type: ignore[method-assign]

        def send() -> None:
            for batch in (2, 1, 3, 0):
                if batch not in (2, 3):  # nothing goes on before the one that was sent last
                    assert may_send.wait(60)
                    may_send.clear()
                coming.there[batch] = left[batch]
                second.wake()
                threading.Event().wait(0.05)

        sender = threading.Thread(target=send, name="test-sender", daemon=True)
        sender.start()
        outputs, waits = second.run(plan_of(second, 4), boundary=coming)
        sender.join()
    recorder.close()
    assert begun == [2, 1, 0, 3], "the last one goes on where the first one ends"
    assert len(outputs) == 4
    assert set(waits) == {"link"}
    slices = read_trace(tmp_path / "trace.json").named(COMPUTE, "wait for link")
    assert slices
    assert all(each["cname"] == WAITING for each in slices)
    assert sum(each["dur"] for each in slices) <= 1e6 * waits["link"] + 1e5


def test_what_went_wrong_with_hidden_states_is_raised(novels_opt: Path, tmp_path: Path) -> None:
    with runner_of(half(novels_opt, first=False), CPU, tmp_path) as second, torch.no_grad():
        coming = Queue(receives=True)

        def fail() -> None:
            coming.error = OSError("the stage before is gone")
            second.wake()

        timer = threading.Timer(0.05, fail)
        timer.start()
        with pytest.raises(OSError, match="is gone"):
            second.run(plan_of(second, 3), boundary=coming)
        timer.join()


def test_nothing_results_from_what_has_changed(novels_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stage cannot end its pass without the hidden states that are kept until files have been checked."""
    leaving = Queue()
    with runner_of(half(novels_opt, first=True), CPU, tmp_path) as first, torch.no_grad():
        first.run(plan_of(first, 3), boundary=leaving)
        assert len(leaving.there) == 3
        leaving.there.clear()

        def changed(files: FileSet) -> None:
            raise OSError("the file has changed")

        monkeypatch.setattr(FileSet, "check_unchanged", changed)
        with pytest.raises(OSError, match="has changed"):
            first.run(plan_of(first, 3), boundary=leaving)
    assert len(leaving.there) == 2


def test_a_checked_boundary_keeps_what_leaves_last() -> None:
    behind = Queue()
    checked = CheckedBoundary(behind, 2)
    assert (checked.receives, checked.sends) == (False, True)
    one, other = torch.zeros(1), torch.ones(1)
    checked.put(1, one)
    checked.put(0, other)
    assert list(behind.there) == [1]
    checked.release()
    assert behind.there[0] is other
    assert checked.arrived(0)
    assert checked.take(0) is other
