"""The model for lm-evaluation-harness against its own `hf` backend, and its command; skipped where it is not installed (the extra eval)."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.oracle import StopAfterPasses, num_done
from typer.testing import CliRunner

from flexgen import LLM
from flexgen.cli import app
from flexgen.errors import OptionError
from flexgen.jobs.interrupt import Stopped

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra eval) is not installed")

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "The old house stood upon the hill, and the wind blew about it. "
PAIRS = [
    ("The old house", " stood"), ("The old house ", "stood upon the"), ("", "It was a dark night"), ("", "</s>It was"), (TEXT * 60, "And"),
    ("The old house", " stood"), ("The old house", " zebra"), ("</s>The old", " house"),
]  # fmt: skip
GENERATE = [
    ("The old house", {"until": ["\n\n", " the"], "max_gen_toks": 16}), ("She said", {"until": "e", "do_sample": False}),
    (TEXT * 60, {"until": [], "max_gen_toks": 12}), ("It was ", {"until": [".", ","], "max_gen_toks": 24, "temperature": 0.0}),
]  # fmt: skip


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module", params=["opt", "qwen3"])
def folder(request: pytest.FixtureRequest, novels_opt: Path, novels_qwen3: Path) -> Path:
    return novels_opt if request.param == "opt" else novels_qwen3


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[Any]:
    from flexgen.evaluation.lm_eval import FlexGenLM

    with FlexGenLM(folder, dtype="float32", use_tqdm=False) as lm:
        yield lm


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate (the extra bench)")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)  # pyright: ignore[reportArgumentType]


def test_log_likelihoods_are_those_of_hf(ours: Any, theirs: Any) -> None:
    requests = instances("loglikelihood", PAIRS)
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for (logprob, is_greedy), (logprob_of_hf, is_greedy_of_hf) in zip(found, wanted, strict=True):
        assert logprob == pytest.approx(logprob_of_hf, abs=1e-4)
        assert is_greedy == is_greedy_of_hf


def test_rolling_log_likelihoods_are_those_of_hf(ours: Any, theirs: Any) -> None:
    texts = [(TEXT * 90,), ("Short.",), ("",)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    wanted = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-2, rel=1e-6)


def test_texts_are_those_of_hf(ours: Any, theirs: Any) -> None:
    found = ours.generate_until(instances("generate_until", GENERATE))
    assert found == theirs.generate_until(instances("generate_until", GENERATE), disable_tqdm=True)
    assert len(set(map(len, found))) > 2


def test_limits_and_names(ours: Any, theirs: Any) -> None:
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks", "tokenizer_name"):
        assert getattr(ours, name) == getattr(theirs, name) or name == "tokenizer_name"
    assert ours.get_model_info()["model_dtype"] == "float32"


def test_chat_templates(folder: Path, tmp_path: Path) -> None:
    """Rendered as lm-eval does: without messages of the system where the template refuses them."""
    from flexgen.evaluation.lm_eval import FlexGenLM

    with LLM(folder, dtype="float32", chat_template=TEMPLATE) as llm, FlexGenLM(llm) as lm:
        user, said = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "So"}
        assert lm.apply_chat_template([{"role": "system", "content": "Be kind."}, user]) == "<user>Hello\n<assistant>"
        assert lm.apply_chat_template([user, said], add_generation_prompt=False) == "<user>Hello\n<assistant>So"
    with LLM(folder, dtype="float32") as llm, FlexGenLM(llm) as lm, pytest.raises(OptionError, match="no chat template"):
        lm.apply_chat_template([user])


def test_keywords_that_contradict_each_other(folder: Path) -> None:
    from flexgen.evaluation.lm_eval import FlexGenLM

    with pytest.raises(OptionError, match="think_end_token"):
        FlexGenLM(folder, enable_thinking=True)
    with LLM(folder, dtype="float32") as llm, pytest.raises(OptionError, match="dtype is an option of the model"):
        FlexGenLM(llm, dtype="float32")


# -- tasks ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks over local files, and nothing else to read or write."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"text": f"Chapter {number}. The old house stood upon the hill"} for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(
        f"task: words\n{head}output_type: loglikelihood\ndoc_to_text: \"{{{{text.split(' ')[:-1]|join(' ')}}}}\"\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    (tmp_path / "tasks" / "lines.yaml").write_text(
        f'task: lines\n{head}output_type: generate_until\ndoc_to_text: "{{{{text}}}}"\ndoc_to_target: ","\n'
        "generation_kwargs:\n  until: [',']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"
    )
    return tmp_path / "tasks"


def evaluated(lm: Any, tasks: Path, **how: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(model=lm, tasks=["words", "lines"], task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0, **how)
    assert found is not None
    return {name: {metric: value for metric, value in each.items() if metric != "alias"} for name, each in found["results"].items()}


def test_tasks_give_the_results_of_hf(ours: Any, theirs: Any, tasks: Path) -> None:
    found, wanted = evaluated(ours, tasks), evaluated(theirs, tasks)
    assert found["lines"] == wanted["lines"]
    assert found["words"]["acc,none"] == wanted["words"]["acc,none"]
    assert found["words"]["perplexity,none"] == pytest.approx(wanted["words"]["perplexity,none"], rel=1e-4)


def test_an_interrupted_evaluation_goes_on_and_scores_nothing_twice(
    novels_opt: Path, tasks: Path, tmp_path: Path, streamed: list[int]
) -> None:
    from flexgen.evaluation.lm_eval import FlexGenLM

    how: dict[str, Any] = {"max_gen_toks": 8, "use_tqdm": False}
    with LLM(novels_opt, dtype="float32", max_num_seqs=2, max_model_len=64) as llm:
        with FlexGenLM(llm, **how) as lm:
            whole = evaluated(lm, tasks)
        num_scored, num_generated = streamed
        with FlexGenLM(llm, state=tmp_path / "state", stop=StopAfterPasses(6), **how) as lm, pytest.raises(Stopped):
            evaluated(lm, tasks)
        (folder,) = (tmp_path / "state").iterdir()
        left = 24 - num_done(folder)
        assert 0 < left < 24
        for _ in range(2):
            with FlexGenLM(llm, state=tmp_path / "state", **how) as lm:
                assert evaluated(lm, tasks) == whole
    assert streamed[2:] == [num_scored, num_scored * left // 24, num_generated], "the second time, nothing is left to do"


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", "lm-eval", *map(str, words)])


def test_the_command(novels_opt: Path, tasks: Path, tmp_path: Path) -> None:
    done = command(
        novels_opt, "--dtype", "float32", "--state", tmp_path / "state", "--progress", "none", "--tasks", "words", "--include_path", tasks,
        "--limit", 6, "--output_path", tmp_path / "out", "--log_samples",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "flexgen ({'pretrained': " in done.stdout
    assert "|words|" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["words"]["acc,none"] <= 1
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 6


@pytest.mark.parametrize(("words", "code", "said"), [
    ((), 2, "which tasks?"),
    (("--tasks", "words", "--bogus", "1"), 2, "--bogus"),
    (("--model", "hf", "--tasks", "words"), 2, "--model of lm-eval has no meaning here: MODEL is the model"),
    (("--batch_size", "4", "--tasks", "words"), 2, "--batch_size of lm-eval has no meaning here"),
    (("--model_args", "dtype=float32", "--tasks", "words"), 2, "--model_args dtype is unknown"),
    (("--tasks", "nothing_of_that_name"), 3, "Tasks not found: nothing_of_that_name"),
])  # fmt: skip
def test_arguments_that_are_refused(novels_opt: Path, words: tuple[str, ...], code: int, said: str) -> None:
    done = command(novels_opt, "--progress", "none", *words)
    assert (done.exit_code, said in done.stderr) == (code, True), done.output
