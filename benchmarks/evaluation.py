"""lm-evaluation-harness with a model of ours and with its own `hf` backend: same requests, scores beside each other, in float32 on the CPU.

    pip install -e '.[eval,bench]'
    python benchmarks/evaluation.py MODEL --data DIR [--tasks lambada mmlu endings gsm8k wikitext]

DIR has what the tasks read: lambada/lambada_test.jsonl (OpenAI's), mmlu/dev/*.csv and mmlu/test/*.csv (question, choice0 to choice3,
answer), gsm8k/test.jsonl, wikitext-2/wiki.test.raw.  `endings` is HellaSwag's form over WikiText: which of four sentences ends a
paragraph, three of them taken from other paragraphs.  One JSON line per task on stdout and in the results file.

float32 is itself uncertain where a score is the sum over many tokens.  Documents in which the two differ by more than 1e-4 are therefore
scored once more by the hf backend in float64, and the distance of each of the two from that is what counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Results

from flexgen import LLM
from flexgen.evaluation.lm_eval import FlexGenLM

DEFAULT_RESULTS = Path(__file__).parent / "results" / "evaluation.jsonl"
SUBJECTS = ("abstract_algebra", "us_foreign_policy", "world_religions")
Documents = list[list[Any]]  # of each document, the responses to its requests
ALL_TASKS = ("lambada", "mmlu", "endings", "gsm8k", "wikitext")
TOLERANCE = 1e-4  # of a log likelihood
ACC = "metric_list:\n  - metric: acc\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=list(ALL_TASKS))
    parser.add_argument("--batch-size", type=int, default=8, help="of the hf backend")
    parser.add_argument("--host-mem", help="budget of flexgen")
    parser.add_argument("--limit", type=int, help="take only so many documents of each task")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for task in args.tasks:
            write_task(task, args.data, folder)
            if args.limit is not None:
                lines = folder / f"{task}.jsonl"
                lines.write_text("".join(lines.read_text().splitlines(keepends=True)[: args.limit]))
            row = compare(task, args.model, folder, args.batch_size, args.host_mem)
            failures += not row["equal"]
            print(json.dumps(Results(args.results).append(row)), flush=True)
    return 1 if failures else 0


# -- the comparison ---------------------------------------------------------------------------------------------------------------------


def compare(task: str, model: str, folder: Path, batch_size: int, host_mem: str | None) -> dict[str, Any]:
    """Run a task with both, and return the row for the results."""
    options: dict[str, Any] = {} if host_mem is None else {"host_mem": host_mem}
    with LLM(model, dtype="float32", **options) as llm, FlexGenLM(llm, use_tqdm=False) as lm:
        ours, ours_seconds = run(lm, task, folder)
    theirs, theirs_seconds = run(hf(model, batch_size), task, folder)
    found = differences(ours, theirs)
    exact = against_float64(task, model, folder, batch_size, ours["documents"], theirs["documents"]) if found["far_documents"] else {}
    # where float32 itself is farther off than the tolerance, ours must be no farther off than hf's
    near = (
        exact["ours_from_float64"] <= max(TOLERANCE, exact["hf_from_float64"]) if exact else found["most_relative_difference"] <= TOLERANCE
    )
    return {
        "benchmark": "evaluation",
        "task": task,
        "model": Path(model).name,
        "num_requests": sum(map(len, ours["documents"])),
        **found,
        **exact,
        "equal": near and not found["different_greedy_flags"] and not found["different_texts"],
        "flexgen": {"metrics": ours["metrics"], "seconds": ours_seconds},
        "hf": {"metrics": theirs["metrics"], "seconds": theirs_seconds, "batch_size": batch_size},
    }


def against_float64(task: str, model: str, folder: Path, batch_size: int, ours: Documents, theirs: Documents) -> dict[str, Any]:
    """Score the documents in which the two differ by more than float32 explains in float64, and return how far each is from that."""
    far = far_documents(ours, theirs)
    lines = folder / f"{task}.jsonl"
    every = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(every[place] for place in far))
    exact, _ = run(hf(model, batch_size, "float64"), task, folder)
    most = []
    for documents in (ours, theirs):
        pairs = [pair for place, document in zip(far, exact["documents"], strict=True) for pair in logprobs(documents[place], document)]
        most.append(max(abs(one - other) for one, other in pairs))
    return {"ours_from_float64": most[0], "hf_from_float64": most[1]}


def hf(model: str, batch_size: int, dtype: str = "float32") -> Any:
    from lm_eval.models.huggingface import HFLM

    backend: Any = HFLM  # lm-eval's decorators hide its types
    return backend(pretrained=model, dtype=dtype, device="cpu", batch_size=batch_size)


def run(lm: Any, task: str, folder: Path) -> tuple[dict[str, Any], float]:
    """Return the metrics and every response of a task, and the seconds that the model took for the responses."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    harness: Any = lm_eval
    seconds = 0.0
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        real = getattr(lm, name)

        def timed(requests: list[Any], real: Any = real, **how: Any) -> Any:
            nonlocal seconds
            start = time.monotonic()
            try:
                return real(requests, **how)
            finally:
                seconds += time.monotonic() - start

        setattr(lm, name, timed)
    found = harness.simple_evaluate(
        model=lm, tasks=[f"local_{task}"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )
    assert found is not None
    results, samples = found["results"], found["samples"]
    metrics = {name: {metric: value for metric, value in each.items() if isinstance(value, float)} for name, each in results.items()}
    ordered = [sample for name in sorted(samples) for sample in sorted(samples[name], key=lambda each: each["doc_id"])]
    return {"metrics": metrics, "documents": [[each[0] for each in sample["resps"]] for sample in ordered]}, seconds


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return how far the responses differ."""
    documents = list(zip(ours["documents"], theirs["documents"], strict=True))
    pairs = [pair for document in documents for pair in zip(*document, strict=True)]
    texts = [one == other for one, other in pairs if isinstance(one, str)]
    scores = [pair for document in documents for pair in logprobs(*document)]
    flags = [str(one[1]) == str(other[1]) for one, other in pairs if isinstance(one, (list, tuple))]
    return {
        "most_logprob_difference": max((abs(one - other) for one, other in scores), default=0.0),
        "most_relative_difference": max((abs(one - other) / max(1.0, abs(other)) for one, other in scores), default=0.0),
        "far_documents": len(far_documents(ours["documents"], theirs["documents"])) if flags else 0,
        "equal_greedy_flags": sum(flags),
        "different_greedy_flags": len(flags) - sum(flags),
        "equal_texts": sum(texts),
        "different_texts": len(texts) - sum(texts),
    }


def far_documents(ours: Documents, theirs: Documents) -> list[int]:
    """Return the places of the documents in which a log likelihood differs by more than the tolerance."""
    documents = enumerate(zip(ours, theirs, strict=True))
    return [place for place, document in documents if any(abs(one - other) > TOLERANCE for one, other in logprobs(*document))]


def logprobs(ours: list[Any], theirs: list[Any]) -> Iterator[tuple[float, float]]:
    """Yield the log likelihoods of a document's responses in pairs."""
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, str):
            yield float(logprob(one)), float(logprob(other))


def logprob(response: Any) -> Any:
    return response[0] if isinstance(response, (list, tuple)) else response


# -- the tasks --------------------------------------------------------------------------------------------------------------------------


def write_task(task: str, data: Path, folder: Path) -> None:
    """Write the YAML of a task named local_<task>, and the lines that it reads."""
    {"lambada": lambada, "mmlu": mmlu, "endings": endings, "gsm8k": gsm8k, "wikitext": wikitext}[task](data, folder)


def lambada(data: Path, folder: Path) -> None:
    lines = (data / "lambada" / "lambada_test.jsonl").read_text().splitlines()[:500]
    write(folder, "lambada", [json.loads(line) for line in lines], (
        "output_type: loglikelihood\n"
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
        "metric_list:\n  - metric: perplexity\n  - metric: acc\n"
    ))  # fmt: skip


def mmlu(data: Path, folder: Path) -> None:
    """Five examples before each question, as usual."""
    rows: list[dict[str, Any]] = []
    for subject in SUBJECTS:
        shown = "".join(question(row, answer=True) for row in read_csv(data / "mmlu" / "dev" / f"{subject}_dev.csv")[:5])
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n{shown}"
        tested = read_csv(data / "mmlu" / "test" / f"{subject}_test.csv")
        rows += [{"prompt": head + question(row), "answer": int(row["answer"])} for row in tested]
    form = 'output_type: multiple_choice\ndoc_to_text: "{{prompt}}"\ndoc_to_choice: ["A", "B", "C", "D"]\ndoc_to_target: answer\n'
    write(folder, "mmlu", rows, form + ACC)


def question(row: dict[str, str], *, answer: bool = False) -> str:
    choices = "".join(f"{letter}. {row[f'choice{place}']}\n" for place, letter in enumerate("ABCD"))
    return f"{row['question'].strip()}\n{choices}Answer:" + (f" {'ABCD'[int(row['answer'])]}\n\n" if answer else "")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def endings(data: Path, folder: Path) -> None:
    lines = (data / "wikitext-2" / "wiki.test.raw").read_text().splitlines()
    paragraphs = [line.strip() for line in lines if line.count(" . ") >= 3 and not line.startswith(" =")][:300]
    parts = [paragraph.rpartition(" . ")[0].rpartition(" . ")[::2] for paragraph in paragraphs]
    choose = random.Random(0)
    rows = []
    for place, (context, ending) in enumerate(parts):
        others = choose.sample([end for other, (_, end) in enumerate(parts) if other != place], 3)
        answer = choose.randrange(4)
        rows.append({"context": context + " .", "endings": [*others[:answer], ending, *others[answer:]], "answer": answer})
    form = 'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: endings\ndoc_to_target: answer\n'
    write(folder, "endings", rows, form + ACC + "  - metric: acc_norm\n")


def gsm8k(data: Path, folder: Path) -> None:
    """Two examples before each question, answers of up to 96 tokens."""
    lines = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    shown = "".join(f"Question: {line['question']}\nAnswer: {line['answer']}\n\n" for line in lines[-2:])
    rows = [{"prompt": f"{shown}Question: {line['question']}\nAnswer:", "answer": line["answer"]} for line in lines[:50]]
    write(folder, "gsm8k", rows, (
        'output_type: generate_until\ndoc_to_text: "{{prompt}}"\n'
        "doc_to_target: \"{{answer.split('####')[-1].strip()}}\"\n"
        'generation_kwargs:\n  until: ["Question:", "\\n\\n", "</s>"]\n  do_sample: false\n  temperature: 0.0\n  max_gen_toks: 96\n'
        "filter_list:\n  - name: number\n    filter:\n"
        "      - function: regex\n        regex_pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'\n        group_select: -1\n"
        "      - function: take_first\n"
        "metric_list:\n  - metric: exact_match\n"
    ))  # fmt: skip


def wikitext(data: Path, folder: Path) -> None:
    text = (data / "wikitext-2" / "wiki.test.raw").read_text()
    rows = [{"text": text[start : start + 30_000]} for start in range(0, 150_000, 30_000)]
    metrics = "".join(f"  - metric: {name}\n" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"))
    form = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
    write(folder, "wikitext", rows, form + metrics)


def write(folder: Path, name: str, rows: list[dict[str, Any]], form: str) -> None:
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {lines}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + form)


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
