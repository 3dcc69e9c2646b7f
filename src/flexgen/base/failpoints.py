"""Named points at which a test can make something fail: by an error, or by the end of the process.

Nothing in the package switches them on; a test's own process does (tests/faults/).  A point that is off costs one comparison.
"""

from __future__ import annotations

from collections.abc import Callable

FAILPOINTS = (
    "input.read",  # a line of the input is about to be taken
    "store.commit", "store.committed",  # around the COMMIT of a transaction
    "export.write", "export.fsync", "export.rename", "export.renamed",  # the steps of replacing the output
    "disk.read", "disk.write",  # one system call on weights or spilled KV
    "engine.pass",  # a pass is about to begin
    "shard.write", "shard.fsync", "shard.synced",  # the steps of making durable what a worker has answered
    "workers.link", "workers.linked", "workers.replace",  # how a file of workers appears: by a link, or in place of another
    "workers.publish", "workers.remove", "workers.collect",  # what a run does with the folder of its workers
)  # fmt: skip

# The package's one variable of its own: a fault strikes a process, not an object that could be handed around.
_hook: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Pass the point `name`.  Whatever the test's hook does there happens to the caller."""
    if _hook is not None:
        _hook(name)


def switch_on(hook: Callable[[str], None]) -> None:
    """Call `hook` with the name of every point that this process passes, on whatever thread passes it."""
    global _hook
    _hook = hook
