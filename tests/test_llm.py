"""LLM: vLLM's calls over a fake engine, and when the engine is opened, kept and closed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CONTEXT, POISON, VOCAB, FakeEngine, byte_id, fake_text, write_model_folder

from flexgen import LLM, CapacityError, FlexGenError, ModelError, OptionError, RequestError, SamplingParams
from flexgen.hub.resolve import resolve_model
from flexgen.plan.workload import Workload
from flexgen.request import PartialAnswer
from flexgen.session.session import with_room
from flexgen.text.answers import RequestTranslator
from flexgen.text.common_prefixes import NO_PREFIXES
from flexgen.text.defaults import choice_seed, default_sampling_params, derive_seed, unsupported_defaults

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.fixture
def llm(model_folder: Path, engines: list[FakeEngine]) -> LLM:
    return LLM(model_folder)


def texts(outputs: list) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_memory_may_run_out_again_while_a_smaller_engine_opens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.generate(["a"], GREEDY)
    sizes = [llm.model.shrink()]
    while sizes[-1] is not None:
        sizes.append(llm.model.shrink())
    assert sizes == [2, 1, None]


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"prompt {'x' * n}" for n in range(11)]
    params = [SamplingParams(temperature=0, max_tokens=9 - n % 7) for n in range(11)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert texts(outputs) == [fake_text(prompt, p.max_tokens) for prompt, p in zip(prompts, params, strict=True)]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert [output.request_id for output in outputs] == [str(n) for n in range(11)]


@pytest.mark.parametrize(
    "prompts",
    [
        "ab",
        ["ab"],
        {"prompt": "ab"},
        [{"prompt": "ab"}],
        [64, 65],
        [[64, 65]],
        {"prompt_token_ids": [64, 65]},
        [{"prompt_token_ids": (64, 65)}],
    ],
)
def test_every_form_of_a_prompt(llm: LLM, prompts: object) -> None:
    (output,) = llm.generate(prompts, GREEDY)
    assert output.prompt_token_ids == (64, 65)
    assert texts([output]) == [fake_text("ab", 5)]


def test_several_prompts_of_ids(llm: LLM) -> None:
    assert texts(llm.generate([[64], [65, 66]], GREEDY)) == [fake_text("a", 5), fake_text("bc", 5)]


def test_what_takes_a_workload_says_so_to_prompts(llm: LLM) -> None:
    calls: list[Callable[..., Any]] = [lambda prompts: llm.stream(prompts, SamplingParams()), llm.plan, llm.open]  # pyright: ignore
    for call in calls:
        with pytest.raises(OptionError, match="prompts and SamplingParams are for generate"):
            call(["a"])
    assert len(llm.generate(["a"])) == 1


def test_an_llm_is_neither_pickled_nor_copied(llm: LLM) -> None:
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(FlexGenError, match="make one in each process"):
            spread(llm)


def test_no_prompts_open_no_engine(llm: LLM, engines: list[FakeEngine]) -> None:
    assert llm.generate([], GREEDY) == []
    assert engines == []


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        ([{"prompt": "a", "multi_modal_data": {}}], "multi_modal_data"),
        ([3.5], "prompt"),
        ([{}], "prompt"),
        ([[64, "x"]], "prompt"),
        ([[64], [VOCAB]], "prompt"),
        ([[-1]], "prompt"),
        ([[]], "prompt"),
        ([""], "prompt"),
        (["\ud800"], "prompt"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm: LLM, engines: list[FakeEngine], prompts: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, GREEDY)
    assert caught.value.param == param
    assert engines == []


class Column:
    """What of pandas' Series matters: values by labels, of which 0 is none, as after a filter."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __getitem__(self, label: int) -> object:
        raise KeyError(label)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)


class Frame(Column):
    """Of pandas' DataFrame: going through it gives the names of its columns."""

    columns = ("text",)


@pytest.mark.parametrize(
    "prompts",
    [
        Column("a", "bc"), ("a", "bc"), {"a": 1, "bc": 2}.keys(), (each for each in ["a", "bc"]), np.array(["a", "bc"]),
        Column([64], {"prompt": "bc"}), (np.array(ids) for ids in ([64], [65, 66])), [torch.tensor([64]), np.array([65.0, 66.0])],
        [{"prompt_token_ids": np.array([64])}, (np.int64(65), torch.tensor(66))], [range(64, 65), Column(65, 66)], [[64.0], "bc"],
    ],
)  # fmt: skip
def test_several_prompts_of_any_kind(llm: LLM, prompts: Any) -> None:
    outputs = llm.generate(prompts, (GREEDY for _ in range(2)))
    assert texts(outputs) == [fake_text("a", 5), fake_text("bc", 5)]
    assert all(type(token_id) is int for output in outputs for token_id in output.prompt_token_ids)
    assert all(output.prompt is None or type(output.prompt) is str for output in outputs)


@pytest.mark.parametrize(
    "prompt",
    [np.array([64, 65]), torch.tensor([64, 65]), (64, 65), range(64, 66), (each for each in (64, 65)), [64.0, 65.0], Column(64, 65)],
)
def test_token_ids_of_any_kind_are_one_prompt(llm: LLM, prompt: Any) -> None:
    assert texts(llm.generate(prompt, GREEDY)) == [fake_text("ab", 5)]


def test_rows_of_an_array_are_prompts(llm: LLM) -> None:
    assert texts(llm.generate(np.array([[64, 65], [66, 67]]), GREEDY)) == [fake_text("ab", 5), fake_text("cd", 5)]  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, float("nan"), 3.5, [64, "x"], [64, 1.5], [True], {}, {"text": "a"}, "\ud800", "", b"a", [VOCAB]])
def test_a_bad_prompt_is_named_by_its_index(llm: LLM, engines: list[FakeEngine], bad: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompt 2: "):
        llm.generate(["a", [64], bad, "b"], GREEDY)
    assert engines == []


@pytest.mark.parametrize("prompts", [None, 5, b"ab", Frame("text")])
def test_what_holds_no_prompts(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompts must be"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize(("params", "words"), [([GREEDY, None], "sampling_params 1"), ({"max_tokens": 5}, "sampling_params must be")])
def test_what_is_no_sampling_params(llm: LLM, params: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        llm.generate(["a", "b"], params)


@pytest.mark.parametrize("given", [["a", "bc"], Column("a", "bc"), (each for each in ["a", "bc"]), np.array(["a", "bc"])])
def test_encode_takes_any_texts(llm: LLM, given: Any) -> None:
    assert llm.encode(given) == [[64], [65, 66]]
    assert llm.encode("bc") == [[65, 66]]


@pytest.mark.parametrize("bad", ["\ud800", None, 5])
def test_encode_names_a_bad_text(llm: LLM, bad: Any) -> None:
    with pytest.raises(RequestError, match=r"^text 1"):
        llm.encode(["a", bad])


def test_an_answer_that_cannot_be_shown_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    works = RequestTranslator.output

    def breaks(self: RequestTranslator, results: Any, params: SamplingParams, *more: Any) -> Any:
        if params.seed == 13:
            raise IndexError("broken")
        return works(self, results, params, *more)

    monkeypatch.setattr(RequestTranslator, "output", breaks)
    good, bad = llm.generate(["ab", "ab"], [GREEDY, dataclasses.replace(GREEDY, seed=13, n=2)])
    assert texts([good]) == [fake_text("ab", 5)]
    assert [(each.index, each.finish_reason, each.stop_reason) for each in bad.outputs] == [(n, "error", "internal_error") for n in (0, 1)]


def test_a_prompt_beyond_the_context_is_refused_by_its_place(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 1: the prompt has 64 tokens") as caught:
        llm.generate(["a", "b" * CONTEXT], GREEDY)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="prompt 2: the prompt has 1,000,000 characters"):
        llm.generate(["a", "b", "b" * 10**6], GREEDY)


def test_answers_to_one_prompt_share_it(llm: LLM, engines: list[FakeEngine]) -> None:
    """All whole pages of it before its last token."""
    llm.generate(["a" * 40, "b" * 33], [SamplingParams(n=3, max_tokens=1), GREEDY])
    assert [(point.length, point.num_requests) for point in engines[0].prefixes.path((byte_id("a"),) * 40)] == [(32, 3)]
    assert engines[0].prefixes.path((byte_id("b"),) * 33) == ()


def test_sharing_can_be_switched_off(model_folder: Path, engines: list[FakeEngine]) -> None:
    with LLM(model_folder, prefix_sharing=False) as llm:
        llm.generate(["a" * 40] * 2, GREEDY)
    assert engines[0].prefixes is NO_PREFIXES


def test_max_tokens_is_cut_to_the_context(llm: LLM) -> None:
    outputs = llm.generate(["a" * 60, "a" * 60], [SamplingParams(max_tokens=100), SamplingParams(max_tokens=None)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4]


def test_sampling_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(OptionError, match=r"^2 sampling_params for 1 prompt$"):
        llm.generate(["a"], [GREEDY, GREEDY])


def test_defaults_are_vllm_s(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 16


def test_a_stop_token_ends_ids_but_not_text(llm: LLM) -> None:
    (free,) = llm.generate("ab", GREEDY)
    last = free.outputs[0].token_ids[3]
    (output,) = llm.generate("ab", dataclasses.replace(GREEDY, stop_token_ids=(last,)))
    cut = free.outputs[0].token_ids.index(last)
    answer = output.outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", last)
    assert answer.token_ids == free.outputs[0].token_ids[: cut + 1]
    assert answer.text == free.outputs[0].text[:cut]


def test_the_model_s_own_end_has_no_stop_reason_and_can_be_ignored(tmp_path: Path, engines: list[FakeEngine]) -> None:
    free = LLM(write_model_folder(tmp_path / "free")).generate("ab", GREEDY)[0].outputs[0]
    end = free.token_ids[2]
    llm = LLM(write_model_folder(tmp_path / "ending", generation_config={"eos_token_id": end}))
    ended, ignoring = llm.generate(["ab", "ab"], [GREEDY, dataclasses.replace(GREEDY, ignore_eos=True)])
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    assert ignoring.outputs[0] == free


def test_several_answers_to_each_prompt(llm: LLM, engines: list[FakeEngine]) -> None:
    outputs = llm.generate(["ab", "cd"], [SamplingParams(n=2, max_tokens=4), SamplingParams(n=3, max_tokens=5, seed=9)])
    assert [[answer.index for answer in output.outputs] for output in outputs] == [[0, 1], [0, 1, 2]]
    first, second = [[answer.text for answer in output.outputs] for output in outputs]
    assert first == [fake_text("ab", 4, seed=derive_seed(0, index), greedy=False) for index in (0, 1)]
    assert second == [fake_text("cd", 5, seed=choice_seed(9, choice), greedy=False) for choice in (0, 1, 2)]
    assert engines[0].workload == Workload(prompt_lens=(2,) * 5, output_lens=(4, 4, 5, 5, 5), may_end_early=True)
    assert [output.request_id for output in llm.generate(["ab", "ab"], GREEDY)] == ["5", "6"]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (free,) = llm.generate("ab", GREEDY)
    text = free.outputs[0].text
    (output,) = llm.generate("ab", dataclasses.replace(GREEDY, stop=text[2:4]))
    answer = output.outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text[:2], "stop", text[2:4])
    assert answer.token_ids == free.outputs[0].token_ids[:4]


def test_a_parameter_that_cannot_be_served_is_named_with_its_prompt(llm: LLM, engines: list[FakeEngine]) -> None:
    with pytest.raises(RequestError, match="prompt 1: logit_bias has token ids outside") as caught:
        llm.generate(["a", "b"], [GREEDY, dataclasses.replace(GREEDY, logit_bias={VOCAB: 1})])
    assert caught.value.param == "logit_bias"
    assert engines == []


def test_passes_are_told(llm: LLM) -> None:
    told: list[list[PartialAnswer]] = []
    requests = llm.model.token_requests(0, [64], dataclasses.replace(GREEDY, n=9))
    assert len(list(llm.stream(requests, workload(9), on_pass=lambda live: told.append(list(live))))) == 9
    assert len(told) == 3


def test_a_request_that_fails_while_running_fails_alone(llm: LLM) -> None:
    outputs = llm.generate([[64], [POISON], [65]], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].outputs[0].stop_reason == "non_finite_logits"


def test_seeds(model_folder: Path, engines: list[FakeEngine]) -> None:
    """A seed of its own fixes a request; without one, the engine's seed and the request's number do."""
    sampled = SamplingParams(max_tokens=8)
    fixed = dataclasses.replace(sampled, seed=5)
    one, two = LLM(model_folder, seed=1), LLM(model_folder, seed=2)
    assert texts(one.generate("ab", fixed)) == texts(two.generate("ab", fixed)) == [fake_text("ab", 8, seed=5, greedy=False)]
    again = LLM(model_folder, seed=1)
    assert texts(one.generate(["ab", "ab"], sampled)) == [fake_text("ab", 8, seed=derive_seed(1, index), greedy=False) for index in (1, 2)]
    assert texts(again.generate(["cd", "ab", "ab"], sampled))[1:] == [
        fake_text("ab", 8, seed=derive_seed(1, index), greedy=False) for index in (1, 2)
    ]


def test_derived_seeds_are_fixed_for_ever() -> None:
    assert derive_seed(0, 0) == 3679321338066202065
    assert len({derive_seed(base, index) for base in range(50) for index in range(50)}) == 2500


def test_without_a_tokenizer(bare_model_folder: Path, engines: list[FakeEngine]) -> None:
    llm = LLM(bare_model_folder)
    (output,) = llm.generate([64, 65], GREEDY)
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 5
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("ab", GREEDY)
    with pytest.raises(ModelError, match="no tokenizer"):
        llm.get_tokenizer()


def test_another_tokenizer(bare_model_folder: Path, model_folder: Path, engines: list[FakeEngine]) -> None:
    llm = LLM(bare_model_folder, tokenizer=model_folder)
    assert texts(llm.generate("ab", GREEDY)) == [fake_text("ab", 5)]
    assert llm.get_tokenizer().decode([64]) == "a"
    with pytest.raises(ModelError, match="no tokenizer files"):
        LLM(model_folder, tokenizer=bare_model_folder)


def test_tqdm_draws_only_when_asked(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr() == ("", "")
    assert len(llm.generate(["a", "b"], GREEDY, use_tqdm=True)) == 2
    assert "2/2" in capsys.readouterr().err


# -- options ------------------------------------------------------------------------------------------------------------------------


def test_an_unknown_option_is_named_with_the_near_one(model_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"no option 'host_memory'; did you mean host_mem\?"):
        LLM(model_folder, host_memory="1GiB")
    with pytest.raises(OptionError, match="tensor_parallel_size"):
        LLM(model_folder, tensor_parallel_size=2)
    with pytest.raises(OptionError, match="trust_remote_code"):
        LLM(model_folder, trust_remote_code=True)


def test_arguments_of_vllm(model_folder: Path, engines: list[FakeEngine], caplog: pytest.LogCaptureFixture) -> None:
    """Harmless ones change nothing but a line of the log; those of calls may ask for nothing."""
    with caplog.at_level(logging.WARNING, logger="flexgen"):
        llm = LLM(model=str(model_folder), tensor_parallel_size=1, gpu_memory_utilization=0.9, swap_space=4, device="cpu", seed=None)
    (warning,) = caplog.messages
    assert "gpu_memory_utilization, swap_space" in warning
    assert texts(llm.generate("ab", GREEDY, use_tqdm=False, lora_request=None)) == [fake_text("ab", 5)]
    with pytest.raises(OptionError, match="lora_request"):
        llm.generate("ab", GREEDY, lora_request=object())  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="generate has no option 'max_tokens'"):
        llm.generate("ab", max_tokens=5)  # pyright: ignore[reportCallIssue]


def test_a_bar_of_one_s_own(llm: LLM) -> None:
    bars: list[dict[str, object]] = []

    def bar(results: object, **how: object) -> object:
        bars.append(how)
        return results

    assert len(llm.generate(["a", "b"], GREEDY, use_tqdm=bar)) == 2
    assert [how["total"] for how in bars] == [2]


def test_no_tokenizer_if_none_is_wanted(model_folder: Path, engines: list[FakeEngine]) -> None:
    llm = LLM(model_folder, skip_tokenizer_init=True)
    assert llm.tokenizer is None
    assert llm.generate([64, 65], GREEDY)[0].outputs[0].text == ""


def test_defaults_without_those_of_the_model(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", generation_config={"temperature": 0.5})
    assert LLM(folder).get_default_sampling_params() == SamplingParams(temperature=0.5)
    assert LLM(folder, generation_config="vllm").get_default_sampling_params() == SamplingParams()


def test_max_model_len(model_folder: Path, engines: list[FakeEngine]) -> None:
    llm = LLM(model_folder, max_model_len=10)
    assert len(llm.generate("a" * 8, SamplingParams(max_tokens=None))[0].outputs[0].token_ids) == 2
    with pytest.raises(OptionError, match="context of 64"):
        LLM(model_folder, max_model_len=CONTEXT + 1)


def test_files_may_be_resolved_already(model_folder: Path) -> None:
    assert LLM(resolve_model(model_folder)).files.folder == model_folder


def test_a_config_that_transformers_refuses_is_a_model_error(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "opt", "vocab_size": "many"}')
    with pytest.raises(ModelError, match=r"config\.json"):
        LLM(folder)


@pytest.mark.parametrize(
    ("generation_config", "wanted"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "max_new_tokens": 7},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05, max_tokens=7),
        ),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0)),
        ({"temperature": None}, SamplingParams()),
    ],
)
def test_defaults_of_generation_config(generation_config: dict, wanted: SamplingParams) -> None:
    assert default_sampling_params(generation_config) == wanted


def test_a_bad_generation_config_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p"):
        default_sampling_params({"top_p": 7})


def test_settings_that_are_not_applied_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert unsupported_defaults({"typical_p": 1.0, "min_p": 0.1, "repetition_penalty": 1.05, "suppress_tokens": None}) == []
    folder = write_model_folder(tmp_path / "model", generation_config={"no_repeat_ngram_size": 3})
    with caplog.at_level(logging.WARNING, logger="flexgen"):
        LLM(folder)
    assert "no_repeat_ngram_size=3" in caplog.text


# -- the engine's life ----------------------------------------------------------------------------------------------------------------


def test_the_engine_opens_late_and_stays(llm: LLM, engines: list[FakeEngine]) -> None:
    assert engines == []
    llm.generate(["ab", "cd"], GREEDY)
    llm.generate("ab", GREEDY)
    assert len(engines) == 1
    assert engines[0].workload == Workload(prompt_lens=(2, 2), output_lens=(5, 5), may_end_early=True)


def workload(count: int, prompt: int = 10, output: int = 10) -> Workload:
    return Workload(prompt_lens=(prompt,) * count, output_lens=(output,) * count)


@pytest.fixture
def open_sized(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeEngine]]:
    """Has engines of a size opened; each is expected to need `seconds` for any job."""
    opened: list[FakeEngine] = []

    def sized(
        max_num_seqs: int = 4,
        kv_bytes: int = 10**6,
        *,
        seconds: float = 100.0,
        most_tokens: int = 10_000,
        refuse: Collection[Workload] = (),
    ) -> list[FakeEngine]:
        def open_engine(files: object, options: object, workload: Workload) -> FakeEngine:
            if workload in refuse:
                raise CapacityError("too large")
            opened.append(FakeEngine(workload, max_num_seqs, kv_bytes, most_tokens))
            plan = opened[-1].plan
            opened[-1].plan = dataclasses.replace(plan, forecast=dataclasses.replace(plan.forecast, seconds=seconds))
            return opened[-1]

        monkeypatch.setattr("flexgen.session.session.open_engine", open_engine)
        return opened

    return sized


@pytest.mark.parametrize(
    ("max_num_seqs", "kv_bytes", "old", "new", "reopens"),
    [
        (4, 10_000, workload(4), workload(2), False),
        (4, 10_000, workload(4), workload(5), True),  # its block was as large as the old work, not as the budget
        (4, 10_000, workload(8), workload(50), False),
        (4, 800, workload(4), workload(4, prompt=30), True),  # the pool was as large as the old work
        (4, 700, workload(4), workload(4, prompt=30), True),  # the workspace was sized for shorter prompts
        (4, 700, workload(4, prompt=30), workload(4, prompt=29), False),
        (4, 200, workload(4), workload(1, prompt=30), True),  # not even one fits
    ],
)  # fmt: skip
def test_the_engine_is_opened_again_when_its_plan_does_not_suit(
    model_folder: Path,
    open_sized: Callable[..., list[FakeEngine]],
    max_num_seqs: int,
    kv_bytes: int,
    old: Workload,
    new: Workload,
    reopens: bool,
) -> None:
    opened = open_sized(max_num_seqs, kv_bytes)
    llm = LLM(model_folder)
    llm.open(old)
    llm.open(new)
    assert len(opened) == 1 + reopens
    assert opened[0].closed == reopens


def test_prompts_that_grow_are_served_by_two_plans(llm: LLM, engines: list[FakeEngine]) -> None:
    """The first for what was asked, the second with room for more."""
    for length in range(1, CONTEXT):
        llm.generate([[64] * length], SamplingParams(temperature=0, max_tokens=1))
    assert [engine.workload.prompt_lens for engine in engines] == [(1,), (2, CONTEXT - 1)]


def test_growth_is_geometric(model_folder: Path, open_sized: Callable[..., list[FakeEngine]]) -> None:
    opened = open_sized(4, 10**6)
    llm = LLM(model_folder)
    llm.model._engine.model.token_limits = VOCAB, 10_000
    for length in range(100, 9_000, 100):
        llm.open(workload(1, prompt=length, output=length // 10))
    planned = [max(engine.workload.prompt_lens) for engine in opened]
    assert planned[-1] == 9_999
    assert all(later >= min(2 * earlier, 9_999) for earlier, later in pairwise(planned))


def test_a_plan_with_room_expects_the_work_alone(llm: LLM, engines: list[FakeEngine]) -> None:
    llm.generate([[64]], GREEDY)
    llm.generate([[64] * 9], GREEDY)
    assert engines[1].expected == Workload(prompt_lens=(9,), output_lens=(5,), may_end_early=True)


def test_without_room_for_more_the_work_alone_is_planned(model_folder: Path, open_sized: Callable[..., list[FakeEngine]]) -> None:
    grown = workload(2, prompt=20)
    opened = open_sized(refuse=[with_room(grown, CONTEXT)])
    llm = LLM(model_folder)
    llm.open(workload(2))
    llm.open(grown)
    assert [engine.workload for engine in opened] == [workload(2), grown]


def test_a_request_that_fits_no_plan_does_not_have_every_call_planned(
    model_folder: Path, open_sized: Callable[..., list[FakeEngine]]
) -> None:
    opened = open_sized(4, 300, most_tokens=30)
    llm = LLM(model_folder)
    mixed = Workload(prompt_lens=(10, 600), output_lens=(10, 10))
    for _ in range(3):
        llm.open(mixed)
        llm.open(workload(1))
    llm.open(Workload(prompt_lens=(9, 700), output_lens=(10, 10)))
    assert len(opened) == 1


def test_a_job_beyond_the_plan_is_worth_another_one_when_it_takes_as_long_as_opening(
    model_folder: Path, open_sized: Callable[..., list[FakeEngine]]
) -> None:
    opened = open_sized(4, seconds=2.0)
    llm = LLM(model_folder)
    llm.open(workload(4))
    reopened = []
    for count in (5, 4, 6, 7, 5):  # the fourth makes 6 seconds of jobs that were too large for the plan
        llm.open(workload(count))
        reopened.append(len(opened) - 1)
    assert reopened == [0, 0, 0, 1, 1]


def test_bounds_on_time_hold_for_every_call(model_folder: Path, open_sized: Callable[..., list[FakeEngine]]) -> None:
    opened = open_sized(4, seconds=2.0)
    llm = LLM(model_folder, max_job_seconds=3)
    llm.open(workload(2))
    llm.open(workload(1))
    assert len(opened) == 1
    forecast = dataclasses.replace(opened[0].plan.forecast, seconds=4.0)
    opened[0].plan = dataclasses.replace(opened[0].plan, forecast=forecast)  # as expected for the next job
    llm.open(workload(3))
    assert [engine.workload for engine in opened] == [workload(2), workload(3)]  # and no more than was asked for is planned


def test_after_a_failure_the_engine_is_fresh(llm: LLM, engines: list[FakeEngine]) -> None:
    def requests():
        yield from llm.model.token_requests(0, [64], GREEDY)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(llm.stream(requests(), workload(2)))
    assert engines[0].closed
    llm.generate("ab", GREEDY)
    assert len(engines) == 2


def test_close(llm: LLM, engines: list[FakeEngine]) -> None:
    with llm:
        llm.generate("ab", GREEDY)
        assert llm.report().num_requests == 1
    assert engines[0].closed
    llm.close()
    with pytest.raises(FlexGenError, match="closed"):
        llm.generate("ab", GREEDY)


def test_no_report_before_a_run(llm: LLM) -> None:
    with pytest.raises(FlexGenError, match="nothing has run"):
        llm.report()


def test_a_forgotten_llm_closes_its_engine(model_folder: Path, engines: list[FakeEngine]) -> None:
    LLM(model_folder).generate("ab", GREEDY)
    gc.collect()
    assert engines[0].closed


def test_a_script_that_forgets_to_close_ends_cleanly(model_folder: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import flexgen, flexgen.session.session, fakes
class Engine(fakes.FakeEngine):
    def close(self): print("closed")
flexgen.session.session.open_engine = lambda files, options, workload: Engine(workload)
llm = flexgen.LLM({str(model_folder)!r})
print(llm.generate("ab", flexgen.SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].text)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [fake_text("ab", 3), "closed"], "")
