"""Products in int8 from the option to the answers: the same tokens at every home, and the memory that the plan accounts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import machine_of

from flexgen import LLM, OptionError, SamplingParams
from flexgen.kernels.int8 import products
from flexgen.kernels.int8.products import check_exact
from flexgen.plan.workload import Workload
from flexgen.session import prepare

PROMPTS = ["It was a dark night", "The man who"]
PINS: dict[str, Any] = {"kv": "host=1", "max_num_seqs": 2, "micro_batch_tokens": 32, "prefill_tokens": 64, "schedule": "diagonal"}
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {name: [(1, 1e11)] for name in ("float32", "float32 int8", "float64")}
    machine = machine_of(dense=dense, decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    monkeypatch.setattr(prepare, "cached_machine", lambda *_, **__: machine)


@pytest.fixture
def exact() -> None:
    """Skip where the engine would refuse the processor."""
    try:
        check_exact()
    except OptionError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("exact")
def test_tokens_do_not_depend_on_homes_and_memory_is_as_planned(novels_opt: Path) -> None:
    answers, held = set[tuple[str, ...]](), dict[str, int]()
    for how, weights in (("int8", "host=1"), ("int8", "host=.4,disk=.6"), ("int8", "disk=1"), ("auto", "host=1")):
        with LLM(novels_opt, dtype="float32", device="cpu", cpu_compute=how, weights=weights, **PINS) as llm:
            outputs = llm.generate(PROMPTS, GREEDY)
            report = llm.report()
        if how == "int8":
            answers.add(tuple(output.outputs[0].text for output in outputs))
        memory: Any = report.forecast["memory_bytes"]
        assert report.placement["weights"].get("host", 0) == memory["host"]["weights"]
        held[f"{how} {weights}"] = memory["host"]["weights"]
    assert len(answers) == 1
    assert held["int8 host=1"] < 0.5 * held["auto host=1"], "but for the head, a quarter of float32"


@pytest.mark.usefixtures("exact")
def test_a_machine_without_rates_is_measured_again(novels_opt: Path) -> None:
    with (
        LLM(novels_opt, dtype="float64", device="cpu", cpu_compute="int8", **PINS) as llm,
        pytest.raises(OptionError, match="no rates for products in int8 beside float64"),
    ):
        llm.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("allowed", [{}, {"allow_formats": "int4,k8v4"}], ids=["formats as they are", "formats to choose"])
def test_a_processor_whose_products_are_not_exact_is_refused_by_the_plan(
    novels_opt: Path, allowed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no weights are converted for a run that would be refused afterwards."""
    exact = products._product
    monkeypatch.setattr(products, "_product", lambda one, other: exact(one, other).clamp(max=2**20))
    with (
        LLM(novels_opt, dtype="float32", device="cpu", cpu_compute="int8", **PINS, **allowed) as llm,
        pytest.raises(OptionError, match="are not exact"),
    ):
        llm.model.plan(Workload(prompt_lens=(8,), output_lens=(4,)))
