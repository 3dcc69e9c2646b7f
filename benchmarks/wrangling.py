"""Entity matching, imputation and error detection by `flexgen map`: the data wrangling tasks of the FlexGen paper (tables 10 and 11).

    python benchmarks/wrangling.py run MODEL --data DIR --scratch DIR [--task NAME ...] [--shots 10] [--limit N] [-- options of flexgen map]
    python benchmarks/wrangling.py tables --data DIR --scratch DIR      # only the CSV files, with the command for each
    python benchmarks/wrangling.py table                                # what the results say

DIR holds the data as they are published: er_magellan/ (Ditto's files of pairs), imputation/{buy,restaurant}.csv and
error_detection/hospital_{dirty,clean}.csv; docs/wrangling.md says where they come from.  Every row is asked about and counted, except
the rows that serve as examples where a data set has no training part.  A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Results

DEFAULT_RESULTS = Path(__file__).parent / "results" / "wrangling.jsonl"
YES, NO = "Yes", "No"
Row = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set and how it is asked about.

    Attributes:
        name: The name of the data set.
        kind: "matching", "imputation" or "detection".
        prompt: The template of a prompt, whose fields are columns of the table.
        read: A function that reads examples and rows from the folder of the data; both have the column `truth`.
        max_tokens: The most tokens of an answer; None for Yes or No, which are scored.
    """

    name: str
    kind: str
    prompt: str
    read: Callable[[Path, int], tuple[list[Row], list[Row]]]
    max_tokens: int | None = None


def _matching(name: str, thing: str) -> Task:
    prompt = f"{thing} A is {{left}}. {thing} B is {{right}}. Question: Are {thing} A and {thing} B the same? Yes or No? Answer: "
    return Task(name=name, kind="matching", prompt=prompt, read=lambda data, shots: _read_pairs(data, name, shots))


def _imputation(name: str, column: str, question: str, max_tokens: int) -> Task:
    return Task(
        name=name, kind="imputation", prompt=f"{{known}}. {question} Answer: ", max_tokens=max_tokens,
        read=lambda data, shots: _read_imputation(data / "imputation" / f"{name}.csv", column, shots),
    )  # fmt: skip


TASKS = [
    _matching("Fodors-Zagats", "Restaurant"),
    _matching("Beer", "Beer"),
    _matching("iTunes-Amazon", "Song"),
    _matching("Walmart-Amazon", "Product"),
    _matching("Amazon-Google", "Product"),
    _matching("DBLP-ACM", "Publication"),
    _matching("Abt-Buy", "Product"),
    _imputation("restaurant", "the restaurant is located in the city of", "In which city is it?", 5),
    _imputation("buy", "manufacturer of bought item is", "Who is the manufacturer?", 10),
    Task(
        name="hospital", kind="detection", prompt="Is there a spelling error in {column}: {value}? Yes or No? Answer: ",
        read=lambda data, shots: _read_cells(data / "error_detection", shots),
    ),
]  # fmt: skip


# -- data --------------------------------------------------------------------------------------------------------------------------------


def _read_pairs(data: Path, name: str, shots: int) -> tuple[list[Row], list[Row]]:
    folder = next(data.glob(f"er_magellan/*/{name}"), None)
    if folder is None:
        raise SystemExit(f"there is no {data}/er_magellan/*/{name}")
    rows = [_pair(line) for line in _lines(folder / "test.txt")]
    train = [_pair(line) for line in _lines(folder / "train.txt")] if (folder / "train.txt").exists() else None
    return _examples(rows, train, shots)


def _lines(path: Path) -> Iterator[str]:
    packed = path.with_name(path.name + ".gz")
    with gzip.open(packed, "rt", encoding="utf-8") if packed.exists() else path.open(encoding="utf-8") as file:
        yield from file


def _pair(line: str) -> Row:
    left, right, label = line.rstrip("\n").split("\t")
    return {"left": _described(left), "right": _described(right), "truth": YES if label == "1" else NO}


def _described(record: str) -> str:
    """Return one side of a pair, "COL a VAL x COL b VAL y", as "a: x. b: y"; columns without a value are left out."""
    fields = (each.partition(" VAL ") for each in record.split("COL ") if each.strip())
    return ". ".join(f"{name.strip()}: {value.strip()}" for name, _, value in fields if value.strip())


def _read_imputation(path: Path, column: str, shots: int) -> tuple[list[Row], list[Row]]:
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    rows = [
        {"known": ". ".join(f"{name} {value}" for name, value in row.items() if name != column and value), "truth": row[column]}
        for row in found
    ]
    return _examples(rows, None, shots)


def _read_cells(folder: Path, shots: int) -> tuple[list[Row], list[Row]]:
    """Return the cells of the table with errors, but for its first column, the number of the row; both tables have the same cells."""
    dirty, clean = (list(csv.reader((folder / f"hospital_{which}.csv").open(encoding="utf-8"))) for which in ("dirty", "clean"))
    rows = [
        {"column": name, "value": value, "truth": NO if value == right else YES}
        for wrong, rights in zip(dirty[1:], clean[1:], strict=True)
        for name, value, right in list(zip(dirty[0], wrong, rights, strict=True))[1:]
    ]
    return _examples(rows, None, shots)


def _examples(rows: list[Row], train: list[Row] | None, shots: int) -> tuple[list[Row], list[Row]]:
    """Return `shots` examples, half of them with the rarer answer where there are two, and the rows that are not among them."""
    rng = random.Random(0)
    pool = list(rows if train is None else train)
    rng.shuffle(pool)
    if {row["truth"] for row in pool} <= {YES, NO}:
        yes, no = ([row for row in pool if row["truth"] == truth] for truth in (YES, NO))
        chosen = yes[: shots // 2] + no[: shots - shots // 2]
        rng.shuffle(chosen)
    else:
        chosen = pool[:shots]
    taken = set(map(id, chosen))
    return chosen, [row for row in rows if id(row) not in taken]


# -- running -----------------------------------------------------------------------------------------------------------------------------


def _write_table(path: Path, rows: Sequence[Row], *, answered: bool) -> None:
    """Write a table; examples have the answer as the column `answer`, rows have the truth apart from it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = [name for name in rows[0] if name != "truth"]
        writer = csv.writer(file)
        writer.writerow([*columns, "answer" if answered else "truth"])
        writer.writerows([*(row[name] for name in columns), row["truth"]] for row in rows)


def _command(task: Task, model: str, scratch: Path, options: Sequence[str]) -> list[str]:
    argv = [str(Path(sys.executable).with_name("flexgen")), "map", model, str(scratch / f"{task.name}.csv")]
    argv += [
        "-o",
        str(scratch / f"{task.name}-answers.csv"),
        "--prompt",
        task.prompt,
        "--examples",
        str(scratch / f"{task.name}-examples.csv"),
    ]
    argv += ["--choices", f"{YES},{NO}"] if task.max_tokens is None else ["--max-tokens", str(task.max_tokens), "--stop", "\n"]
    return [*argv, *options]


def _prepare(task: Task, args: argparse.Namespace) -> int:
    """Write the tables of a task, and return the number of rows."""
    examples, rows = task.read(args.data, args.shots)
    rows = rows[: args.limit] if args.limit else rows
    _write_table(args.scratch / f"{task.name}.csv", rows, answered=False)
    _write_table(args.scratch / f"{task.name}-examples.csv", examples, answered=True)
    return len(rows)


def _run(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    num_rows = _prepare(task, args)
    metrics = args.scratch / f"{task.name}-metrics.json"
    start = time.monotonic()
    subprocess.run(_command(task, args.model, args.scratch, ["--metrics", str(metrics), *args.options]), check=True)
    seconds = time.monotonic() - start
    with (args.scratch / f"{task.name}-answers.csv").open(encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    if len(answers) != num_rows:
        raise SystemExit(f"{task.name}: {len(answers)} answers to {num_rows} rows")
    pairs = [(row["answer"].strip().lower(), row["truth"].strip().lower()) for row in answers]
    return {
        "task": task.name, "kind": task.kind, "model": Path(args.model).name, "shots": args.shots, "rows": num_rows,
        "seconds": round(seconds, 1), **(scores(pairs) if task.max_tokens is None else {"accuracy": accuracy(pairs)}),
        "metrics": {**json.loads(metrics.read_text()), "model": Path(args.model).name},
    }  # fmt: skip


def accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the share of answers that equal the truth."""
    equal = [answer == truth for answer, truth in pairs]
    return sum(equal) / len(equal)


def scores(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return accuracy, and precision, recall and F1 of the answer Yes; 0 where there is nothing to divide by."""
    yes = YES.lower()
    hits = sum(answer == truth == yes for answer, truth in pairs)
    answered, true = (sum(pair[place] == yes for pair in pairs) for place in (0, 1))
    precision, recall = hits / max(answered, 1), hits / max(true, 1)
    return {
        "accuracy": accuracy(pairs), "precision": precision, "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
    }  # fmt: skip


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Print the results as a Markdown table."""
    print("| task | model | rows | shots | accuracy | P | R | F1 | seconds | rows/s |\n|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        values = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in ("accuracy", "precision", "recall", "f1"))
        speed = f"{row['seconds']:,.0f} | {row['rows'] / row['seconds']:.1f}"
        print(f"| {row['task']} | {row['model']} | {row['rows']:,} | {row['shots']} | {values} | {speed} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "tables", "table"))
    parser.add_argument("model", nargs="?", default="MODEL")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--task", action="append", choices=[task.name for task in TASKS])
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--limit", type=int, help="most rows of each task")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    given = sys.argv[1:]
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args = parser.parse_args(own)
    args.options = options
    results = Results(args.results)
    if args.part == "table":
        print_table(results.read())
        return 0
    if args.data is None or args.scratch is None:
        parser.error(f"{args.part} needs --data and --scratch")
    args.scratch.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        if args.task and task.name not in args.task:
            continue
        if args.part == "tables":
            _prepare(task, args)
            print(
                " ".join(json.dumps(word) if " " in word or "\n" in word else word for word in _command(task, args.model, args.scratch, []))
            )
        else:
            print_table([results.append(_run(task, args))])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
