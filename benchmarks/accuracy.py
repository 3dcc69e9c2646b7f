"""What formats of weights and of the KV cache cost in accuracy, by the evaluations of `flexgen eval`.

    python benchmarks/accuracy.py cells MODEL --data DIR --scratch DIR [--weights int4 nf4 ...] [--kv k8v4 ...]
    python benchmarks/accuracy.py table
    python benchmarks/accuracy.py layers

`cells` scores windows of WikiText-2 (`flexgen eval perplexity`) and passages of LAMBADA (`flexgen eval lambada`) for every format of
weights with every format of KV, a line of JSON each.  What stands in the results file already is not computed again, and a cell that was
interrupted goes on from the state in the scratch folder.  The first cell is that of full precision, with which all others are compared
window by window and passage by passage: intervals hold 95 % of 10,000 bootstrap samples of these pairs.

DIR of --data has wikitext-2/wiki.test.raw (the raw test set) and lambada/lambada_test.jsonl (OpenAI's variant), see docs/accuracy.md.
`table` prints the results as a table, `layers` computes errors of single layers of real sizes (layer_errors.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_table import print_table
from layer_errors import layer_errors
from nf4 import write_nf4
from record import Results

from flexgen import LLM
from flexgen.evaluation.answers import Answers
from flexgen.evaluation.documents import read_documents
from flexgen.evaluation.encoding import Encoding
from flexgen.evaluation.lambada import read_passages, split
from flexgen.evaluation.scoring import score
from flexgen.evaluation.windows import rolling_windows
from flexgen.hub.model_files import weight_files
from flexgen.hub.resolve import resolve_model
from flexgen.options import KV_FORMATS
from flexgen.quantize.convert import convert, num_cores
from flexgen.quantize.settings import QuantizeSettings

DEFAULT_RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
FULL, NF4 = "full", "nf4"
WEIGHTS = (FULL, "int8", "int4", "flexgen-v0", NF4)
KEY = ("benchmark", "model", "weights", "kv", "dtype", "tokens", "passages", "window")
SAMPLES = 10_000
_MOST_CHARACTERS = 16  # of a token of prose, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What is scored.

    Attributes:
        data: The folder of the data sets.
        tokens: The tokens of WikiText-2 that are predicted, from its beginning.
        window: The tokens of a window.
        passages: The passages of LAMBADA, from its beginning.
    """

    data: Path
    tokens: int
    window: int
    passages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model makes of the texts.

    Attributes:
        losses: The mean loss of a token in each window of WikiText-2.
        words: For each passage of LAMBADA, the loss of its last word.
        right: For each passage, 1 if its last word is the likeliest one, else 0.
    """

    losses: list[float]
    words: list[float]
    right: list[int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cells = commands.add_parser("cells", help="score texts")
    cells.add_argument("model", type=Path)
    cells.add_argument("--data", type=Path, required=True, metavar="DIR")
    cells.add_argument("--scratch", type=Path, required=True, metavar="DIR", help="for converted models and states")
    cells.add_argument(
        "--weights", nargs="+", default=list(WEIGHTS), metavar="FORMAT", help="a format, or a format and a group size: int4:64"
    )
    cells.add_argument("--kv", nargs="+", choices=KV_FORMATS, default=list(KV_FORMATS))
    cells.add_argument("--tokens", type=int, default=32768)
    cells.add_argument("--window", type=int, default=512)
    cells.add_argument("--passages", type=int, default=300)
    cells.add_argument("--dtype", default="float32")
    table = commands.add_parser("table", help="print the results")
    layers = commands.add_parser("layers", help="errors of single layers")
    layers.add_argument("--tokens", type=int, default=64)
    for each in (cells, table, layers):
        each.add_argument("--results", type=Path, default=DEFAULT_RESULTS)
    asked = parser.parse_args()
    results = Results(asked.results)
    if asked.command == "table":
        print_table(results.read())
    elif asked.command == "layers":
        done = [row for row in results.read() if row["benchmark"] == "layer errors"]
        for row in layer_errors(asked.tokens, done):
            print(json.dumps(results.append({"benchmark": "layer errors", **row})), flush=True)
    else:
        texts = Texts(data=asked.data, tokens=asked.tokens, window=asked.window, passages=asked.passages)
        measure(asked.model, asked.weights, asked.kv, texts, asked.dtype, asked.scratch, results)
    return 0


def measure(model: Path, weights: Sequence[str], kvs: Sequence[str], texts: Texts, dtype: str, scratch: Path, results: Results) -> None:
    """Write the rows of all cells, that of full precision first."""
    scratch.mkdir(parents=True, exist_ok=True)
    cells = [(FULL, "auto")] + [(each, kv) for each in weights for kv in kvs if (each, kv) != (FULL, "auto")]
    whole: Scores | None = None
    for each, kv in cells:
        key = {
            "benchmark": "accuracy", "model": model.name, "weights": each, "kv": kv, "dtype": dtype, "tokens": texts.tokens,
            "passages": texts.passages, "window": texts.window,
        }  # fmt: skip
        row = next((row for row in results.read() if all(row.get(name) == key[name] for name in KEY)), None)
        if row is None:
            folder = in_format(model, each, scratch)
            found = scores_of(folder, kv, texts, dtype, scratch)
            stored = sum((folder / name).stat().st_size for name in weight_files(folder))
            scored = {"losses": found.losses, "words": found.words, "right": found.right}
            row = results.append(key | {"weight_bytes": stored, **figures(found, whole or found), "scores": scored})
            print(json.dumps({name: value for name, value in row.items() if name != "scores"}), flush=True)
        if whole is None:
            whole = Scores(**row["scores"])


def in_format(model: Path, weights: str, scratch: Path) -> Path:
    """Return the folder of the model with weights in a format; it is made if it is not there."""
    if weights == FULL:
        return model
    files, folder = resolve_model(model), scratch / f"{model.name}-{weights.replace(':', '-')}"
    if weights == NF4:
        return write_nf4(files, folder)
    name, _, group = weights.partition(":")
    settings = QuantizeSettings(weight_format=name, group_size=int(group)) if group else QuantizeSettings(weight_format=name)
    convert(files, folder, settings, num_threads=num_cores())
    return folder


def scores_of(folder: Path, kv: str, texts: Texts, dtype: str, scratch: Path) -> Scores:
    """Score the texts with a model, as `flexgen eval` does."""
    text = read_documents(texts.data / "wikitext-2" / "wiki.test.raw")[0]
    passages = read_passages(texts.data / "lambada" / "lambada_test.jsonl", texts.passages)
    with LLM(folder, dtype=dtype, kv_format=kv, max_model_len=texts.window) as llm:
        answers, encoding = Answers(llm=llm, state=scratch / "state"), Encoding(llm.get_tokenizer())
        tokens = encoding.encode(text[: _MOST_CHARACTERS * texts.tokens])[: texts.tokens]
        windows = list(rolling_windows(tokens, encoding.prefix_token_id, texts.window))
        rolled = score(answers, "loglikelihood_rolling", windows)
        words = score(answers, "lambada", encoding.pairs(split(index, passage) for index, passage in enumerate(passages)))
    return Scores(
        losses=[round(-each.logprob / len(window[1]), 6) for each, window in zip(rolled, windows, strict=True)],
        words=[round(-each.logprob, 5) for each in words],
        right=[int(each.is_greedy) for each in words],
    )


def figures(found: Scores, whole: Scores) -> dict[str, Any]:
    """Return perplexity and accuracy, and how far they are from those of full precision; windows count alike."""
    difference, low, high = bootstrap(found.losses, whole.losses)
    word, word_low, word_high = bootstrap(found.words, whole.words)
    share, share_low, share_high = bootstrap(found.right, whole.right)
    return {
        "perplexity": math.exp(float(np.mean(found.losses))),
        "perplexity_ratio": math.exp(difference), "perplexity_ratio_interval": [math.exp(low), math.exp(high)],
        "accuracy": float(np.mean(found.right)),
        "accuracy_difference": share, "accuracy_difference_interval": [share_low, share_high],
        "word_loss_difference": word, "word_loss_difference_interval": [word_low, word_high],
    }  # fmt: skip


def bootstrap(found: Sequence[float], whole: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of paired differences, and the interval that holds 95 % of the means of samples with replacement."""
    differences = np.asarray(found, dtype=np.float64) - np.asarray(whole, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(differences), (SAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


if __name__ == "__main__":
    raise SystemExit(main())
