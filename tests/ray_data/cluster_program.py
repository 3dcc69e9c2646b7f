"""What test_cluster.py runs in a process of its own: a Ray cluster on this machine, and datasets that FlexGenActor answers on it.

It prints a JSON object with what was seen.  Arguments: the bundled model, a folder to work in, a short folder for Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from flexgen.ray_data import FlexGenActor

ROOT = Path(__file__).parent.parent.parent
CPUS, CPUS_EACH, ACTORS, ROWS_EACH = 8, 2, 2, 3
FATAL = 7  # the id of the row whose first answer is lost with its actor
GREEDY = {"temperature": 0, "max_tokens": 8}
_PATIENCE_SECONDS = 120


class Watched(FlexGenActor):
    """Adds what its process is and has.  All actors are open before any answers; the first that has answered the fatal row is killed."""

    def __init__(self, *args: Any, folder: str, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._folder = Path(folder)
        (self._folder / f"actor-{os.getpid()}").touch()

    def __call__(self, batch: pa.Table) -> pa.Table:
        end = time.monotonic() + _PATIENCE_SECONDS
        while len(list(self._folder.glob("actor-*"))) < ACTORS and time.monotonic() < end:
            time.sleep(0.05)
        found = super().__call__(batch)
        if FATAL in batch.column("id").to_pylist():
            with contextlib.suppress(FileExistsError):
                (self._folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        import torch

        seen = {
            "pid": os.getpid(), "host_mem": self.llm.options.host_mem, "threads": torch.get_num_threads(),
            "processors": len(os.sched_getaffinity(0)),
        }  # fmt: skip
        for name, value in seen.items():
            found = found.append_column(name, pa.array([value] * found.num_rows, pa.int64()))
        return found


def several_actors(constructor: dict[str, Any], table: pa.Table, folder: Path) -> list[dict[str, Any]]:
    """Answer a table on several actors, one of which is killed."""
    blocks = [table.slice(start, ROWS_EACH) for start in range(0, table.num_rows, ROWS_EACH)]
    answered = ray.data.from_arrow(blocks).map_batches(
        Watched,
        fn_constructor_kwargs={**constructor, "folder": str(folder)},
        batch_size=ROWS_EACH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=ACTORS),
        num_cpus=CPUS_EACH,
    )
    return answered.take_all()


def refused(constructor: dict[str, Any], table: pa.Table) -> str:
    """Return what is said about a constructor that fails."""
    broken = {**constructor, "regex": "("}
    asked = ray.data.from_arrow(table).map_batches(
        FlexGenActor, fn_constructor_kwargs=broken, batch_size=4, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=CPUS_EACH
    )
    try:
        asked.take_all()
    except Exception as error:  # noqa: BLE001 - Ray wraps what an actor raises
        return str(error)
    return ""


def main(model: str, folder: Path, short: str) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import ray_parquet

    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        _temp_dir=short, _node_ip_address="127.0.0.1",
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    table = pa.table(json.loads((folder / "rows.json").read_text()))
    constructor = {"model": model, "prompt": "{text}", "sampling_params": GREEDY, "dtype": "float32"}
    rows = several_actors(constructor, table, folder)
    arguments = ["--model", model, "--prompt", "{text}", "--max-tokens", "8", "--batch-size", "16", "--cpus", str(CPUS_EACH)]
    ray_parquet.main([str(folder / "input"), str(folder / "output"), *arguments, "--option", "dtype=float32"])
    memory = ray.nodes()[0]["Resources"]["memory"]
    found = {"rows": rows, "refused": refused(constructor, table), "node_memory_bytes": memory}
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
