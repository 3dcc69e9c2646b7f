"""The formats of tables: by the ending of a file's name, or by their own name.  Each is imported when it is needed."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen.errors import JobError, OptionError
from flexgen.tables.batch import Table, TableWriter
from flexgen.tables.columns import Column
from flexgen.tables.values import escaped, surrogate_fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of tables.

    Attributes:
        module: The module of this package that reads and writes it.
        reader: The name of its class that reads.
        writer: The name of its class that writes.
        endings: The endings of the names of its files.
        settings: More arguments of both classes.
    """

    module: str
    reader: str
    writer: str
    endings: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


FORMATS: Mapping[str, Format] = {
    "csv": Format(module="csv_table", reader="CsvTable", writer="CsvWriter", endings=(".csv",)),
    "tsv": Format(module="csv_table", reader="CsvTable", writer="CsvWriter", endings=(".tsv", ".tab"), settings={"delimiter": "\t"}),
    "parquet": Format(module="parquet_table", reader="ParquetTable", writer="ParquetWriter", endings=(".parquet", ".pq")),
    "jsonl": Format(module="jsonl_table", reader="JsonLinesTable", writer="JsonLinesWriter", endings=(".jsonl", ".ndjson")),
}
_COMPRESSED = ".gz"


def format_of(path: Path, what: str, *, may_be_compressed: bool = False) -> str:
    """Return the name of the format that the ending of a file's name stands for.

    Args:
        path: The file.
        what: The name of the flag or argument, for messages.
        may_be_compressed: Whether `.gz` may follow the ending.

    Raises:
        OptionError: The ending stands for no format.
    """
    name = path.name.lower()
    if may_be_compressed:
        name = name.removesuffix(_COMPRESSED)
    found = next((each for each, form in FORMATS.items() if name.endswith(form.endings)), None)
    if found is None:
        endings = ", ".join(ending for form in FORMATS.values() for ending in form.endings)
        raise OptionError(f"{what} {path}: the ending of a table's name is one of {endings}")
    return found


def open_table(path: Path, form: str) -> Table:
    """Open a table for reading.

    Raises:
        JobError: The file is not a table of this format, or the names of its columns cannot be used (see `check_names`).
        OptionError: The format is unknown, or its library is not installed.
    """
    known = _known(form)
    table: Table = getattr(_module(known), known.reader)(path, **known.settings)
    try:
        check_names(str(path), table.columns)
    except OptionError as error:  # which is the fault of the file, not of an option
        raise JobError(str(error)) from error
    return table


def open_writer(file: io.RawIOBase, form: str, table: Table, added: Sequence[Column]) -> TableWriter:
    """Begin a table in an open file: the columns of `table`, then the added ones.

    Raises:
        OptionError: The format is unknown, or its library is not installed.
    """
    known = _known(form)
    return getattr(_module(known), known.writer)(file, table, added, **known.settings)


def check_writable(table: Table, form: str) -> None:
    """Check that the columns of a table have types that a format can hold.

    Raises:
        JobError: They have not.
        OptionError: The format is unknown, or its library is not installed.
    """
    _known(form)
    if form == "parquet":
        table.schema()


def check_names(name: str, columns: Sequence[str]) -> None:
    """Check that all columns have different names, which are Unicode.

    Raises:
        OptionError: Two have the same, or one is not Unicode.
    """
    for place, column in enumerate(columns):
        if fault := surrogate_fault(column):
            raise OptionError(f"{name}: the name of the column '{escaped(column)}' has {fault}")
        if column in columns[:place]:
            raise OptionError(f"{name}: two columns are called {column!r}")


def _known(form: str) -> Format:
    if form not in FORMATS:
        raise OptionError(f"the format {form!r} is unknown; known: {', '.join(FORMATS)}")
    return FORMATS[form]


def _module(form: Format) -> Any:
    return importlib.import_module(f"flexgen.tables.{form.module}")
