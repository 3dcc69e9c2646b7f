"""Writes a table with its answers: the rows in their order, each beside the record of its line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexgen.base.quantities import counted
from flexgen.tables.answers import Answers
from flexgen.tables.batch import Batch, Row
from flexgen.tables.form import TableForm
from flexgen.tables.formats import open_writer
from flexgen.tables.prompts import Prompts

logger = logging.getLogger(__name__)


def write_table(form: TableForm, records: Iterable[bytes], file: io.RawIOBase, target: Path) -> int:
    """Write the table with a column for each part of the answers, and return the number of rows.

    Rows without a record have no answer, and a remark in the column of errors.

    Args:
        form: The table and what was asked of its rows.
        records: The records of the lines in their order, as JSON; `index` is the number of the row.
        file: The file, open for writing.
        target: The name that the file will have, which says its format.

    Raises:
        StorageError: The table has changed since it was read.
        FlexGenError: The table is damaged, or its values cannot be written.
    """
    table, task = form.open(), form.task
    answers, prompts = Answers(task), Prompts(task)
    writer = open_writer(file, form.format_for(target), table, task.columns)
    found = _by_row(records)
    num_rows = 0
    try:
        for batch in table.batches():
            own = [next(found) for _ in range(len(batch))]
            writer.write(batch, [answers.values(record, _fault(prompts, batch, place, record)) for place, record in enumerate(own)])
            num_rows += len(batch)
    except BaseException:
        with suppress(OSError, ValueError):  # what is left goes into a file that is thrown away
            writer.close()
        raise
    writer.close()
    _tell(answers, writer.num_escaped, num_rows)
    return num_rows


def _fault(prompts: Prompts, batch: Batch, place: int, record: Row | None) -> str | None:
    """Return why a row had no prompt; None if it had one."""
    return prompts.fault(batch.rows()[place]) if record is not None and "error" in record else None


def _by_row(records: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield the record of every row, without end; None for rows that have none."""
    number = 1
    for record in map(json.loads, records):
        while number < record["index"]:
            yield None
            number += 1
        yield record
        number += 1
    while True:
        yield None


def _tell(answers: Answers, num_escaped: int, num_rows: int) -> None:
    """Log what is not visible in the exit code of a job."""
    rows = counted(num_rows, "row")
    if answers.num_unanswered:
        logger.info(counted(answers.num_unanswered, f"of {rows} has no answer yet", f"of {rows} have no answer yet"))
    if answers.num_errors:
        one, several = f"of {rows} has an error, which stands in its row", f"of {rows} have an error, which stands in their row"
        logger.warning(counted(answers.num_errors, one, several))
    if answers.num_cut:
        found = counted(num_rows, "answer")
        one, several = f"of {found} was cut because it reached", f"of {found} were cut because they reached"
        logger.warning("%s the most tokens", counted(answers.num_cut, one, several))
    if num_escaped:
        one, several = f"of {rows} has", f"of {rows} have"
        what = "half of a surrogate pair, which this format cannot hold: it is written as an escape such as \\ud800"
        logger.warning("%s %s", counted(num_escaped, one, several), what)
