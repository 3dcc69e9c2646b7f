"""FlexGenActor on a Ray cluster of this machine: several actors, one of which is killed; the example; an actor that cannot start.

The cluster runs in a process of its own (cluster_program.py), because Ray changes signal handlers and warns at its end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexgen import LLM, SamplingParams

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra ray)")

ROOT = Path(__file__).parent.parent.parent
TEXTS = [json.loads(line)["prompt"] for line in (ROOT / "examples" / "requests.jsonl").read_text().splitlines()][:17]
TABLE = pa.table({
    "id": list(range(18)), "text": [*TEXTS, "a very long story " * 2000], "tags": [["a"], None, ["b", "c"]] * 6,
    "chat": [[{"role": "user", "content": text}] for text in [*TEXTS, "x"]],
})  # fmt: skip
PROGRAM = Path(__file__).with_name("cluster_program.py")
ANSWERS = ["answer", "error"]


@pytest.fixture(scope="module")
def wanted(novels_opt: Path) -> list[dict[str, Any]]:
    """What `LLM.map` answers to the same rows."""
    with LLM(novels_opt, dtype="float32", host_mem="2GiB", device="cpu") as llm:
        return llm.map(TABLE, "{text}", sampling_params=SamplingParams(temperature=0, max_tokens=8), finish_reason=True).to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("cluster")
    (found / "rows.json").write_text(json.dumps(TABLE.select(["id", "text", "tags"]).to_pydict()))
    (found / "input").mkdir()
    for part in range(2):
        pq.write_table(TABLE.slice(9 * part, 9), found / "input" / f"{part}.parquet")
    return found


@pytest.fixture(scope="module")
def seen(folder: Path, novels_opt: Path, kept_rates: None) -> dict[str, Any]:
    """What the program has seen."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0", "PYTHONPATH": str(ROOT / "src")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of this run; Ray would keep its own below the home folder
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # names of sockets have few letters
        command = [sys.executable, str(PROGRAM), str(novels_opt), str(folder), short]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["id"])


def test_all_rows_are_there_once_though_an_actor_was_killed(seen: dict[str, Any], wanted: list[dict[str, Any]], folder: Path) -> None:
    assert (folder / "killed").exists()
    found = by_id(seen["rows"])
    assert [row["id"] for row in found] == list(range(18))
    assert [[row[name] for name in ANSWERS] for row in found] == [[row[name] for name in ANSWERS] for row in wanted]
    assert [row["tags"] for row in found] == TABLE.column("tags").to_pylist()
    assert [bool(row["error"]) for row in found] == [False] * 17 + [True]


def test_actors_share_the_node(seen: dict[str, Any], folder: Path) -> None:
    assert len(list(folder.glob("actor-*"))) >= 3  # two, and the one in place of that which was killed
    share = 2 / 8
    assert {row["host_mem"] for row in seen["rows"]} == {int(0.8 * share * seen["node_memory_bytes"])}
    processors = min(2, len(os.sched_getaffinity(0)))
    assert {(row["threads"], row["processors"]) for row in seen["rows"]} == {(processors, processors)}


def test_the_example(seen: dict[str, Any], wanted: list[dict[str, Any]], folder: Path) -> None:
    tables = [pq.read_table(path) for path in (folder / "output").glob("*.parquet")]
    assert {field.name: str(field.type) for field in tables[0].schema}["error"] == "string"
    found = by_id([row for table in tables for row in table.to_pylist()])
    assert found == wanted


def test_an_actor_that_cannot_start_says_why(seen: dict[str, Any]) -> None:
    assert "regex: the regular expression '(' cannot be used" in seen["refused"]
