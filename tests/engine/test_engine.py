"""The engine step by step: requests may come at any time, and an engine without work does nothing.

That the tokens are those of transformers is the business of test_matrix.py; here they are compared with those of one run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen.devices.sim import SimulatedDevice
from flexgen.engine.engine import Engine
from flexgen.engine.runner import ModelRunner
from flexgen.errors import EngineError
from flexgen.models.assemble import assemble_model
from flexgen.passes.plan import MicroBatch, PassPlan, Slice
from flexgen.plan.policy import Fractions, Policy
from flexgen.request import Generated, TokenRequest, TokenResult
from flexgen.weights.rows import EmbeddingRows

POLICY = Policy(
    device="cpu", dtype="float32", weights=Fractions(host=0.5, disk=0.5), kv=Fractions(host=1.0), kv_device_bytes=0,
    kv_host_bytes=4 << 20, kv_disk_bytes=0, host_ring_bytes=16 << 20, device_ring_bytes=0, workspace_bytes=0, embedding_resident=False,
    schedule="diagonal", max_num_seqs=4, prefill_tokens=16, micro_batch_tokens=12, page_tokens=16, compute_threads=1, io_threads=1,
)  # fmt: skip


def requests(count: int = 10) -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(3)
    lengths = [3 + 5 * index % 17 for index in range(count)]
    prompts = [tuple(torch.randint(5, 120, (length,), generator=generator).tolist()) for length in lengths]
    return [TokenRequest(index=index, prompt_token_ids=each, max_tokens=2 + 3 * index % 7) for index, each in enumerate(prompts)]


@pytest.fixture
def engine(request: pytest.FixtureRequest, novels_opt: Path) -> Iterator[Engine]:
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    with Engine(model, replace(POLICY, schedule=getattr(request, "param", "diagonal")), poison=True) as engine:
        yield engine


def by_index(results: list[TokenResult]) -> dict[int, TokenResult]:
    assert len({each.index for each in results}) == len(results)
    return {each.index: each for each in results}


def finish(engine: Engine) -> list[TokenResult]:
    results: list[TokenResult] = []
    while engine.has_work:
        results += engine.step()
    assert all(used == 0 for used in engine.cache.used_bytes.values())
    return results


def test_an_idle_engine_does_nothing(engine: Engine) -> None:
    assert not engine.has_work
    assert [engine.step() for _ in range(3)] == [[], [], []]
    assert engine.log.passes.num_passes == 0


def test_requests_added_at_once(engine: Engine) -> None:
    wanted = by_index(list(engine.generate(requests())))
    for each in requests():
        engine.add(each)
    assert engine.has_work
    assert by_index(finish(engine)) == wanted


@pytest.mark.parametrize("engine", ["diagonal", "zigzag", "row"], indirect=True)
def test_requests_added_while_others_run(engine: Engine) -> None:
    """One between every two steps, and two after the engine was idle."""
    wanted = by_index(list(engine.generate(requests())))
    *most, last, very_last = requests()
    results: list[TokenResult] = []
    for each in most:
        engine.add(each)
        results += engine.step()
    results += finish(engine)
    assert engine.step() == []
    num_passes = engine.log.passes.num_passes
    for each in (last, very_last):
        engine.add(each)
        results += finish(engine)
    assert engine.log.passes.num_passes > num_passes
    assert by_index(results) == wanted


def test_requests_added_to_a_run(engine: Engine) -> None:
    """While `generate` goes on; their results come with the others'."""
    wanted = by_index(list(engine.generate(requests())))
    given, added = requests()[::2], requests()[1::2]
    results: list[TokenResult] = []
    for result in engine.generate(given):
        results.append(result)
        if added:
            engine.add(added.pop())
    assert by_index(results) == wanted


def test_a_run_begins_only_once_the_last_one_is_over(engine: Engine) -> None:
    engine.add(requests()[0])
    with pytest.raises(EngineError, match="over"):
        next(engine.generate(requests()[1:]))
    assert [each.index for each in finish(engine)] == [0], "and disturbs nothing"


def test_what_had_ended_comes_with_the_next_step(engine: Engine) -> None:
    first, second = requests(2)
    engine.add(replace(first, generated=Generated(token_ids=(7,) * first.max_tokens)))
    assert engine.has_work
    (result,) = engine.step()
    assert (result.index, result.token_ids, engine.log.passes.num_passes) == (0, (7,) * first.max_tokens, 0)
    engine.add(second)
    assert [each.index for each in finish(engine)] == [1]


def test_what_never_fits_stops_nothing(engine: Engine) -> None:
    """More requests than are read ahead at once, before one that fits."""
    too_long = [replace(each, index=100 + each.index, prompt_token_ids=(5,) * 5000) for each in requests(20)]
    results = by_index(list(engine.generate([*too_long, *requests(2)])))
    assert len(results) == 22
    assert all(results[index].error is None for index in (0, 1))
    assert all(results[each.index].error is not None for each in too_long)


def test_forgotten_requests_leave_nothing(engine: Engine) -> None:
    for each in requests():
        engine.add(each)
    engine.step()
    engine.clear()
    assert not engine.has_work
    assert all(used == 0 for used in engine.cache.used_bytes.values())
    assert len(list(engine.generate(requests()))) == 10


@pytest.mark.parametrize("model", ["novels_opt", "novels_qwen3"])
def test_the_device_is_not_asked_for_token_ids(model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the embedding are gathered without waiting for the device, also where the model reshapes its input."""
    folder = request.getfixturevalue(model)
    backend, waits, gather = SimulatedDevice(64 << 20), list[int](), EmbeddingRows.rows

    def counting(rows: EmbeddingRows, *args: Any) -> Any:
        before = backend.synchronisations
        found = gather(rows, *args)
        waits.append(backend.synchronisations - before)
        return found

    monkeypatch.setattr(EmbeddingRows, "rows", counting)
    policy = replace(POLICY, device="sim", device_ring_bytes=16 << 20, kv=Fractions(device=1.0), kv_device_bytes=4 << 20, kv_host_bytes=0)
    model = assemble_model(folder, AutoConfig.from_pretrained(folder), torch.float32)
    with Engine(model, policy, backend=backend) as engine:
        list(engine.generate(requests(3)))
    assert waits
    assert set(waits) == {0}


# -- plans made by hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "tier"), [("cpu", "host"), ("cpu", "disk"), ("sim", "device"), ("sim", "host")])
def test_logits_of_a_range_of_positions(novels_opt: Path, device: str, tier: str, tmp_path: Path) -> None:
    """A prompt in two chunks and another one, of which each wants other positions, against the model's own logits."""
    sizes = {f"kv_{each}_bytes": (4 << 20) * (each == tier) for each in ("device", "host", "disk")}
    policy = replace(
        POLICY, **sizes, device=device, kv=Fractions(**{tier: 1.0}), device_ring_bytes=(16 << 20) * (device == "sim"),
        kv_staging_bytes=(1 << 20) * (tier == "disk"), kv_tail_bytes=(1 << 20) * (tier == "disk"),
    )  # fmt: skip
    model = assemble_model(novels_opt, AutoConfig.from_pretrained(novels_opt), torch.float32)
    backend = SimulatedDevice(64 << 20) if device == "sim" else None
    runner = ModelRunner(model, policy, backend=backend, offload_dir=tmp_path, poison=True)
    generator = torch.Generator().manual_seed(4)
    prompts = [tuple(torch.randint(5, 120, (length,), generator=generator).tolist()) for length in (23, 9)]
    pages = [runner.cache.admit(tier) for _ in prompts]
    assert all(runner.cache.reserve(each, len(prompt)) for each, prompt in zip(pages, prompts, strict=True))

    def part(sequence: int, start: int, stop: int, wanted: range) -> Slice:
        prompt = prompts[sequence]
        return Slice(
            sequence=sequence, token_ids=prompt[start:stop], start=start, prompt_len=len(prompt), total=len(prompt), wanted=wanted,
            tables=tuple(map(tuple, pages[sequence].tables)),
        )  # fmt: skip

    passes = [
        [(part(0, 0, 10, range(2, 7)), part(1, 0, 9, range(9, 9)))],
        [(part(0, 10, 23, range(10, 23)),)],
    ]
    if tier != "disk":  # there a later chunk waits for the next pass
        passes = [[passes[0][0], passes[1][0]]]
    found: dict[tuple[int, int], torch.Tensor] = {}
    try:
        runner.load()
        with torch.no_grad():
            for batches in passes:
                plan = PassPlan(
                    micro_batches=tuple(MicroBatch(home=tier, slices=each, after=tuple(range(i))) for i, each in enumerate(batches))
                )
                outputs, _ = runner.run(plan)
                for batch, output in zip(plan.micro_batches, outputs, strict=True):
                    found.update(zip(batch.wanted, output.logits.to("cpu"), strict=True))
            reference = AutoModelForCausalLM.from_pretrained(novels_opt, dtype=torch.float32, attn_implementation="eager").eval()
            whole = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]  # (tokens, vocab)
    finally:
        runner.close()
    assert list(found) == [(0, position) for position in (*range(2, 7), *range(10, 23))]
    for (sequence, position), row in found.items():
        torch.testing.assert_close(row, whole[sequence][position], rtol=1e-3, atol=1e-3)
