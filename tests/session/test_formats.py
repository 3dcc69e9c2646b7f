"""Formats that a run may choose among: planned for the job, converted on first need, kept for the life of a model and of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine_of

from flexgen.errors import JobError, OptionError
from flexgen.evaluation.answers import Answers
from flexgen.hub.model_files import ModelFiles
from flexgen.jobs.durable import answer_lines
from flexgen.llm import LLM
from flexgen.options import EngineOptions
from flexgen.plan.formats import FormatChoice, FormatPrice, Formats
from flexgen.plan.tell.forecast import Plan
from flexgen.plan.workload import Workload
from flexgen.quantize.cache import cached_conversion, conversion_left, entries
from flexgen.quantize.settings import QuantizeSettings
from flexgen.request import SamplingParams
from flexgen.session.fingerprint import known_beforehand, stated
from flexgen.session.formats import plan_formats
from flexgen.session.model import ResolvedModel
from tests.quantize.reading import made

SLOW = machine_of(disk_read=4e7, disk_write=4e7)  # so that the bytes of a tiny model count
QUICK = {"schedule": "zigzag", "kv": "host=1", "micro_batch_tokens": 64}  # little is left to search
PLACED: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "host_mem": "2GiB", "weights": "disk=1", **QUICK}
SHORT, LONG = (Workload(prompt_lens=(8,), output_lens=(number,)) for number in (1, 30))
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}  # small matrices are padded to pages of the disk
    return made(tmp_path_factory.mktemp("formats") / "tiny", "llama", torch.bfloat16, **sizes)[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a machine whose disk decides."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("flexgen.session.formats.measured_machine", lambda *_: SLOW)
    monkeypatch.setattr("flexgen.session.prepare.measured_machine", lambda *_: SLOW)
    return tmp_path / "cache" / "flexgen" / "weights"


def planned(files: ModelFiles, workload: Workload, allow: str) -> Plan:
    options = EngineOptions(**PLACED, allow_formats=allow)
    return plan_formats(ResolvedModel(files, options), options, workload)


def choice_of(plan: Plan) -> tuple[Formats, dict[Formats, FormatPrice]]:
    assert plan.formats is not None
    return plan.formats.chosen, {price.formats: price for price in plan.formats.prices}


def test_weights_that_stream_for_long_are_converted_and_nothing_is_done_for_a_plan(files: ModelFiles, cache: Path) -> None:
    chosen, prices = choice_of(planned(files, LONG, "int4,k8v4"))
    assert chosen == Formats("int4", "auto")  # KV of a few tokens decides nothing
    assert set(prices) == {Formats(weights, kv) for weights in ("auto", "int4") for kv in ("auto", "k8v4")}
    assert entries() == []
    own, four = prices[Formats("auto", "auto")], prices[Formats("int4", "auto")]
    assert own.seconds is not None
    assert four.seconds is not None
    assert own.seconds > 1.1 * four.seconds
    assert own.conversion_seconds == 0 < four.conversion_seconds


def test_a_short_job_does_not_wait_for_a_conversion_but_takes_one_that_is_there(files: ModelFiles) -> None:
    chosen, prices = choice_of(planned(files, SHORT, "int4"))
    assert chosen == Formats("auto", "auto")
    assert prices[Formats("int4", "auto")].conversion_seconds > 0
    settings = QuantizeSettings(weight_format="int4")
    assert conversion_left(files, settings) == 1
    cached_conversion(files, settings)
    assert conversion_left(files, settings) == 0
    chosen, prices = choice_of(planned(files, SHORT, "int4"))
    assert chosen == Formats("int4", "auto")
    assert prices[chosen].conversion_seconds == 0


def test_a_model_without_weights_to_round_stays_as_it_is(tmp_path: Path) -> None:
    odd = made(tmp_path / "odd", "llama", torch.bfloat16, hidden_size=24, intermediate_size=40, num_attention_heads=2, head_dim=12)[1]
    chosen, prices = choice_of(planned(odd, LONG, "int4"))
    assert chosen == Formats("auto", "auto")
    assert "no weights can be rounded to int4" in str(prices[Formats("int4", "auto")].problem)


def test_a_cache_without_room_is_not_filled(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen.session.formats.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    chosen, prices = choice_of(planned(files, LONG, "int4"))
    assert chosen == Formats("auto", "auto")
    assert "10 B are free" in str(prices[Formats("int4", "auto")].problem)


@pytest.mark.parametrize("chosen", [Formats("int4", "auto"), Formats("int4", "k8v4"), Formats("auto", "auto")], ids=str)
def test_tokens_are_those_of_the_formats_by_name(files: ModelFiles, chosen: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, chosen)
    prompts = [list(range(3, 40)), [5, 6, 7]]
    with LLM(files, **PLACED, allow_formats=["k8v4", "int4"]) as llm:
        assert llm.options.allow_formats == "int4,k8v4"
        outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, GREEDY)]
        assert (llm.options.allow_formats, llm.options.weight_format, llm.options.kv_format) == (None, chosen.weights, chosen.kv)
        assert llm.report().formats == FormatChoice(chosen=chosen, prices=PRICES)
        choose(monkeypatch, Formats("auto", "int4"))
        assert [list(each.outputs[0].token_ids) for each in llm.generate(prompts * 3, GREEDY)] == outputs * 3
        fingerprint = llm.model.fingerprint()
    options = EngineOptions(**PLACED, weight_format=chosen.weights, kv_format=chosen.kv)
    beforehand = known_beforehand(files, options)
    assert beforehand.keys() >= stated(options).keys() | {"model"}
    assert {name: fingerprint[name] for name in beforehand} == beforehand, "what is known before a conversion is what is found after it"
    with LLM(files, **PLACED, weight_format=chosen.weights, kv_format=chosen.kv) as named:
        assert [list(each.outputs[0].token_ids) for each in named.generate(prompts, GREEDY)] == outputs
        assert named.model.fingerprint() == fingerprint


PRICES = (FormatPrice(formats=Formats("auto", "auto"), seconds=9.0), FormatPrice(formats=Formats("int4", "k8v4"), seconds=3.0))


def choose(monkeypatch: pytest.MonkeyPatch, chosen: Formats) -> None:
    """Have these formats chosen."""

    def plan(model: ResolvedModel, options: EngineOptions, workload: Workload) -> Any:
        return type("Plan", (), {"formats": FormatChoice(chosen=chosen, prices=PRICES)})()

    monkeypatch.setattr("flexgen.session.session.choose_formats", plan)


LINES = [{"prompt": [5, 6, 7 + number], "max_tokens": 3, "temperature": 0} for number in range(3)]


def test_a_job_goes_on_in_the_formats_it_was_begun_with(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, Formats("int4", "auto"))
    with LLM(files, **PLACED, allow_formats="int4") as llm:
        first = list(answer_lines(llm, LINES[:1], tmp_path / "job"))
    choose(monkeypatch, Formats("auto", "k8v4"))  # as another machine might
    with LLM(files, **PLACED, allow_formats="int4,k8v4") as llm:
        both = list(answer_lines(llm, LINES[:2], tmp_path / "job"))
        assert (llm.options.weight_format, llm.options.kv_format) == ("int4", "auto")
        assert llm.report().formats == FormatChoice(chosen=Formats("int4", "auto"))
    assert both[0] == first[0]
    with LLM(files, **PLACED, weight_format="int4") as named:
        assert list(answer_lines(named, LINES[:2], tmp_path / "job")) == both
    with LLM(files, **PLACED, allow_formats="int8,k8v4") as llm:
        with pytest.raises(JobError, match=r"was begun with weights in int4, which the formats that are allowed \(int8,k8v4\) leave out"):
            answer_lines(llm, LINES, tmp_path / "job")
        list(answer_lines(llm, LINES, tmp_path / "job", accept_changes=True))
        assert (llm.options.weight_format, llm.options.kv_format) == ("auto", "k8v4")
    with LLM(files, **PLACED, kv_format="k8v4") as named:
        list(answer_lines(named, LINES, tmp_path / "job"))


def test_a_job_that_was_begun_as_stored_stays_so(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(files, **PLACED) as llm:
        list(answer_lines(llm, LINES[:1], tmp_path / "job"))
    choose(monkeypatch, Formats("int4", "auto"))
    with LLM(files, **PLACED, allow_formats="int4") as llm:
        list(answer_lines(llm, LINES, tmp_path / "job"))
        assert llm.options.weight_format == "auto"


def test_an_evaluation_is_of_formats_by_name(files: ModelFiles) -> None:
    with LLM(files, **PLACED, allow_formats="int4") as llm, pytest.raises(OptionError, match="name weight_format and kv_format"):
        Answers(llm=llm)


def test_the_choice_is_written_with_the_report(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, Formats("auto", "k8v4"))
    with LLM(files, **PLACED, allow_formats="k8v4") as llm:
        llm.generate([[5, 6, 7]], GREEDY)
        written = json.loads(llm.report().to_json())["formats"]
    assert written["chosen"] == {"weights": "auto", "kv": "k8v4"}
    assert [price["seconds"] for price in written["prices"]] == [9.0, 3.0]
