"""`flexgen map`: asks a model about every row of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexgen.cli.job import run_job
from flexgen.cli.map_flags import MapFlags, TaskFlags, check_map, naming_flags, open_source
from flexgen.cli.options import engine_command, takes
from flexgen.cli.reading import Conversations
from flexgen.options import EngineOptions

if TYPE_CHECKING:
    from flexgen.cli.table_lines import TableLines


@engine_command
@takes("flags", MapFlags)
@takes("asked", TaskFlags)
@takes("conversations", Conversations)
def map(flags: MapFlags, asked: TaskFlags, conversations: Conversations, options: EngineOptions) -> int:
    """Ask the model about every row of a table.

    The prompt names columns, such as {text}. The output is the table with
    a column for the answer and one for errors, rows in the same order. If
    the run is interrupted, the same command goes on where it stopped.
    """
    _ = conversations.keywords  # checks them
    with naming_flags():
        path = check_map(flags, asked)

    def open_lines() -> TableLines:
        from flexgen.base.steps import step
        from flexgen.cli.table_lines import TableLines

        step(f"opening {path}")
        with naming_flags():
            table, form = open_source(path, asked)
            return TableLines.of(table, form, flags=flags, asked=asked, conversations=conversations)

    return run_job(flags, open_lines, options)
