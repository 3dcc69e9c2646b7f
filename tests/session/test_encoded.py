"""Weights that are kept as stored in host memory: the same tokens, and the memory that the plan accounts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import machine_of

from flexgen import LLM, OptionError, SamplingParams
from flexgen.plan.price.memory import ENCODED
from flexgen.session import prepare

PROMPTS = ["It was a dark night", "The man who"]
PINS: dict[str, Any] = {
    "kv": "host=1",
    "max_num_seqs": 2,
    "micro_batch_tokens": 32,
    "prefill_tokens": 64,
    "schedule": "diagonal",
}  # little is searched


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(decode_attention={"host": {}}, elementwise={"float32": 30e9}, attention={"float32": 1e11})
    monkeypatch.setattr(prepare, "cached_machine", lambda *_, **__: machine)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_tokens_do_not_change_and_memory_is_as_planned(novels_opt: Path, device: str) -> None:
    """The weights are stored in bfloat16, and computed with in float32."""
    answers, shares = set[tuple[str, ...]](), ("host=1", "encoded=1", "host=.25,encoded=.25,disk=.5", "disk=1")
    for weights in shares:
        with LLM(
            novels_opt, dtype="float32", device=device, device_mem="64MiB" if device == "sim" else None, weights=weights, **PINS
        ) as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6))
            answers.add(tuple(output.outputs[0].text for output in outputs))
            report = llm.report()
        memory: Any = report.forecast["memory_bytes"]
        planned = memory["host"]
        assert report.placement["weights"].get("host", 0) == planned["weights"] + planned[ENCODED]
        assert (planned[ENCODED] > 0) == ("encoded" in weights)
        policy: Any = report.policy
        assert policy["weights"]["encoded"] == pytest.approx({"encoded=1": 1.0, "host=.25,encoded=.25,disk=.5": 0.25}.get(weights, 0.0))
    assert len(answers) == 1


def test_weights_that_take_no_less_memory_as_stored_are_not_kept_so(novels_opt: Path) -> None:
    machine = "the weights \\(bfloat16\\) take no less memory as stored than in bfloat16: give that share to host"
    with (
        LLM(novels_opt, dtype="bfloat16", device="cpu", weights="encoded=1", **PINS) as llm,
        pytest.raises(OptionError, match=machine),
    ):
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=2))
