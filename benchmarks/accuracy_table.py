"""The results of accuracy.py as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_WEIGHTS, _KV = ("full", "int8", "int4", "flexgen-v0", "nf4"), ("auto", "int8", "k8v4", "int4")  # the order of rows; others come after them


def print_table(rows: Sequence[Row]) -> None:
    """Print a table of the scored texts for each model, and one of the errors of layers."""
    cells = {(row["model"], row["weights"], row["kv"]): row for row in rows if row["benchmark"] == "accuracy"}  # the newest of each
    for model in dict.fromkeys(name for name, _, _ in cells):
        print(f"\n{model}\n\n| weights | bytes | KV | perplexity | ratio | LAMBADA | difference | loss of the last word |")
        print("|---|---|---|---|---|---|---|---|")
        of_model = (row for (name, _, _), row in cells.items() if name == model)
        _print_rows(_cell(row) for row in sorted(of_model, key=lambda row: (_place(_WEIGHTS, row["weights"]), _place(_KV, row["kv"]))))
    layers = {(row["weights"], row["kv"], f"{row['shape']}, {row['numbers']}"): row for row in rows if row["benchmark"] == "layer errors"}
    if layers:
        _print_layers(layers)


def _print_layers(layers: Mapping[tuple[str, str, str], Row]) -> None:
    """Print the errors of weights, outputs and logits, with a column for each layer and kind of numbers."""
    columns = list(dict.fromkeys(column for _, _, column in layers))
    print(f"\n| weights | KV | {' | '.join(columns)} |\n{'|---' * (2 + len(columns))}|")
    for weights, kv in dict.fromkeys((weights, kv) for weights, kv, _ in layers):
        cells = (layers.get((weights, kv, column)) for column in columns)
        _print_rows([(weights, kv, *("" if row is None else _errors(row) for row in cells))])


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _print_rows(rows: Iterable[Sequence[str]]) -> None:
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _cell(row: Row) -> Sequence[str]:
    low, high = row["perplexity_ratio_interval"]
    least, most = (100 * each for each in row["accuracy_difference_interval"])
    lowest, highest = row["word_loss_difference_interval"]
    return (
        row["weights"], f"{row['weight_bytes'] / 1e6:.1f} MB", row["kv"], f"{row['perplexity']:.2f}",
        f"{row['perplexity_ratio']:.4f} ({low:.4f} to {high:.4f})", f"{100 * row['accuracy']:.1f} %",
        f"{100 * row['accuracy_difference']:+.1f} ({least:+.1f} to {most:+.1f})",
        f"{row['word_loss_difference']:+.4f} ({lowest:+.4f} to {highest:+.4f})",
    )  # fmt: skip


def _errors(row: Row) -> str:
    return ", ".join(f"{row[name]:.4f}" for name in ("weight_error", "output_error", "logit_error"))
